"""How much memory a rank needs to train a model: what is held between steps, and what a step adds.

Counted is what grows with the model: weights, gradients, AdamW's moments, what a layer or the head gathers of the other
ranks, and the activations that a backward pass needs of the tokens that a rank computes at a time, in fp32. Not counted
is what does not: the interpreter and torch (about 0.4 GB), the data, and buffers of single operations.

Shapes legend: D hidden, G*Dh width of keys, F expert width, E experts, K experts per token, V vocabulary, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from olmoe.adapters.adapter import targeted
from olmoe.config import ModelConfig
from olmoe.quant.formats import make_format
from olmoe.train.parallel import is_gathered_at_once
from olmoe.weights.names import parameter_shapes

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gathered: int  # of other ranks' weights and gradients, while a layer and the head are computed, or a small model
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def memory(
    model: ModelConfig,
    tokens: int,
    *,
    ranks: int = 1,
    adapter_rank: int | None = None,
    targets: tuple[str, ...] = ("attention", "experts"),
    pack: str | None = None,
    recompute: bool = False,
) -> Memory:
    """What one of `ranks` needs that computes so many tokens at a time.

    Without `adapter_rank` all weights are trained. `pack` is the format of the frozen weights beside adapters, which
    every rank has whole; all else is sharded.
    """
    shapes = parameter_shapes(model)
    packed = {n: s for n, s in shapes.items() if pack and (".self_attn." in n or ".experts." in n) and len(s) > 1}
    plain = sum(_size(shape) for name, shape in shapes.items() if name not in packed) * _FP32
    whole = sum(_size(shape) // _size(shape[-2:]) * _packed_bytes(pack, *shape[-2:]) for shape in packed.values())
    if adapter_rank is None:
        trained = plain
    else:
        matrices = targeted(model, targets).values()
        trained = sum(_size(s[:-2]) * adapter_rank * (s[-2] + s[-1]) for s in matrices) * _FP32
        plain += trained
    gathered = 0
    if ranks > 1:
        layers = ".layers." if is_gathered_at_once(model) else ".layers.0."
        layer = sum(_size(s) for n, s in shapes.items() if layers in n and n not in packed)
        head = sum(_size(s) for n, s in shapes.items() if ".layers." not in n)
        # Of what is trained, gradients are as large until they are summed over ranks.
        gathered = (layer + head) * _FP32 * (2 if adapter_rank is None else 1)
    return Memory(
        weights=plain // ranks + whole,
        gathered=gathered,
        gradients=trained // ranks,
        optimizer=2 * trained // ranks,
        activations=activations(model, tokens, adapter_rank, recompute),
    )


def activations(model: ModelConfig, tokens: int, adapter_rank: int | None = None, recompute: bool = False) -> int:
    """Bytes that a backward pass needs of so many tokens: those of all layers, or of one and the inputs of others."""
    d, f, e, k = model.hidden_size, model.intermediate_size, model.num_experts, model.num_experts_per_tok
    keys = d // model.num_attention_heads * (model.num_key_value_heads or model.num_attention_heads)
    if adapter_rank is None:
        layer = (10 + 2 * k) * d + 4 * keys + 3 * k * f
        head, once = 4 * d, d * model.vocab_size  # the head's gradient is computed with its loss
    else:
        layer = (6 + 2 * k) * d + 3 * keys + 4 * k * f + (4 + 2 * k) * adapter_rank
        head, once = 2 * d, 0
    layer += 3 * e + 7 * k + model.num_attention_heads
    count = model.num_hidden_layers
    kept = layer + (count - 1) * d if recompute else count * layer
    return ((kept + head) * tokens + once) * _FP32


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _packed_bytes(pack: str | None, rows: int, columns: int) -> int:
    """Bytes of a packed matrix."""
    assert pack is not None
    kind = make_format(pack)
    if not kind.fits(rows, columns):
        return rows * columns * _FP32
    return sum(_size(shape) * dtype.itemsize for shape, dtype in kind.parts(rows, columns).values())
