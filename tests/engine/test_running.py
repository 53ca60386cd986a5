"""Chunked prompts give the results of whole prompts, wherever chunks begin and end."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import make_model
from olmoe.config import RopeParameters
from olmoe.engine.running import RunningSequences, chunks
from olmoe.ops import cpu
from olmoe.runner import make_runner

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3, 2, 3, 8], [4, 6]]
kernels = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}"))
backends = pytest.mark.parametrize("backend", [kernels, "torch"])


def running(runner, count):
    """Sequences whose unwritten cache slots all hold NaN."""
    sequences = RunningSequences(runner, count, 13)
    for t in (*sequences._cache.blocks.keys, *sequences._cache.blocks.values):
        t.fill_(math.nan)
    return sequences


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
def test_all_chunks_but_the_last_are_full(lengths, size, expected):
    assert list(chunks(lengths, size)) == expected


@backends
@pytest.mark.parametrize(
    "rope", [RopeParameters(), RopeParameters(rope_type="dynamic", factor=2.0)], ids=["default", "dynamic"]
)
@pytest.mark.parametrize("size", [1, 2, 4, 11, 12, 100])
def test_chunked_prefill_equals_each_prompt_alone(size, rope, backend):
    """Logits of the last tokens, and of a token decoded after them."""
    runner = make_runner(make_model(max_position_embeddings=8, num_key_value_heads=2, rope=rope), backend)

    def logits(prompts):
        sequences = running(runner, len(prompts))
        first = sequences.prefill(prompts)
        assert sequences.lengths == [len(prompt) for prompt in prompts]
        return first, sequences.step([7] * len(prompts))

    alone = [torch.cat(part) for part in zip(*(logits([prompt]) for prompt in PROMPTS), strict=True)]
    runner.chunk_tokens = size
    for a, b in zip(logits(PROMPTS), alone, strict=True):
        if backend == "cpu":
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@backends
def test_no_pass_has_more_tokens_than_a_chunk(backend):
    runner, sizes = make_runner(make_model(), backend), []

    class Watched:
        chunk_tokens, new_cache = 4, runner.new_cache

        def forward(self, batch, *rest):
            sizes.append(len(batch.ids))
            return runner.forward(batch, *rest)

    RunningSequences(Watched(), 4, 12).prefill(PROMPTS)
    assert sizes == [4] * 5 + [1]


@backends
@pytest.mark.parametrize("rows", [[0, 2], [2, 0], [1], [3, 2, 1, 0]], ids=str)
def test_sequences_are_removed_without_copying(rows, backend):
    runner = make_runner(make_model(num_key_value_heads=2), backend)
    sequences = running(runner, 4)
    sequences.prefill(PROMPTS)
    expected = running(runner, 4)
    expected.prefill(PROMPTS)
    blocks = sequences._cache.blocks
    sequences.keep(rows)
    assert sequences._cache.blocks is blocks
    for token in (5, 6):
        every = expected.step([token] * 4)
        torch.testing.assert_close(sequences.step([token] * len(rows)), every[rows], rtol=1e-5, atol=1e-6)
