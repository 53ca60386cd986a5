"""The kernels' view of one decoder layer: where its weights lie, and whether the kernels can compute it at all.

Shapes legend: D hidden, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe.fused.watch import Watch, has_hooks
from olmoe.model import Attention, DecoderLayer, Experts, Linear, RMSNorm, Router, SparseMoeBlock, network_type
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import FEW_ROWS, many_rows
from olmoe.ops.dispatch import AUTO
from olmoe.quant import PackedExperts, PackedLinear
from olmoe.runtime import log_once

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")  # of the layer, then of attention
_MIXTURE = ("gate", "experts")
_ACTIVATION = "act_fn"
_SETTINGS = (
    "forward", "backend", "eps", "top_k", "norm_topk_prob", "head_dim", "clip_qkv", "act_fn", "formats", "shapes",
)  # fmt: skip
# What the kernels stand for; anything else, a subclass too, computes in its own way.
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "self_attn": (Attention,), "mlp": (SparseMoeBlock,), "gate": (Router,), "experts": (Experts, PackedExperts),
    **dict.fromkeys(_PROJECTIONS, (Linear, PackedLinear)), **dict.fromkeys(_NORMS, (RMSNorm,)),
}  # fmt: skip


class PreparedLayer:
    """The kernels' `Layer` for one state of a layer, with what it points to; None where the kernels do not fit."""

    kernel: Any = None
    packed = named = False
    dtype = torch.float32
    hidden = head_dim = kv_width = experts = top_k = 0

    def __init__(self, layer: DecoderLayer) -> None:
        """Remember all that the kernels' view depends on."""
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.watch = Watch()
        attention, moe = layer._modules["self_attn"], layer._modules["mlp"]
        owners = (
            (layer, ("self_attn", "mlp", *_NORMS[:2])),
            (attention, (*_PROJECTIONS, *_NORMS[2:])),
            (moe, _MIXTURE),
            (None if moe is None else moe._modules.get("experts"), (_ACTIVATION,)),  # where it is a module
        )
        for owner, names in owners:
            for name in names:
                module = None if owner is None else owner._modules.get(name)
                if owner is not None and module is not None:
                    self.watch.child(owner, name)
                    self.watch.module(module, _SETTINGS)
        self.watch.complete()

    def form(self) -> tuple[object, ...]:
        """What layers of one stack must have alike."""
        return self.hidden, self.dtype, self.head_dim, self.kv_width, self.experts, self.top_k

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.kv_width // self.head_dim

    def fits_rows(self, rows: int) -> bool:
        """Whether the kernels compute `rows` tokens at least as fast as torch."""
        return self.packed or self.named or rows <= FEW_ROWS or many_rows(self.dtype)

    def needs_gradients(self) -> bool:
        """Whether any parameter does."""
        return any(p.requires_grad for p in self.watch.parameters)

    @property
    def copied(self) -> bool:
        """Whether there is anything to `refresh`."""
        return bool(self._copies)

    def wide(self, t: Tensor) -> Tensor:
        """`t` in fp32: its own memory, or a copy that follows it."""
        source = t.detach()
        if t.dtype == torch.float32:
            self._kept.append(source)
            return source
        with torch.inference_mode(False):  # so that it can be written in any mode
            copy = torch.empty(t.shape, dtype=torch.float32)
        self._copies.append((copy, source))
        return copy

    def refresh(self) -> None:
        """Copy again: nothing tells of every change in place (`p.data.mul_(2)` does not count as a version)."""
        for copy, source in self._copies:
            copy.copy_(source)


