"""Packing loses nothing and fills rows well; packed examples compute the same as alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import make_model
from olmoe.model import set_products
from olmoe.train.document_mask import isolated_attend
from olmoe.train.finetune.masks import Example
from olmoe.train.finetune.packing import Batch, pack


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_packed_once_into_a_row_that_fits(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 300).tolist()
    rows = pack(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(300))
    sums = [sum(lengths[number] for number in row) for row in rows]
    assert max(sums) <= 64
    assert len(rows) <= 11 / 9 * sum(lengths) / 64 + 1  # the guarantee of best-fit decreasing


def test_an_example_goes_into_the_fullest_row_with_room():
    assert pack([6, 5, 3, 2, 4], 10) == [[0, 4], [1, 2, 3]]
    assert pack([], 10) == []


def test_packed_examples_compute_the_same_as_alone():
    model = make_model()
    generator = np.random.default_rng(0)
    examples = [
        Example(ids, np.roll(ids, -1)) for ids in (generator.integers(0, 300, length) for length in (7, 1, 20, 7))
    ]
    batch = Batch.of(examples)
    assert batch.lengths == [7, 1, 20, 7]
    packed = model(batch.ids, batch.positions, isolated_attend(batch.lengths))
    loss = packed.hidden.square().sum()
    together = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    alone, total = [], torch.zeros(())
    for example in examples:
        one = Batch.of([example])
        hidden = model(one.ids, one.positions, isolated_attend(one.lengths)).hidden
        alone.append(hidden)
        total = total + hidden.square().sum()
    torch.testing.assert_close(packed.hidden, torch.cat(alone), rtol=1e-5, atol=1e-6)
    for one, other in zip(
        together, torch.autograd.grad(total, list(model.parameters()), allow_unused=True), strict=True
    ):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_attention_multiplies_as_the_model_does():
    model, batch = make_model(), Batch.of([Example(np.arange(n), np.arange(n)) for n in (5, 3)])
    q, k, v = (torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    in_fp32 = batch.attention_for(model)(q, k, v, 0)
    set_products(model, torch.bfloat16)
    lowered = batch.attention_for(model)(q, k, v, 0)
    assert torch.equal(lowered, isolated_attend([5, 3], torch.bfloat16)(q, k, v, 0))
    assert not torch.equal(lowered, in_fp32)
