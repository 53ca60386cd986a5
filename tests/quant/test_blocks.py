"""Q8_0 and Q4_0 against a scalar quantizer and a scalar reading of the layout, both written from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from olmoe.errors import CheckpointError, ConfigError
from olmoe.quant import make_format
from olmoe.quant.blocks import Q4_0, Q8_0, extreme, packable
from olmoe.quant.formats import CODES

FORMATS = [Q8_0(), Q4_0()]
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
            scale = amax / f32(127) if format.name == "q8_0" else extreme_value / f32(-8)
            inverse = f32(1) / scale if scale else f32(0)
            if format.name == "q8_0":  # C's roundf: halves away from zero
                codes = [int(math.copysign(math.floor(abs(float(x * inverse)) + 0.5), x)) for x in block]
            else:
                codes = [min(15, int(x * inverse + f32(8.5))) for x in block]
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
                out += bytes(codes[b] | codes[16 + b] << 4 for b in range(16))
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
    size = 32 * (4 if format.name == "q4_0" else 8) * 2  # bytes of codes of a block of 16 rows
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
                    expected[g, b * 256 + j * 64 + 4 * r + i] |= q << (4 if c >= 16 else 0)
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
        codes = np.concatenate((blocks[:, :, 2:] & 15, blocks[:, :, 2:] >> 4), axis=2).astype(np.float32) - 8
    assert torch.equal(decoded, torch.from_numpy((codes * scales).reshape(shape)).to(dtype))
    coarsest = 1 / 127 if format.name == "q8_0" else 1 / 8
    limit = weight.float().abs().view(shape[0], -1, 32).amax(-1, keepdim=True) * (coarsest / 2 * 1.01 + 2**-7)
    if format.name == "q4_0":
        limit = limit * 2  # the end opposite to the extreme one reaches 7 of 8 steps only
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
    low, high = (-127, 127) if format.name == "q8_0" else (-8, 7)
    grid = torch.arange(low, high + 1).float()
    zero = 128 if format.name == "q8_0" else 8
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
    assert math.prod(shape) * 8 / (2048 * 1024) == {"q8_0": 8.5, "q4_0": 4.5}[format.name]
    assert make_format(format.name).name == format.name
