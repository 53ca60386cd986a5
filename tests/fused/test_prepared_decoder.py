"""Tables of rotary angles that grow while another thread looks them up."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from olmoe import fused
from olmoe.fused.prepared_decoder import PreparedDecoder
from olmoe.ops.cpu import extension


@pytest.fixture
def whole() -> PreparedDecoder:
    if not extension.available():
        pytest.skip("the kernels are not compiled here")
    model = make_model(max_position_embeddings=4096)
    fused.fuse(model)
    with torch.inference_mode():
        prepared = model.model._prepared_whole(1)
    assert prepared is not None
    return prepared


def expected(whole, position):
    return torch.stack([t[0] for t in whole._decoder.rotary(torch.tensor([position]))])


def looked_up(whole, position):
    return torch.stack([t[0] for t in whole.angles(torch.tensor([position]), position, None)])


@pytest.mark.parametrize("first", [None, 5], ids=["no table yet", "a short table"])
def test_a_thread_that_comes_while_the_table_grows_reads_right_angles(whole, first, monkeypatch):
    """The other thread's turn comes at the worst time: when the angles are new and the kernels' views are not."""
    if first is not None:
        assert torch.equal(looked_up(whole, first), expected(whole, first))
    seen, matrix = [], extension.float_matrix

    def in_between(*arguments):
        if len(seen) < 1:
            seen.append(None)
            seen[0] = looked_up(whole, 700)
        return matrix(*arguments)

    monkeypatch.setattr(extension, "float_matrix", in_between)
    assert torch.equal(looked_up(whole, 900), expected(whole, 900))
    assert torch.equal(seen[0], expected(whole, 700))
    assert torch.equal(looked_up(whole, 5), expected(whole, 5))
