"""Decoder layers computed by the C++ kernels in two calls, in place of some thirty operations.

`fuse` changes the class of a network's decoder layers, whose modules, parameters and results stay what they are. A
fused layer decides at every call whether the kernels fit: inference on CPU tensors, plain or block-packed matrices,
no hooks, adapters or replaced modules inside. Otherwise, and for training, it is the layer that it was.

Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.model import Attend, Attention, DecoderLayer, Experts, Linear, RMSNorm, Router, RouterOutput, SparseMoeBlock
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import FEW_ROWS
from olmoe.ops.dispatch import AUTO
from olmoe.quant import PackedExperts, PackedLinear
from olmoe.runtime import log_once

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FusedDecoderLayer(DecoderLayer):
    """`DecoderLayer` through the C++ kernels where they fit; see the module's docstring."""

    _prepared: tuple[tuple[Tensor, ...], tuple[int, ...], Any, bool] | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, RouterOutput]:
        """See `DecoderLayer.forward`."""
        kernel = self._kernel(x)
        if kernel is None:
            return super().forward(x, rope, attend)
        attention = self.self_attn
        lead, d, head_dim = x.shape[:-1], x.shape[-1], attention.head_dim
        width = attention.k_norm.weight.shape[0]
        rows_ND = extension.wide(x).view(-1, d)
        n = len(rows_ND)
        shape = (*lead, head_dim // 2)
        cos, sin = (t if t.shape == shape and t.is_contiguous() else t.expand(shape).contiguous() for t in rope)
        q, k, v = torch.empty(n, d), torch.empty(n, width), torch.empty(n, width)
        kernel.attention_inputs(
            rows_ND.data_ptr(), cos.data_ptr(), sin.data_ptr(), n, q.data_ptr(), k.data_ptr(), v.data_ptr()
        )
        q, k, v = (t.to(x.dtype).view(*lead, -1, head_dim) for t in (q, k, v))
        attended = extension.wide(attend(q, k, v, attention.layer))
        assert attended.numel() == n * d
        e, top_k = self.mlp.gate.weight.shape[0], self.mlp.gate.top_k
        y, logits = torch.empty(n, d), torch.empty(n, e)
        weights, ids = torch.empty(n, top_k), torch.empty(n, top_k, dtype=torch.long)
        kernel.attention_output(
            rows_ND.data_ptr(),
            attended.data_ptr(),
            n,
            y.data_ptr(),
            logits.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
        )
        return y.to(x.dtype).view(x.shape), RouterOutput(logits, weights, ids)

    def _kernel(self, x: Tensor) -> Any:
        """The kernels' view of this layer, made anew if a parameter moved; None where they do not fit."""
        n = x.numel() // x.shape[-1]
        if n == 0 or extension.unsupported(x) is not None:
            return None
        tensors = self._tensors()
        if tensors is None:
            return None
        addresses = tuple(t.data_ptr() for t in tensors)
        prepared = self._prepared
        if prepared is None or prepared[1] != addresses or any(a is not b for a, b in zip(tensors, prepared[0])):
            if (reason := _unfit(self, tensors)) is not None:
                log_once(f"layers run on torch: {reason}")
                return None
            prepared = (tensors, addresses, *_prepare(self))
            object.__setattr__(self, "_prepared", prepared)  # not a module, parameter or buffer
        packed = prepared[3]
        if not packed and (n > FEW_ROWS or x.dtype != self.input_layernorm.weight.dtype):
            return None  # torch's blocked products are faster on many rows
        extension.kernels()  # follows torch's number of threads
        return prepared[2]

    def _tensors(self) -> tuple[Tensor, ...] | None:
        """All parameters in a fixed order, None if a module is not what the kernels stand for."""
        found: list[Tensor] = []
        attention, moe = self._modules["self_attn"], self._modules["mlp"]
        if type(attention) is not Attention or type(moe) is not SparseMoeBlock:
            return None
        modules = (
            *((attention._modules[name], (Linear, PackedLinear)) for name in _PROJECTIONS),
            (attention._modules["q_norm"], (RMSNorm,)),
            (attention._modules["k_norm"], (RMSNorm,)),
            (self._modules["input_layernorm"], (RMSNorm,)),
            (self._modules["post_attention_layernorm"], (RMSNorm,)),
            (moe._modules["gate"], (Router,)),
            (moe._modules["experts"], (Experts, PackedExperts)),
            (attention, (Attention,)),
            (moe, (SparseMoeBlock,)),
        )
        for module, types in modules:
            state = module.__dict__
            if type(module) not in types or "forward" in state or any(state[hooks] for hooks in _HOOKS):
                return None
            if state.get("backend", AUTO) not in (AUTO, "cpu"):
                return None
            found.extend(p for p in state["_parameters"].values() if p is not None)
        return tuple(found)


def _unfit(layer: DecoderLayer, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels cannot compute `layer`, or None. Checked when its parameters change."""
    moe = layer.mlp.experts
    if moe.activation is not F.silu:
        return "experts with another activation than silu"
    for tensor in tensors:
        if type(tensor) is not nn.Parameter or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return "parameters that are distributed, not contiguous or not on the CPU"
        if tensor.dtype != torch.uint8 and tensor.dtype not in extension.FLOAT_TYPES:
            return f"parameters of {tensor.dtype}"
    for module in (*(getattr(layer.self_attn, name) for name in _PROJECTIONS), moe):
        for format in getattr(module, "formats", {}).values():
            if format.name not in extension.PACKED_TYPES:
                return f"matrices in the format {format.name}"
    return None


def _prepare(layer: DecoderLayer) -> tuple[Any, bool]:
    """The kernels' `Layer` with what it points to kept alive, and whether any matrix is packed."""
    attention, router, moe = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    kept: list[Tensor] = []

    def vector(t: Tensor | None) -> int:
        if t is None:
            return 0
        kept.append(extension.wide(t))
        return int(kept[-1].data_ptr())

    projections = [getattr(attention, name) for name in _PROJECTIONS]
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    kept.append(extension.wide(router.weight))  # in fp32, as the policy has it: a bf16 product would round its input
    matrices = [_matrix(module, "weight") for module in projections]
    experts = [_matrix(moe, name) for name in ("gate_up_proj", "down_proj")]
    shapes = moe.shapes if isinstance(moe, PackedExperts) else {}
    width = shapes["down_proj"][1] if "down_proj" in shapes else moe.down_proj.shape[-1]
    hidden, head_dim = layer.input_layernorm.weight.shape[0], attention.head_dim
    kernel = extension.kernels().Layer(
        hidden,
        hidden // head_dim,
        attention.k_norm.weight.shape[0] // head_dim,
        head_dim,
        router.top_k,
        layer.input_layernorm.eps,
        attention.clip_qkv or 0.0,
        router.norm_topk_prob,
        matrices,
        [vector(module.bias) for module in projections],
        [vector(norm.weight) for norm in norms],
        extension.float_matrix(kept[0]),
        *experts,
        router.weight.shape[0],
        width,
    )
    return _Kept(kernel, kept), any(isinstance(m, PackedLinear | PackedExperts) for m in (*projections, moe))


class _Kept:
    """A kernels' `Layer` together with the tensors that it points to."""

    def __init__(self, kernel: Any, tensors: list[Tensor]) -> None:
        self.attention_inputs, self.attention_output = kernel.attention_inputs, kernel.attention_output
        self._alive = (kernel, tensors)


def _matrix(module: nn.Module, name: str) -> Any:
    """A matrix, or stack of matrices, of a plain or packed module for the kernels."""
    weight = getattr(module, name)
    formats = getattr(module, "formats", {})
    if name not in formats:
        return extension.float_matrix(weight)
    rows, columns = module.shapes[name]  # type: ignore[index]
    return extension.packed_matrix(weight, formats[name].name, rows, columns)


def fuse(root: nn.Module) -> None:
    """Let the decoder layers under `root` use the C++ kernels where these fit."""
    for module in root.modules():
        if type(module) is DecoderLayer:
            module.__class__ = FusedDecoderLayer


def unfuse(root: nn.Module) -> None:
    """Make fused layers plain ones again."""
    for module in root.modules():
        if type(module) is FusedDecoderLayer:
            module.__dict__.pop("_prepared", None)
            module.__class__ = DecoderLayer  # type: ignore[assignment]


def require(backend: str) -> None:
    """Raise unless `backend` is one of auto, cpu, torch and reference, and can run here."""
    if backend not in (AUTO, "cpu", "torch", "reference"):
        raise UserError(f"Unknown backend {backend!r}; choose one of auto, cpu, torch, reference.")
    if backend == "cpu" and (reason := extension.unavailable()) is not None:
        raise BackendUnavailableError(f"Backend 'cpu' cannot run here: {reason}; use the backend torch.")