def _unfit(layer: DecoderLayer) -> str | None:
    """Why the kernels cannot compute `layer`, or None. Checked when something in it changed."""
    for name, module in layer.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf == _ACTIVATION:
            continue  # see `Experts.activation`
        if name and (network_type(module) not in _TYPES.get(leaf, ()) or "forward" in vars(module)):
            return f"modules of type {type(module).__name__} in the place of ours"
        if name and has_hooks(module):
            return "modules with hooks"
        if getattr(module, "backend", AUTO) not in (AUTO, "cpu"):
            return f"the backend {module.backend}"
    attention, router, moe = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    if moe.activation is not F.silu:
        return "experts with another activation than silu"
    if attention.clip_qkv is not None and not attention.clip_qkv > 0:
        return f"the clip_qkv {attention.clip_qkv}"
    if len({norm.eps for norm in norms}) > 1:
        return "norms that differ in their epsilon"
    for p in layer.parameters():
        if type(p) is not nn.Parameter or p.device.type != "cpu" or not p.is_contiguous() or p.numel() == 0:
            return "parameters that are distributed, not contiguous or not on the CPU"
        if p.dtype != torch.uint8 and p.dtype not in extension.FLOAT_TYPES:
            return f"parameters of {p.dtype}"
    for module in (*(getattr(attention, name) for name in _PROJECTIONS), moe):
        for format in getattr(module, "formats", {}).values():
            if format.name not in extension.PACKED_TYPES:
                return f"matrices in the format {format.name}"
    d, width, e = layer.input_layernorm.weight.numel(), attention.k_norm.weight.numel(), router.weight.shape[0]
    f = matrix_shape(moe, "down_proj")[-1]
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (width, d), "self_attn.v_proj": (width, d),
        "self_attn.o_proj": (d, d), "self_attn.q_norm": (d,), "self_attn.k_norm": (width,),
        "post_attention_layernorm": (d,), "mlp.gate": (e, d),
    }  # fmt: skip
    fits = all(matrix_shape(layer.get_submodule(name), "weight") == shape for name, shape in shapes.items())
    fits &= matrix_shape(moe, "gate_up_proj") == (e, 2 * f, d) and matrix_shape(moe, "down_proj") == (e, d, f)
    for name, rows in zip(_PROJECTIONS, (d, width, width, d), strict=True):
        bias = getattr(attention, name).bias
        fits &= bias is None or bias.shape == (rows,)
    fits &= d % attention.head_dim == 0 and width % attention.head_dim == 0 and 0 < router.top_k <= e
    return None if fits and d % width == 0 else "parameters whose shapes do not belong together"


def prepare(layer: DecoderLayer) -> PreparedLayer:
    """The kernels' view of `layer` as it is now."""
    prepared = PreparedLayer(layer)
    if (reason := _unfit(layer)) is not None:
        log_once(f"layers run on torch: {reason}")
        return prepared
    attention, router, moe = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    projections = [getattr(attention, name) for name in _PROJECTIONS]
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    hidden, head_dim = layer.input_layernorm.weight.shape[0], attention.head_dim
    prepared.hidden, prepared.dtype = hidden, layer.input_layernorm.weight.dtype
    prepared.head_dim, prepared.kv_width = head_dim, attention.k_norm.weight.shape[0]
    prepared.experts, prepared.top_k = router.weight.shape[0], router.top_k
    prepared.packed = any(isinstance(m, PackedLinear | PackedExperts) for m in (*projections, moe))
    prepared.named = any(getattr(module, "backend", AUTO) == "cpu" for module in layer.modules())
    prepared.kernel = extension.kernels().Layer(
        hidden,
        hidden // head_dim,
        prepared.kv_width // head_dim,
        head_dim,
        prepared.top_k,
        layer.input_layernorm.eps,
        attention.clip_qkv or 0.0,
        router.norm_topk_prob,
        [kernel_matrix(module, "weight", prepared.dtype) for module in projections],
        [0 if module.bias is None else prepared.wide(module.bias).data_ptr() for module in projections],
        [prepared.wide(norm.weight).data_ptr() for norm in norms],
        extension.float_matrix(router.weight),  # whatever its dtype: products and sums are fp32, as the policy has it
        kernel_matrix(moe, "gate_up_proj", prepared.dtype),
        kernel_matrix(moe, "down_proj", prepared.dtype),
        prepared.experts,
        matrix_shape(moe, "down_proj")[-1],
    )
    return prepared


def matrix_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a matrix, or stack of matrices, of a plain or packed module, or of a vector."""
    shapes = getattr(module, "shapes", {})
    weight = getattr(module, name)
    return (*weight.shape[: weight.dim() - 2], *shapes[name]) if name in shapes else tuple(weight.shape)


def kernel_matrix(module: nn.Module, name: str, inputs: torch.dtype) -> Any:
    """A matrix, or stack of matrices, of a plain or packed module for the kernels, and for hidden states of a dtype."""
    weight = getattr(module, name)
    formats = getattr(module, "formats", {})
    if name not in formats:
        return extension.float_matrix(weight, inputs)
    rows, columns = module.shapes[name]  # type: ignore[index]
    return extension.packed_matrix(weight, formats[name].name, rows, columns)
