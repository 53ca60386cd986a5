"""Fixtures for tests of training: restore what runs change in the process, and let Ctrl-C interrupt them."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    """Restore the number of threads, which runs set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C raises even if the parent process ignores it, as shells make background jobs do."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
