"""Fixtures of the kernels' tests: every instruction set, poisoned outputs, numbers of threads."""

from __future__ import annotations

import math

import pytest
import torch

from olmoe.ops import cpu


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
def poisoned(monkeypatch):
    """`torch.empty` gives NaN, so that an output which a kernel does not write shows."""
    with torch.device("meta"):
        torch.empty(1)  # here torch remembers, for good, what makes tensors: let it not remember the one below
    empty = torch.empty

    def poison(*shape, **options):
        t = empty(*shape, **options)
        return t.fill_(math.nan) if t.is_floating_point() else t.fill_(77)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
