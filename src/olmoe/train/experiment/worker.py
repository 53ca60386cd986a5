"""One training run in its own process: `python -m olmoe.train.experiment.worker RUN.toml`.

It continues from the run's newest checkpoint if there is one. When its standard input ends, because the experiment was
interrupted or its process has died, it finishes the step, saves and exits, as after Ctrl-C.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading

from olmoe.errors import UserError
from olmoe.train.config import load_config
from olmoe.train.run_folder import latest

INTERRUPTED = 130


def main(path: str) -> int:
    """Train; the exit code is 0, 2 for a mistake in one sentence on stderr, or 130 after an interrupt."""
    # In the background of a script interrupts are ignored, and then nothing could stop a run that is not in its loop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_interrupt_at_the_end_of_input, daemon=True).start()
    try:
        from olmoe.train.loop import Interrupted, train
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        config = load_config(path)
        resume = latest(config.resolve(config.run.output)) is not None
        train(load_config(path, resume=resume), resume=resume, overwrite=not resume, show_progress=False)
    except UserError as error:
        print(f"olmoe: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt):
        return INTERRUPTED
    return 0


def _interrupt_at_the_end_of_input(descriptor: int = 0) -> None:
    while os.read(descriptor, 4096):  # not sys.stdin, whose lock would be held when the interpreter ends
        pass
    _thread.interrupt_main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
