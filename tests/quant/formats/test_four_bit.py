"""NF4 and FP4: exactness on what the code books hold, error bounds, size, and interchange with bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from olmoe.errors import UserError
from olmoe.quant import FourBit
from olmoe.quant.formats.four_bit import BLOCK, code_book, dynamic_code_book

CPU = torch.device("cpu")
# Ragged last block; odd number of weights; more blocks than one nested block; several decoded pieces.
SHAPES = [(5, 32), (7, 9), (300, 64), (520, 512), (1, 1)]


def random_weight(rows, columns, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)


def block_maxima(weight):
    """The largest magnitude of each weight's block, in the weight's shape."""
    flat = weight.flatten().float()
    maxima = [piece.abs().max().expand(len(piece)) for piece in flat.split(BLOCK)]
    return torch.cat(maxima).view(weight.shape)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_value_of_the_code_book_survives(name):
    """A block that holds the book itself, scaled, decodes to itself."""
    weight = (code_book(name, CPU) * 0.75).repeat(8, 4)
    format = FourBit(name)
    assert torch.equal(format.decode(format.encode(weight), 8, 64, torch.float32), weight)


def test_code_books_are_the_published_ones():
    nf4, fp4, dynamic = code_book("nf4", CPU), code_book("fp4", CPU), dynamic_code_book(CPU)
    assert nf4.tolist() == sorted(nf4.tolist())
    assert (nf4[0], nf4[7], nf4[15]) == (-1, 0, 1)
    # Quantiles of the normal distribution, evenly spaced in probability on each side (QLoRA, equation 4).
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat((negative, torch.zeros(1), positive.flip(0))) / positive.max()
    assert torch.allclose(nf4.double(), expected, atol=1e-6)
    assert sorted({abs(v) for v in fp4.tolist()}) == pytest.approx([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
    assert len(set(dynamic.tolist())) == 256
    assert dynamic.abs()[dynamic != 0].min() == pytest.approx(0.55e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_errors_stay_within_half_a_gap_of_the_code_book(name, double_quant, shape):
    weight, format = random_weight(*shape), FourBit(name, double_quant)
    decoded = format.decode(format.encode(weight), *shape, torch.float32)
    gap = code_book(name, CPU).sort().values.diff().max()
    # Double quantization moves a scale by up to half a step of 8 bits, of the spread of the scales.
    slack = 0.02 if double_quant else 1e-6
    assert ((decoded - weight).abs() / block_maxima(weight)).max() <= gap / 2 + slack


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_parts_have_the_declared_shapes(double_quant, shape):
    format = FourBit("nf4", double_quant)
    parts = format.encode(random_weight(*shape, torch.bfloat16))
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == format.parts(*shape)


def test_bits_a_weight():
    def bits(format, rows=2048, columns=2048):
        parts = format.parts(rows, columns).values()
        return sum(8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts) / (rows * columns)

    assert bits(FourBit("nf4")) == 4.5
    assert bits(FourBit("nf4", True)) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_rounds_once_from_fp32(dtype):
    weight, format = random_weight(40, 64), FourBit("nf4", True)
    parts = format.encode(weight)
    exact = format.decode(parts, 40, 64, torch.float32)
    assert torch.equal(format.decode(parts, 40, 64, dtype), exact.to(dtype))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_zeros_stay_zeros(double_quant):
    """A block, and a matrix, without any magnitude: an expert that pruning emptied."""
    format = FourBit("nf4", double_quant)
    weight = torch.cat((torch.zeros(2, 64), random_weight(2, 64)))
    assert torch.equal(format.decode(format.encode(weight), 4, 64, torch.float32)[:2], torch.zeros(2, 64))
    empty = torch.zeros(3, 64)
    assert torch.equal(format.decode(format.encode(empty), 3, 64, torch.float32), empty)


def test_unknown_type_is_refused():
    with pytest.raises(UserError, match="'nf3' is unknown; choose 'nf4' or 'fp4'"):
        FourBit("nf3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_interchangeable_with_bitsandbytes(name, double_quant, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    # Columns of whole blocks: bitsandbytes 0.50's CPU kernel decodes narrower matrices wrongly.
    weight, format = random_weight(300, 512, dtype), FourBit(name, double_quant)
    codes, state = functional.quantize_4bit(weight, quant_type=name, compress_statistics=double_quant)
    theirs = functional.dequantize_4bit(codes, state)
    ours = format.encode(weight)
    assert torch.equal(ours["codes"], codes.flatten())
    # What bitsandbytes encoded, we decode to the same bits.
    parts = {"codes": codes.flatten(), "absmax": state.absmax}
    if double_quant:
        parts |= {"nested_absmax": state.state2.absmax, "offset": state.offset.reshape(1)}
    assert torch.equal(format.decode(parts, 300, 512, dtype), theirs)
    # What we encoded, bitsandbytes decodes to the same bits.
    if double_quant:
        # Its encoder of scales searches approximately, so that a few are one step off the nearest.
        assert (ours["absmax"].int() - state.absmax.int()).abs().max() <= 1
        state.absmax, state.state2.absmax, state.offset = ours["absmax"], ours["nested_absmax"], ours["offset"][0]
    else:
        assert torch.equal(ours["absmax"], state.absmax)
    back = functional.dequantize_4bit(ours["codes"].view(-1, 1), state)
    assert torch.equal(back, format.decode(ours, 300, 512, dtype))


def test_dynamic_code_book_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_code_book(CPU), functional.create_dynamic_map())
