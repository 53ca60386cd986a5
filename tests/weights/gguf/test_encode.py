"""Encoders against the `gguf` package and against ggml's own quantizers, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

import llama_cpp_peer
from olmoe.errors import CheckpointError
from olmoe.weights.gguf import encode as module
from olmoe.weights.gguf.block_types import BY_NAME, dequantize
from olmoe.weights.gguf.encode import ENCODABLE, encode, fitting
from sentences import refused


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    """Many magnitudes, zeros, and blocks whose largest magnitude occurs with both signs."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-6, 1e-3, 1.0, 100.0]).repeat(100)[:, None]
    values = torch.randn(400, 96, generator=generator) * scales
    values[:4] = 0
    values[4:20, 3] = values[4:20].abs().amax(1) * 2
    values[4:20, 5] = -values[4:20, 3]
    values[20:24] = torch.arange(96) - 48.0  # halves and ties of rounding
    return values


@pytest.mark.parametrize("name", ENCODABLE)
def test_bytes_are_those_of_the_gguf_package(name, weights):
    expected = quants.quantize(weights.numpy(), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode("w", weights, BY_NAME[name]), expected.view(np.uint8).reshape(400, -1))


@pytest.mark.skipif(not llama_cpp_peer.has_ggml(), reason="no llama.cpp whose ggml can be called: install xllamacpp")
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_bytes_are_those_of_ggml(name, weights):
    np.testing.assert_array_equal(
        encode("w", weights, BY_NAME[name]), llama_cpp_peer.ggml_quantize(name, weights.numpy())
    )


@pytest.mark.parametrize("name", ENCODABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_encoded_as_its_fp32_values(name, dtype, weights):
    half = weights.to(dtype)
    np.testing.assert_array_equal(encode("w", half, BY_NAME[name]), encode("w", half.float(), BY_NAME[name]))


def test_pieces_do_not_show(weights, monkeypatch):
    whole = encode("w", weights.view(4, 100, 96), BY_NAME["Q4_0"])
    assert whole.shape == (4, 100, 54)
    monkeypatch.setattr(module, "PART_WEIGHTS", 7 * 96)
    np.testing.assert_array_equal(encode("w", weights.view(4, 100, 96), BY_NAME["Q4_0"]), whole)


@pytest.mark.parametrize("name", ENCODABLE)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(name, value):
    weights = torch.ones(2, 32)
    weights[1, 7] = value
    message = refused(lambda: encode("blk.0.attn_q.weight", weights, BY_NAME[name]), CheckpointError)
    assert message.startswith("Tensor 'blk.0.attn_q.weight' has values that are not finite or too large")


def test_values_beyond_fp16_are_refused_where_they_do_not_fit():
    large = torch.full((1, 32), 1e6)
    assert "too large for F16" in refused(lambda: encode("w", large, BY_NAME["F16"]), CheckpointError)
    assert "too large for Q4_0" in refused(lambda: encode("w", large, BY_NAME["Q4_0"]), CheckpointError)
    assert dequantize(BY_NAME["Q8_0"], encode("w", large, BY_NAME["Q8_0"]))[0, 0] == pytest.approx(1e6, rel=1e-3)
    assert dequantize(BY_NAME["BF16"], encode("w", large, BY_NAME["BF16"]))[0, 0] == pytest.approx(1e6, rel=1e-2)


def test_rows_that_are_no_whole_blocks_fall_back_to_bf16():
    assert fitting(BY_NAME["Q4_0"], 64).name == "Q4_0"
    assert fitting(BY_NAME["Q4_0"], 12).name == "BF16"
    assert fitting(BY_NAME["F16"], 5).name == "F16"
