"""Prompts in pieces give what whole prompts give, whichever way the pieces fall on them."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from engine.test_kv_cache import backends, poisoned
from olmoe import fused
from olmoe.config import RopeParameters
from olmoe.engine import prefill as module
from olmoe.engine.prefill import pieces, prefill
from olmoe.model import set_backend

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2, 3, 8], [4, 6]]


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([5], 5, [[5]]),
        ([5], 2, [[2], [2], [1]]),
        ([1, 5, 2], 3, [[1, 2, 0], [0, 3, 0], [0, 0, 2]]),
        ([2, 2], 100, [[2, 2]]),
        ([1, 1, 1], 1, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    ],
)
def test_pieces_are_full_but_for_the_last(lengths, size, expected):
    assert list(pieces(lengths, size)) == expected


@backends
@pytest.mark.parametrize(
    "rope", [RopeParameters(), RopeParameters(rope_type="dynamic", factor=2.0)], ids=["default", "dynamic"]
)
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("size", [1, 2, 4, 11, 12, 100])
def test_pieces_give_what_each_prompt_alone_gives(size, fuse, rope, backend, monkeypatch):
    """Logits of the last tokens, and of a token decoded after them, from caches whose unwritten places are NaN."""
    model = make_model(max_position_embeddings=8, num_key_value_heads=2, rope=rope)
    set_backend(model, backend)
    if fuse:
        fused.fuse(model)

    @torch.inference_mode()
    def logits(prompts):
        cache = poisoned(model.config, len(prompts), 12, backend=backend)
        first = prefill(model, cache, prompts)
        assert cache.lengths == [len(prompt) for prompt in prompts]
        positions = torch.tensor(cache.lengths)
        cache.start_decode()
        hidden = model(torch.full((len(prompts),), 7), positions, cache.attend_decode, positions + 1).hidden
        return first, model.logits(hidden)

    alone = [torch.cat(part) for part in zip(*(logits([prompt]) for prompt in PROMPTS), strict=True)]
    monkeypatch.setattr(module, "PIECE_TOKENS", size)
    for a, b in zip(logits(PROMPTS), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@backends
def test_no_more_tokens_than_a_piece_go_through_at_once(backend, monkeypatch):
    """Where the cache can be continued; else the prompts go through whole."""
    model, sizes = make_model(), []
    model.model.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    monkeypatch.setattr(module, "PIECE_TOKENS", 4)
    with torch.inference_mode():
        prefill(model, poisoned(model.config, 4, 12, backend=backend), PROMPTS)
    assert sizes == ([4] * 5 + [1] if backend == "cpu" else [21])
