"""Decoders against the `gguf` package and against ggml's own code, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants

import llama_cpp_peer
from olmoe.weights.gguf.block_types import BY_NAME, OTHER_TYPES, TYPES, dequantize

KINDS = list(TYPES.values())


def random_rows(kind, rows: int = 64, blocks: int = 3) -> np.ndarray:
    """Random bytes: every code and scale occurs, infinite ones too."""
    return np.random.default_rng(kind.code).integers(0, 256, (rows, blocks * kind.block_bytes), np.uint8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_sizes_are_ggmls(kind):
    number = gguf.GGMLQuantizationType[kind.name]
    assert kind.code == number
    assert (kind.block_values, kind.block_bytes) == gguf.GGML_QUANT_SIZES[number]


def test_other_types_have_ggmls_names():
    known = {number.value: number.name for number in gguf.GGMLQuantizationType}
    assert {code: known[code] for code in OTHER_TYPES} == OTHER_TYPES
    assert not set(OTHER_TYPES) & set(TYPES)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the package, about infinite scales
def test_values_are_those_of_the_gguf_package(kind):
    data = random_rows(kind)
    expected = quants.dequantize(data, gguf.GGMLQuantizationType[kind.name])
    values = dequantize(kind, data)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)


@pytest.mark.skipif(not llama_cpp_peer.has_ggml(), reason="no llama.cpp whose ggml can be called: install xllamacpp")
@pytest.mark.parametrize("kind", [k for k in KINDS if k.block_values > 1], ids=lambda k: k.name)
def test_values_are_those_of_ggml(kind):
    data = random_rows(kind)
    expected = llama_cpp_peer.ggml_dequantize(kind.name, data, kind.block_values * 3)
    np.testing.assert_array_equal(dequantize(kind, data), expected)


def test_leading_dimensions_are_kept():
    kind = BY_NAME["Q8_0"]
    data = random_rows(kind, rows=6, blocks=2)
    shaped = dequantize(kind, data.reshape(2, 3, -1))
    assert shaped.shape == (2, 3, 64)
    np.testing.assert_array_equal(shaped.reshape(6, 64), dequantize(kind, data))


def test_rows_that_are_not_contiguous_are_decoded_alike():
    kind = BY_NAME["Q4_K"]
    data = random_rows(kind, rows=8)
    np.testing.assert_array_equal(dequantize(kind, data[::2]), dequantize(kind, data)[::2])


def test_bytes_of_a_row():
    assert [BY_NAME[name].row_bytes(512) for name in ("F32", "BF16", "Q8_0", "Q4_0", "Q6_K")] == [
        2048, 1024, 544, 288, 420,
    ]  # fmt: skip
