"""Q8_0, Q5_0 and Q4_0 against a scalar quantizer and a scalar reading of the layout, written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from olmoe.errors import CheckpointError, ConfigError
from olmoe.quant.formats import CODES, Q4_0, Q5_0, Q8_0, make_format
from olmoe.quant.formats.blocks import extreme, packable

FORMATS = [Q8_0(), Q5_0(), Q4_0()]
# What a code is stored with added, written down once more.
ZERO = {"q8_0": 128, "q5_0": 16, "q4_0": 8}
named = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
SHAPES = [
    pytest.param((16, 32), id="one block of one group"),
    pytest.param((48, 96), id="several groups and blocks"),
    pytest.param((1, 64), id="one row in a group of 16"),
    pytest.param((19, 32), id="a last group of 3 rows"),
    pytest.param((200, 4096), id="more weights than one piece holds"),
]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scalar_blocks(format, matrix):
    """GGUF's blocks of a matrix, one number at a time in fp32: [(scale fp16, codes)] by row and block."""
    f32, rows = np.float32, []
    for row in matrix.numpy().astype(f32):
        blocks = []
        for block in row.reshape(-1, 32):
            amax, extreme_value = f32(0), f32(0)
            for x in block:
                if abs(x) > amax:
                    amax, extreme_value = abs(x), x
            scale = amax / f32(127) if format.name == "q8_0" else extreme_value / f32(-ZERO[format.name])
            inverse = f32(1) / scale if scale else f32(0)
            if format.name == "q8_0":  # C's roundf: halves away from zero
                codes = [int(math.copysign(math.floor(abs(float(x * inverse)) + 0.5), x)) for x in block]
            else:
                zero = ZERO[format.name]
                codes = [min(2 * zero - 1, int(x * inverse + f32(zero + 0.5))) for x in block]
            blocks.append((np.float16(scale), codes))
        rows.append(blocks)
    return rows


def gguf_bytes(format, rows):
    """The blocks as GGUF stores them."""
    out = bytearray()
    for blocks in rows:
        for scale, codes in blocks:
            out += scale.tobytes()
            if format.name == "q8_0":
                out += np.array(codes, np.int8).tobytes()
            else:
                if format.name == "q5_0":
                    out += sum((q >> 4) << c for c, q in enumerate(codes)).to_bytes(4, "little")
                out += bytes(codes[b] & 15 | (codes[16 + b] & 15) << 4 for b in range(16))
    return torch.frombuffer(out, dtype=torch.uint8).view(len(rows), -1)


@named
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_codes_and_scales_are_those_of_the_scalar_quantizer(format, shape):
    weight = random(*shape)
    expected = gguf_bytes(format, scalar_blocks(format, weight))
    packed = format.encode(weight)[CODES]
    assert torch.equal(format.to_gguf(packed, *shape), expected)
    assert torch.equal(format.from_gguf(expected), packed)


@named
def test_rounding_where_it_is_decided_by_the_last_bit(format):
    """Halves, blocks of zeros, equal magnitudes of both signs, subnormal scales, and bf16's coarse grid."""
    weight = torch.zeros(7, 32)
    weight[1] = torch.arange(32) - 15.5  # ±15.5 are equal magnitudes; the negative one comes first
    weight[2] = weight[1].flip(0)
    weight[3] = torch.linspace(-127, 127, 32)
    weight[4] = torch.arange(32) / 2 + 111.5  # q8_0: scale 1 up to its last bit, values on halves
    weight[5] = random(32) * 1e-7
    weight[6] = random(32, seed=1).bfloat16().float()
    expected = gguf_bytes(format, scalar_blocks(format, weight))
    assert torch.equal(format.to_gguf(format.encode(weight)[CODES], 7, 32), expected)


