"""Angles of rotary embeddings: looked up, and right while another thread makes the table grow."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from olmoe.runner import Batch
from olmoe.runner.rope_table import RopeTable


@pytest.fixture
def rotary():
    return make_model(max_position_embeddings=4096).model.rotary


def expected(rotary, position):
    return torch.stack([t[0] for t in rotary(torch.tensor([position]))])


def looked_up(table, position):
    angles = table.angles(Batch([1], [1], [position]))
    return torch.stack([angles.cos[angles.rows[0]], angles.sin[angles.rows[0]]])


def test_the_same_as_the_networks_own(rotary):
    table = RopeTable(rotary)
    for position in (0, 5, 255, 256, 1000, 3):
        assert torch.equal(looked_up(table, position), expected(rotary, position))


@pytest.mark.parametrize("first", [None, 5], ids=["no table yet", "a short table"])
def test_a_thread_that_comes_while_the_table_grows_reads_right_angles(rotary, first, monkeypatch):
    table, seen = RopeTable(rotary), []
    if first is not None:
        assert torch.equal(looked_up(table, first), expected(rotary, first))
    arange = torch.arange

    def in_between(*arguments, **options):
        if not seen:
            seen.append(None)
            seen[0] = looked_up(table, 700)
        return arange(*arguments, **options)

    monkeypatch.setattr(torch, "arange", in_between)
    assert torch.equal(looked_up(table, 900), expected(rotary, 900))
    monkeypatch.undo()
    assert torch.equal(seen[0], expected(rotary, 700))
    assert torch.equal(looked_up(table, 5), expected(rotary, 5))
