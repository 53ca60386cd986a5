"""Fixtures of the kernels' tests: every instruction set, poisoned outputs, numbers of threads."""

from __future__ import annotations

import pytest
import torch

from olmoe.ops import cpu
from olmoe.ops.cpu import extension, training


@pytest.fixture(autouse=True)
def built():
    """Skip these tests where the compiled module is missing."""
    if not cpu.available():
        pytest.skip(f"{cpu.unavailable()}")


@pytest.fixture(params=cpu.isas() if cpu.available() else ["none"])
def isa(request):
    """Run the test with each instruction set that this machine supports."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def outputs_show_gaps(poisoned):
    """Poison the outputs of kernels in advance, so that gaps show."""


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "our threads"])
def team(request):
    """torch's threads, and the pool that stands in where they are unavailable."""
    training._share_threads()
    if request.param == "our threads":
        extension.kernels().set_parallel(0)
    yield request.param
    training._share_threads.cache_clear()
