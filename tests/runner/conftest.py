"""Fixtures of the runners' tests."""

from __future__ import annotations

import pytest
import torch

from olmoe.ops import cpu


@pytest.fixture
def kernels():
    """Without the compiled module there is no runner of it to test."""
    if not cpu.available():
        pytest.skip(f"{cpu.unavailable()}")


@pytest.fixture(params=cpu.isas() if cpu.available() else ["none"])
def isa(request, kernels):
    """Each instruction set that this machine runs, for the length of a test."""
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
