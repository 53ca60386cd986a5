"""Estimates the memory that a rank needs to train a model: what is held between steps, and what a step adds.

It counts what grows with the model: weights, gradients, AdamW's moments, what a layer or the head gathers from the
other ranks, and the activations that the backward pass needs of the tokens that a rank computes at a time, in fp32 and
with the C++ kernels. It does not count the interpreter and torch (about 0.4 GB), the data, and buffers of single
operations.

Shapes legend: D hidden, G*Dh width of keys, F expert width, E experts, K experts per token, V vocabulary, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from olmoe.adapters.adapter import targeted
from olmoe.config import ModelConfig
from olmoe.quant.formats import make_format
from olmoe.train.parallel import is_gathered_at_once
from olmoe.weights.names import EMBEDDING, EXPERTS, HEAD, parameter_shapes

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
    frozen_bytes: int = _FP32,
    recompute: bool = False,
) -> Memory:
    """What one of `ranks` needs if it computes `tokens` tokens at a time.

    Without `adapter_rank` all weights are trained. `pack` is the format of the frozen weights beside adapters, which
    every rank holds whole; everything else is sharded. `frozen_bytes` is the size of a frozen weight in the checkpoint
    (2 for bf16): beside adapters, matrices keep it, but for plain ones that are sharded.
    """
    shapes = parameter_shapes(model)
    packed = {n: s for n, s in shapes.items() if pack and (".self_attn." in n or ".experts." in n) and len(s) > 1}
    kept = adapter_rank is not None and (pack is not None or ranks == 1)

    def bytes_of(name: str) -> int:
        matrix = name in (EMBEDDING, HEAD) or EXPERTS in name or (".self_attn." in name and len(shapes[name]) == 2)
        return _size(shapes[name]) * (frozen_bytes if kept and matrix else _FP32)

    plain = sum(bytes_of(name) for name in shapes if name not in packed)
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
        layer = sum(bytes_of(name) for name in shapes if layers in name and name not in packed)
        head = sum(bytes_of(name) for name in shapes if ".layers." not in name)
        # Gradients of trained weights take as much, until they are summed over ranks.
        gathered = (layer + head) * (2 if adapter_rank is None else 1)
    return Memory(
        weights=plain // ranks + whole,
        gathered=gathered,
        gradients=trained // ranks,
        optimizer=2 * trained // ranks,
        activations=activations(model, tokens, adapter_rank, recompute),
    )


def activations(model: ModelConfig, tokens: int, adapter_rank: int | None = None, recompute: bool = False) -> int:
    """Bytes kept for the backward pass of `tokens` tokens: of all layers, or of one and the inputs of the others."""
    d, f, e, k = model.hidden_size, model.intermediate_size, model.num_experts, model.num_experts_per_tok
    keys = d // model.num_attention_heads * (model.num_key_value_heads or model.num_attention_heads)
    layer = 7 * d + 3 * keys + 3 * e + 3 * k + model.num_attention_heads + 1
    head, once = 2 * d + d // model.num_attention_heads + 2, 0
    if adapter_rank is None:
        layer += 2 * k * f  # adapted experts are computed again from their inputs
        head, once = head + d + 2, d * model.vocab_size  # the head's gradient is computed with its loss
    else:
        layer += 4 * adapter_rank
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
