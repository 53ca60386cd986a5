"""Run a file of requests in OpenAI's batch format; responses are appended to OUT as they complete.

An interrupted run continues where it stopped when the same command is given again. Requests run together in
continuous batches. The exit code is 0 if all succeeded and 1 if any failed; the line of a failed request says why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from olmoe.cli.generate import add_model_arguments
from olmoe.cli.serve import add_engine_arguments, check_extra, check_values, load_state

if TYPE_CHECKING:
    from olmoe.serve.batch import BatchRun
    from olmoe.serve.batch_file import BatchInput, BatchOutput
    from olmoe.serve.state import ServerState

EXIT_SOME_FAILED, EXIT_INTERRUPTED = 1, 130


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe batch`."""
    parser.add_argument("input", metavar="IN.jsonl", help="requests with custom_id, url and body; - reads stdin")
    parser.add_argument("output", metavar="OUT.jsonl", help="responses, appended if the file exists; - writes stdout")
    parser.add_argument("--overwrite", action="store_true", help="start again instead of continuing OUT")
    parser.add_argument(
        "--in-flight", type=int, metavar="N", help="at most N requests in progress (default: twice --max-rows)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and nothing on stderr but errors")
    add_engine_arguments(parser.add_argument_group("engine"))
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the files, load the model, answer."""
    from olmoe.errors import UserError
    from olmoe.serve.batch_file import BatchInput, BatchOutput

    check_extra("olmoe batch")
    check_values(arguments, "in_flight")
    if arguments.quiet and not arguments.verbose:
        logging.getLogger("olmoe").setLevel(logging.ERROR)
    in_flight = arguments.in_flight or 2 * arguments.max_rows
    source, target = (name if name == "-" else os.path.expanduser(name) for name in (arguments.input, arguments.output))
    if source != "-" and target != "-" and os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"IN and OUT are both {target}; choose another OUT.")
    # Everything wrong with the files is reported before gigabytes are loaded.
    with (
        contextlib.closing(BatchInput(source)) as batch,
        BatchOutput(target, batch.custom_ids, overwrite=arguments.overwrite) as output,
    ):
        if output.finished and not arguments.quiet:
            print(f"olmoe: {len(output.finished)} of {len(batch)} requests are answered already", file=sys.stderr)
        if len(output.finished) == len(batch):
            return EXIT_SOME_FAILED if any(status != 200 for status in output.finished.values()) else 0
        with contextlib.closing(_load(arguments, in_flight)) as state:
            return _run(state, batch, output, in_flight, arguments.quiet)


def _load(arguments: argparse.Namespace, in_flight: int) -> ServerState:
    """An engine whose queue holds everything in flight: the number of choices per request is bounded."""
    from olmoe.serve.protocol import MOST_CHOICES
    from olmoe.serve.state import ServeSettings

    settings = ServeSettings(max_queued_requests=in_flight * MOST_CHOICES * 1024, max_queued_tokens=2**62)
    return load_state(arguments, settings)


def _run(state: ServerState, batch: BatchInput, output: BatchOutput, in_flight: int, quiet: bool) -> int:
    from tqdm import tqdm

    from olmoe.errors import UserError
    from olmoe.serve.app import ENDPOINTS
    from olmoe.serve.batch import BatchRun

    before = len(output.finished)
    with tqdm(total=len(batch), initial=before, desc="batch", unit="request", disable=quiet or None) as bar:

        def write(line: dict[str, Any]) -> None:
            output.write(line)
            bar.update()

        work = BatchRun(state, {each.path: each for each in ENDPOINTS if each.generates}, write, in_flight=in_flight)
        try:
            stopped = asyncio.run(_until_stopped(work, batch, output))
        except KeyboardInterrupt:  # where signals cannot be handled otherwise
            stopped = True
        except UserError as error:  # the engine stopped
            raise UserError(f"{str(error).rstrip('.')}; {_how_to_go_on(work, batch, output)}.") from None
    if stopped:
        print(f"olmoe: stopped; {_how_to_go_on(work, batch, output)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    bad = sum(status != 200 for status in output.finished.values()) + work.failed
    if bad and not quiet:
        print(f"olmoe: {bad} of {len(batch)} requests failed; their lines say why", file=sys.stderr)
    return EXIT_SOME_FAILED if bad else 0


def _how_to_go_on(work: BatchRun, batch: BatchInput, output: BatchOutput) -> str:
    done = len(output.finished) + work.succeeded + work.failed
    if output.name == "-":
        return f"{done} of {len(batch)} requests are answered"
    return f"{done} of {len(batch)} requests are answered in {output.name}; the same command continues"


async def _until_stopped(work: BatchRun, batch: BatchInput, output: BatchOutput) -> bool:
    """Run; whether a signal ended it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    handled = False
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
        for number in numbers:
            loop.add_signal_handler(number, stop.set)
        handled = True
    try:
        await work.run((line for line in batch if line.custom_id not in output.finished), stop)
    finally:
        if handled:
            for number in numbers:
                loop.remove_signal_handler(number)
    return stop.is_set()
