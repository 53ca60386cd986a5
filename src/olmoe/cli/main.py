"""The `olmoe` command: finds the subcommand, turns user errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from olmoe import __version__
from olmoe.errors import UserError

# Module of this package -> the line `olmoe --help` shows. Each has `configure(parser)` and `run(arguments)`.
COMMANDS = {
    "generate": "continue a prompt and stream the text",
    "train": "train a model from a TOML configuration",
    "info": "show a model's architecture, parameters and bytes",
}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 for a mistake of the user, 130 for an interrupt."""
    parser = argparse.ArgumentParser(
        prog="olmoe",
        description="OLMoE, the open sparse mixture-of-experts language model.",
        epilog='example: olmoe generate "Once upon a time" --max-new-tokens 100',
    )
    parser.add_argument("--version", action="version", version=f"olmoe {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what was chosen automatically, to stderr")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"olmoe.cli.{name}")
        module.configure(subparsers.add_parser(name, help=summary, description=module.__doc__))
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return EXIT_USER_ERROR
    logging.basicConfig(format="olmoe: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("olmoe").setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    try:
        code: int = importlib.import_module(f"olmoe.cli.{arguments.command}").run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"olmoe: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("olmoe: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (as `head` does). Nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
