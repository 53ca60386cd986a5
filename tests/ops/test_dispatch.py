"""The rule that chooses a backend."""

from __future__ import annotations

import logging

import pytest
import torch

from olmoe import ops
from olmoe.errors import BackendUnavailableError, UserError
from olmoe.ops import dispatch
from olmoe.runtime import log_once


@pytest.fixture
def toy(monkeypatch):
    """An operation whose fast backend refuses fp16."""
    monkeypatch.setattr(dispatch, "_REGISTRY", {})
    dispatch.register("toy", "torch", lambda x: "it has no fp16" if x.dtype == torch.float16 else None)(
        lambda x: "fast"
    )
    dispatch.register("toy", "reference")(lambda x: "slow")
    dispatch.register("only_reference", "reference")(lambda x: "slow")
    log_once.cache_clear()


def test_auto_selects_the_fastest_backend_that_supports_the_call(toy, caplog):
    caplog.set_level(logging.INFO, logger="olmoe")
    for _ in range(3):
        assert dispatch.choose("toy", "auto", torch.zeros(1))(None) == "fast"
    assert dispatch.choose("toy", "auto", torch.zeros(1, dtype=torch.float16))(None) == "slow"
    assert [r.message for r in caplog.records] == [
        "toy: backend torch on cpu (chosen automatically)",
        "toy: backend reference on cpu (chosen automatically)",
    ]


def test_auto_skips_slower_backends_but_a_named_one_is_used(toy):
    dispatch.register("toy", "cpu", prefer=lambda x: x.numel() < 5)(lambda x: "for few")
    assert dispatch.choose("toy", "auto", torch.zeros(4))(None) == "for few"
    assert dispatch.choose("toy", "auto", torch.zeros(5))(None) == "fast"
    assert dispatch.choose("toy", "cpu", torch.zeros(5))(None) == "for few"


def test_a_named_backend_is_never_replaced(toy):
    assert dispatch.choose("toy", "reference", torch.zeros(1))(None) == "slow"
    with pytest.raises(BackendUnavailableError, match="'torch' cannot run toy here: it has no fp16"):
        dispatch.choose("toy", "torch", torch.zeros(1, dtype=torch.float16))
    with pytest.raises(BackendUnavailableError, match="does not implement only_reference"):
        dispatch.choose("only_reference", "torch", torch.zeros(1))


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(UserError, match="'cuda_magic'.*auto, cpu, torch, reference"):
        ops.linear(torch.zeros(1, 2), torch.zeros(3, 2), backend="cuda_magic")


def test_a_backend_without_a_rank_cannot_be_registered(toy, monkeypatch):
    with pytest.raises(UserError, match=r"backend 'triton' for toy; use one of cpu, torch, reference.*PRIORITY"):
        dispatch.register("toy", "triton")
    assert dispatch.backends("toy") == ("torch", "reference")
    monkeypatch.setattr(dispatch, "PRIORITY", ("triton", *dispatch.PRIORITY))
    dispatch.register("toy", "triton")(lambda x: "fastest")
    assert dispatch.backends("toy") == ("triton", "torch", "reference")
    assert dispatch.choose("toy", "auto", torch.zeros(1))(None) == "fastest"


def test_every_operation_has_a_reference():
    assert all("reference" in implementations for implementations in dispatch._REGISTRY.values())
