"""Fixtures of the kernels' tests: every instruction set, poisoned outputs, numbers of threads."""

from __future__ import annotations

import pytest
import torch

from olmoe.ops import cpu
from olmoe.ops.cpu import extension, training


@pytest.fixture(autouse=True)
def built():
    """Without the compiled module there is nothing to test here."""
    if not cpu.available():
        pytest.skip(f"{cpu.unavailable()}")


@pytest.fixture(params=cpu.isas() if cpu.available() else ["none"])
def isa(request):
    """Each instruction set that this machine runs, for the length of a test."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def outputs_show_gaps(poisoned):
    """Every output of a kernel is poisoned before."""


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "our threads"])
def team(request):
    """The threads that torch has, and the pool for where they cannot be had."""
    training._share_threads()
    if request.param == "our threads":
        extension.kernels().set_parallel(0)
    yield request.param
    training._share_threads.cache_clear()