@named
def test_every_byte_lies_where_the_layout_says(format):
    rows, columns, blocks = 19, 96, 3
    scalar = scalar_blocks(format, random(rows, columns))
    packed = format.encode(random(rows, columns))[CODES]
    size = {"q8_0": 512, "q5_0": 320, "q4_0": 256}[format.name]  # bytes of codes of a block of 16 rows
    assert packed.shape == (2, blocks * (size + 32))
    expected = np.zeros(packed.shape, np.uint8)
    for row in range(rows):
        g, r = divmod(row, 16)
        for b, (scale, codes) in enumerate(scalar[row]):
            for c, q in enumerate(codes):
                if format.name == "q8_0":
                    j, i = divmod(c, 4)
                    expected[g, b * 512 + j * 64 + 4 * r + i] = q + 128
                else:
                    j, i = divmod(c % 16, 4)
                    low_bits = b * size + size - 256
                    expected[g, low_bits + j * 64 + 4 * r + i] |= (q & 15) << (4 if c >= 16 else 0)
                    if format.name == "q5_0":
                        bit = 64 * (c // 4) + 4 * r + c % 4
                        expected[g, b * size + bit // 8] |= (q >> 4) << bit % 8
            at = blocks * size + 2 * (b * 16 + r)
            expected[g, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    assert np.array_equal(packed.numpy(), expected)


@named
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_gives_code_times_scale_rounded_once(format, shape, dtype):
    weight = random(*shape).to(dtype)
    parts = format.encode(weight)
    decoded = format.decode(parts, *shape, dtype)
    blocks = format.to_gguf(parts[CODES], *shape).numpy().reshape(shape[0], -1, format.block_bytes)
    scales = blocks[:, :, :2].copy().view(np.float16).astype(np.float32)
    if format.name == "q8_0":
        codes = blocks[:, :, 2:].view(np.int8).astype(np.float32)
    else:
        low_bits = blocks[:, :, -16:]
        codes = np.concatenate((low_bits & 15, low_bits >> 4), axis=2).astype(np.float32) - ZERO[format.name]
        if format.name == "q5_0":
            codes += 16 * np.unpackbits(blocks[:, :, 2:6], axis=2, bitorder="little")
    assert torch.equal(decoded, torch.from_numpy((codes * scales).reshape(shape)).to(dtype))
    coarsest = 1 / min(ZERO[format.name], 127)
    limit = weight.float().abs().view(shape[0], -1, 32).amax(-1, keepdim=True) * (coarsest / 2 * 1.01 + 2**-7)
    if format.name != "q8_0":
        limit = limit * 2  # the end opposite to the extreme one lacks a step: it reaches 7 of 8 in q4_0
    assert ((decoded.float() - weight.float()).abs().view(shape[0], -1, 32) <= limit).all()


@named
def test_single_rows_are_those_of_the_whole_matrix(format):
    parts, ids = format.encode(random(19, 96)), torch.tensor([0, 18, 3, 3, 16])
    whole = format.decode(parts, 19, 96, torch.float32)
    assert torch.equal(format.decode_rows(parts, ids, 19, 96), whole[ids])
    assert format.decode_rows(parts, ids[:0], 19, 96).shape == (0, 96)


@named
def test_a_slice_of_a_stack_and_a_column_slice_of_a_weight(format):
    weight = random(3, 16, 128)[:, :, 32:96]  # not contiguous
    stack = torch.stack([format.encode(matrix)[CODES] for matrix in weight])
    for e in range(3):
        assert torch.equal(
            format.decode({CODES: stack[e]}, 16, 64, torch.float32),
            format.decode(format.encode(weight[e].contiguous()), 16, 64, torch.float32),
        )


@named
def test_rounding_for_given_scales_finds_the_nearest_code(format):
    blocks, scales = random(50, 32), random(50, seed=1)
    zero = ZERO[format.name]
    low, high = (-127, 127) if format.name == "q8_0" else (-zero, zero - 1)
    grid = torch.arange(low, high + 1).float()
    error = (blocks[..., None] - grid * scales[:, None, None]).abs()
    chosen = (blocks - (format.round(blocks, scales).float() - zero) * scales[:, None]).abs()
    assert torch.allclose(chosen, error.amin(-1), atol=1e-5)
    assert (format.round(blocks, torch.zeros(50)) == zero).all()


def test_the_extreme_value_of_a_block_keeps_its_sign():
    blocks = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0], [-2.0, 2.0, 0.0], [2.0, -2.0, 0.0]])
    assert extreme(blocks).tolist() == [-3.0, 0.0, -2.0, 2.0]


@named
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_weights_that_no_scale_can_hold_are_refused(format, value):
    weight = random(16, 64)
    weight[7, 40] = value
    with pytest.raises(CheckpointError, match=f"cannot be stored as {format.name}; check the checkpoint"):
        format.encode(weight)


@named
def test_shapes_that_have_no_blocks_are_refused(format):
    for shape in ((4, 40), (0, 32), (3, 0)):
        assert not packable(*shape)
        with pytest.raises(ConfigError, match="blocks hold 32 columns; keep it in bf16"):
            format.parts(*shape)
    assert packable(1, 32)


@named
def test_sizes(format):
    (shape, dtype) = format.parts(2048, 1024)[CODES]
    assert dtype == torch.uint8
    assert math.prod(shape) * 8 / (2048 * 1024) == {"q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}[format.name]
    assert make_format(format.name).name == format.name
