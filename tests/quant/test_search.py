"""Chosen codes against rounded ones: by the error that each choice is meant to lower."""

from __future__ import annotations

import pytest
import torch

from olmoe.quant import Q4_0, Q5_0, Q8_0, search
from olmoe.quant.formats import CODES


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(packed, weight, format=None):
    return (format or Q4_0()).decode({CODES: packed}, *weight.shape, torch.float32) - weight


@pytest.mark.parametrize("format", [Q4_0(), Q5_0()], ids=lambda f: f.name)
def test_search_lowers_the_weighted_error_of_every_block_on_the_whole_and_never_ruins_one(format):
    blocks, importance = random(500, 32), random(500, 32, seed=1).square()
    losses = []
    for codes, scales in (format.quantize(blocks), search.search(format, blocks, importance)):
        values = (codes.float() - format.zero) * scales.float().unsqueeze(1)
        losses.append((importance * (values - blocks).square()).sum(dim=1))
    rounded, searched = losses
    assert searched.sum() < 0.85 * rounded.sum()
    assert (searched < rounded * 1.001).float().mean() > 0.97


def test_blocks_on_the_grid_are_kept_exactly():
    codes = torch.randint(0, 16, (40, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15  # both ends occur, so only one scale is exact
    blocks = (codes - 8).float() * 0.125
    found, scales = search.search(Q4_0(), blocks, torch.ones(()))
    assert torch.equal((found.float() - 8) * scales.float().unsqueeze(1), blocks)


def test_blocks_of_zeros_and_columns_that_do_not_matter():
    blocks = torch.zeros(2, 32)
    blocks[1, 5] = 3.0
    codes, scales = search.search(Q4_0(), blocks, torch.zeros(32))
    assert torch.isfinite(scales).all()
    codes, scales = search.search(Q4_0(), blocks, torch.ones(32))
    values = (codes.float() - 8) * scales.float().unsqueeze(1)
    assert torch.allclose(values, blocks, atol=2e-3)


@pytest.mark.parametrize("format", [Q4_0(), Q5_0()], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(5, 64), (40, 96)], ids=str)
def test_compensation_lowers_the_error_of_outputs(shape, format):
    weight, mixing = random(*shape), random(shape[1], shape[1], seed=1)
    inputs = random(400, shape[1], seed=2) @ mixing  # correlated, as hidden states are
    covariance = inputs.T @ inputs / len(inputs)
    by_method = {
        "rounded": format.encode(weight)[CODES],
        "searched": search.encode(format, weight, None),
        "compensated": search.encode(format, weight, covariance),
    }
    losses = {name: float((inputs @ error(p, weight, format).T).square().mean()) for name, p in by_method.items()}
    assert losses["compensated"] < 0.6 * losses["rounded"]
    assert losses["compensated"] < losses["searched"] < losses["rounded"]


def test_compensation_without_correlations_is_rounding_to_the_searched_scales():
    weight = random(16, 64)
    codes, scales = search.compensate(Q4_0(), weight, search.inverse_factor(torch.eye(64)))
    expected = search.search(Q4_0(), weight.view(-1, 32), torch.ones(()))
    assert torch.equal(scales, expected[1])
    assert torch.equal(codes, expected[0])


def test_rows_are_compensated_piece_by_piece(monkeypatch):
    weight, inputs = random(40, 64), random(200, 64, seed=1)
    covariance = inputs.T @ inputs
    whole = search.encode(Q5_0(), weight, covariance)
    monkeypatch.setattr(search, "COMPENSATED", 16 * 64)
    assert torch.equal(search.encode(Q5_0(), weight, covariance), whole)


def test_compensation_with_inputs_that_never_occur():
    """A covariance of rank one, and of rank zero: damping keeps both invertible."""
    weight, x = random(16, 64), random(1, 64, seed=1)
    for covariance in (x.T @ x, torch.zeros(64, 64)):
        assert error(search.encode(Q4_0(), weight, covariance), weight).abs().max() < 2


def test_q8_0_is_rounded_as_always():
    weight = random(16, 64)
    expected = Q8_0().encode(weight)[CODES]
    assert torch.equal(search.encode(Q8_0(), weight, None), expected)
    assert torch.equal(search.encode(Q8_0(), weight, torch.eye(64)), expected)
