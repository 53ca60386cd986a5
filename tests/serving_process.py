"""`olmoe serve` as a process of its own, as users start it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[str]:
    """Run the command on a free port -> its address, without a slash at the end. Told to, it must end well."""
    command = [sys.executable, "-m", "olmoe", "serve", "--port", "0", *arguments]
    given = os.environ | {"OMP_NUM_THREADS": "2"} | environment
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=given)
    assert process.stderr is not None
    said: list[str] = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"page (https?://\S+)/ ", line):
                break
        else:
            raise AssertionError(f"it has not started: {''.join(said)}")
        # Its pipe must not fill.
        threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True).start()
        yield found[1]
        process.terminate()
        assert process.wait(30) == 0, "".join(said)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
