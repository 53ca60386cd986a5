"""The `olmoe` command: finds the subcommand, turns user errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from olmoe.errors import UserError

# Module of this package -> its line in `olmoe --help`. Each has `configure(parser)` and `run(arguments)`.
COMMANDS = {
    "generate": "continue a prompt and stream the text",
    "chat": "chat with a model in the terminal",
    "serve": "serve a model over HTTP, as OpenAI and Anthropic do; a chat page",
    "batch": "run a file of requests in OpenAI's batch format",
    "train": "train a model from a TOML configuration",
    "plot": "draw a training run as an HTML page, even while it runs",
    "experiment": "train and compare the arms of an experiment, with several seeds",
    "sft": "fine-tune a model on chats, all weights or adapters",
    "dpo": "teach a model preferences between answers: DPO, KTO",
    "upcycle": "turn a dense model into a mixture of experts",
    "convert": "convert a checkpoint to GGUF or back",
    "average": "average checkpoints of one architecture into a new one",
    "quantize": "pack a model into 8 or 4 bits per weight; measure its quality",
    "analyze": "see which experts a model chooses on your texts, with figures",
    "policy": "make a router policy that favours the experts of a domain",
    "edit": "prune, merge or reorder experts; measure what it costs",
    "eval": "score a model on tasks of lm-evaluation-harness",
    "bench": "measure prompt processing and decoding on this CPU",
    "info": "show a model's architecture, parameters and bytes",
}

_VERBOSE = "log what was chosen automatically, to stderr"
_QUIET = "no progress bar and no statistics on stderr"
# A full disk, an exhausted quota, and a file beyond the size limit.
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
# Errors of the file system for files that exist but that we may not use.
_DENIALS = (errno.EACCES, errno.EPERM, errno.EIO)
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 for a user's mistake, 130 for an interrupt."""
    try:
        code = _run(argv)
        if sys.stdout is not None:  # None: the caller closed it
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
        _discard_stdout()
        return 0
    except OSError as error:
        if error.errno in _DENIALS and error.filename is not None:
            name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
            print(f"olmoe: {name} cannot be used ({error.strerror}); check its permissions.", file=sys.stderr)
            return EXIT_USER_ERROR
        if error.errno not in _NO_ROOM:
            raise
        _discard_stdout()
        cause = "The disk is full" if error.errno == errno.ENOSPC else f"There is no more room ({error.strerror})"
        print(f"olmoe: {cause}, so the output is incomplete; free some space and try again.", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(argv: Sequence[str] | None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows ? in its place; the text goes on.
        sys.stdout.reconfigure(errors="replace")
    try:
        arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    except SystemExit:  # after --help, --version or a mistake; the help must reach its reader while we can still react
        if sys.stdout is not None:
            sys.stdout.flush()
        raise
    if arguments is None:
        return EXIT_USER_ERROR
    logging.basicConfig(format="olmoe: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("olmoe").setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    code: int = importlib.import_module(f"olmoe.cli.{arguments.command}").run(arguments)
    return code


def _parse(argv: list[str]) -> argparse.Namespace | None:
    """The arguments of a command; None, after the help, if there is no command."""
    parser = argparse.ArgumentParser(
        prog="olmoe",
        description="OLMoE, the open sparse mixture-of-experts language model.",
        epilog='example: olmoe generate "Once upon a time" --max-new-tokens 100',
    )
    parser.add_argument(
        "--version", action=_ShowVersion, nargs=0, help="show the versions of olmoe and torch, and the kernels in use"
    )
    # Both may come before the command or after it. A command's own values would hide those of the same name here.
    parser.add_argument("--verbose", dest="verbose_first", action="store_true", help=_VERBOSE)
    parser.add_argument("--quiet", dest="quiet_first", action="store_true", help=_QUIET)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = {}
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"olmoe.cli.{name}")
        commands[name] = subparsers.add_parser(name, help=summary, description=module.__doc__)
        module.configure(commands[name])
        commands[name].add_argument("--verbose", action="store_true", help=_VERBOSE)
        with contextlib.suppress(argparse.ArgumentError):  # most declare --quiet themselves, to say what it leaves out
            commands[name].add_argument("--quiet", action="store_true", help=_QUIET)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        chosen = commands.get(arguments.command, parser)
        if chosen is not parser and unknown[0] in argv[: argv.index(arguments.command)]:
            chosen = parser  # it comes before the command
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.command is None:
        parser.print_help()
        return None
    arguments.verbose |= arguments.verbose_first
    arguments.quiet |= arguments.quiet_first
    return arguments


class _ShowVersion(argparse.Action):
    """`--version`, which imports torch to name it, and therefore only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and end."""
        from olmoe.cli.version import version_text

        print(version_text())
        parser.exit()


def _discard_stdout() -> None:
    """Discard what is still buffered, so that Python's own flush at exit cannot fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
