"""What tests of training share: runs change settings of the process, which other tests keep, and Ctrl-C ends them."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    """Runs set the number of threads; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises, also where whoever started the tests ignores it, as shells do for what runs in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
