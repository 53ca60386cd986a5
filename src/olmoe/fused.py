"""Decoder layers computed by the C++ kernels in one or two calls, in place of some thirty operations.

One where `attend` says that attention is over a KV cache of ours (it has a method `cached`, see `CachedTokens`), else
one before and one after attention, which is then the caller's. `all_layers` computes all of a decoder in one call.

`fuse` changes the class of a network's decoder layers, whose modules, parameters and results stay what they are. A
fused layer decides at every call whether the kernels fit: inference on CPU tensors, plain or block-packed matrices,
no hooks, adapters or replaced modules inside. Otherwise, and for training, it is the layer that it was.

Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.model import (
    Attend,
    Attention,
    Decoder,
    DecoderLayer,
    Experts,
    Linear,
    RMSNorm,
    Router,
    RouterOutput,
    SparseMoeBlock,
)
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import FEW_ROWS, CachedTokens, many_rows
from olmoe.ops.dispatch import AUTO
from olmoe.quant import PackedExperts, PackedLinear
from olmoe.runtime import log_once

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")  # of the layer, then of attention
_MIXTURE = ("gate", "experts")
# Rows that one call for all layers may take: a step of decoding, for many sequences too, but no long prompt.
STEP_ROWS = 64
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = (
    "forward", "backend", "eps", "top_k", "norm_topk_prob", "head_dim", "clip_qkv", "activation", "formats", "shapes",
)  # fmt: skip
# What the kernels stand for; anything else, a subclass too, computes in its own way.
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "self_attn": (Attention,), "mlp": (SparseMoeBlock,), "gate": (Router,), "experts": (Experts, PackedExperts),
    **dict.fromkeys(_PROJECTIONS, (Linear, PackedLinear)), **dict.fromkeys(_NORMS, (RMSNorm,)),
}  # fmt: skip


class FusedDecoderLayer(DecoderLayer):
    """`DecoderLayer` through the C++ kernels where they fit; see the module's docstring."""

    _prepared: _Prepared | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, RouterOutput]:
        """See `DecoderLayer.forward`."""
        prepared = self._fitting(x, rope)
        if prepared is None:
            return super().forward(x, rope, attend)
        lead, d, head_dim = x.shape[:-1], x.shape[-1], prepared.head_dim
        width, e, top_k = prepared.kv_width, prepared.experts, prepared.top_k
        rows_ND = extension.wide(x).view(-1, d)
        n = len(rows_ND)
        shape = (*lead, head_dim // 2)
        cos, sin = (extension.wide(t if t.shape == shape else t.expand(shape)) for t in rope)
        y, logits = torch.empty(n, d), torch.empty(n, e)
        weights, ids = torch.empty(n, top_k), torch.empty(n, top_k, dtype=torch.long)
        outputs = y.data_ptr(), logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        routed = RouterOutput(logits, weights, ids)
        if (cached := getattr(attend, "cached", None)) is not None:
            cache: CachedTokens = cached(self.self_attn.layer)
            cache.check(n, width // head_dim, head_dim)
            prepared.kernel.forward(
                rows_ND.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                cache.counts,
                cache.lengths,
                *cache.addresses(),
                *outputs,
            )
            return y.to(x.dtype).view(x.shape), routed
        q, k, v = torch.empty(n, d), torch.empty(n, width), torch.empty(n, width)
        prepared.kernel.attention_inputs(
            rows_ND.data_ptr(), cos.data_ptr(), sin.data_ptr(), n, q.data_ptr(), k.data_ptr(), v.data_ptr()
        )
        q, k, v = (t.to(x.dtype).view(*lead, -1, head_dim) for t in (q, k, v))
        attended = attend(q, k, v, self.self_attn.layer)
        assert attended.numel() == n * d
        if attended.requires_grad:  # through cached keys and values: prefixes that are trained
            x = x + self.self_attn.o_proj(attended.reshape(x.shape))
            out, routed = self.mlp(self.post_attention_layernorm(x))
            return x + out, routed
        attended = extension.wide(attended)
        prepared.kernel.attention_output(rows_ND.data_ptr(), attended.data_ptr(), n, *outputs)
        return y.to(x.dtype).view(x.shape), routed

    def _fitting(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> _Prepared | None:
        """The kernels' view of this layer, made anew if something in it changed; None where they do not fit."""
        if not _inputs_fit(x, rope):
            return None
        prepared = self.current(x)
        if prepared is not None:
            prepared.refresh()
        return prepared

    def current(self, x: Tensor) -> _Prepared | None:
        """The kernels' view of this layer as it is now; None where the kernels do not fit it, or inputs like `x`."""
        prepared = self._prepared
        if prepared is None or not prepared.still():
            prepared = _prepare(self)
            object.__setattr__(self, "_prepared", prepared)  # not a module, parameter or buffer
        if prepared.kernel is None or x.shape[-1] != prepared.hidden or x.dtype != prepared.dtype:
            return None
        few = prepared.packed or prepared.named or x.numel() <= FEW_ROWS * prepared.hidden
        if not few and not many_rows(prepared.dtype):
            return None  # torch's products are faster
        return None if torch.is_grad_enabled() and prepared.needs_gradients() else prepared

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own kernels."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}


class FusedDecoder(Decoder):
    """`Decoder` whose layers, where all of them fit the kernels and a KV cache of ours, are computed in one call.

    For steps of decoding: between two layers of one sequence, what Python looks at has left the caches for weights, and
    a tenth of the step was spent on that. Prompts go layer by layer, so that they can be interrupted.
    """

    def blocks(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, list[RouterOutput]]:
        """See `Decoder.blocks`."""
        cached = getattr(attend, "cached", None)
        if cached is None or x.numel() > STEP_ROWS * x.shape[-1]:
            return super().blocks(x, rope, attend)
        layers: list[Any] = list(self.layers)
        whole = all_layers(
            layers, FusedDecoderLayer, x, rope, lambda: [cached(layer.self_attn.layer) for layer in layers]
        )
        return whole or super().blocks(x, rope, attend)


def all_layers(
    layers: list[Any],
    kind: type,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    reserve: Callable[[], list[CachedTokens] | None],
) -> tuple[Tensor, list[RouterOutput]] | None:
    """All `layers` in one call of the kernels: x (..., D) -> (..., D) and what each router decided.

    `reserve` gives room for the new tokens in the cache of each layer, or None; it is called if all else fits. Layers
    of another type than `kind` might do something else. None, and nothing done, where anything does not fit.
    """
    if not layers or not _inputs_fit(x, rope):
        return None
    stack: list[_Prepared] = []
    for layer in layers:
        alone = type(layer) is kind and "forward" not in vars(layer)
        prepared = layer.current(x) if alone and not any(getattr(layer, hooks) for hooks in _HOOKS) else None
        if prepared is None or (stack and prepared.form() != stack[0].form()):
            return None
        stack.append(prepared)
    first, caches = stack[0], reserve()
    if caches is None:
        return None
    count, shape = len(stack), (*x.shape[:-1], first.head_dim // 2)
    rows_ND = extension.wide(x).view(-1, first.hidden)
    n = len(rows_ND)
    cos, sin = (extension.wide(t.expand(shape)) for t in rope)
    y, logits = torch.empty(n, first.hidden), torch.empty(count, n, first.experts)
    weights, ids = torch.empty(count, n, first.top_k), torch.empty(count, n, first.top_k, dtype=torch.long)
    for prepared, cache in zip(stack, caches, strict=True):
        prepared.refresh()
        cache.check(n, first.kv_width // first.head_dim, first.head_dim)
        assert cache.like(caches[0])
    extension.kernels().Layer.forward_all(
        [prepared.kernel for prepared in stack],
        rows_ND.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        caches[0].counts,
        caches[0].lengths,
        [cache.keys.data_ptr() for cache in caches],
        [cache.values.data_ptr() for cache in caches],
        *caches[0].addresses()[2:],
        y.data_ptr(),
        logits.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
    )
    routers = [RouterOutput(*routed) for routed in zip(logits, weights, ids, strict=True)]
    return y.to(x.dtype).view(x.shape), routers


def _inputs_fit(x: Tensor, rope: tuple[Tensor, Tensor]) -> bool:
    """Whether the kernels may run at all, on such inputs; they then have as many threads as torch."""
    if extension.unsupported(x, *rope) is not None or x.numel() == 0 or _has_any_global_hook():
        return False
    extension.kernels()
    return True


class _Prepared:
    """The kernels' `Layer` for one state of a layer, with what it points to; None where the kernels do not fit."""

    kernel: Any = None
    packed = named = False
    dtype = torch.float32
    hidden = head_dim = kv_width = experts = top_k = 0

    def __init__(self, layer: DecoderLayer) -> None:
        """Remember all that the kernels' view depends on."""
        self._kept: list[Tensor] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        attention, moe = layer._modules["self_attn"], layer._modules["mlp"]
        owners = (
            (layer, ("self_attn", "mlp", *_NORMS[:2])),
            (attention, (*_PROJECTIONS, *_NORMS[2:])),
            (moe, _MIXTURE),
        )
        # Where modules, settings and parameters are found, and what was found there. `is` is enough to compare.
        self._places: list[tuple[dict[str, Any], str]] = []
        self._modules: list[nn.Module] = []
        self._parameters: list[Tensor] = []
        for owner, names in owners:
            for name in names:
                module = None if owner is None else owner._modules.get(name)
                if owner is not None and module is not None:
                    self._places.append((owner._modules, name))
                    self._modules.append(module)
                    self._places += ((vars(module), s) for s in (*_HOOKS[:2], *_SETTINGS) if s in vars(module))
                    self._places += ((module._parameters, p) for p in module._parameters)
                    self._parameters += (p for p in module._parameters.values() if p is not None)
        self._found = [mapping.get(name) for mapping, name in self._places]
        self._states = list(map(vars, self._modules))
        self._lengths = list(map(len, self._states))  # other settings are there, or gone
        self._types = list(map(type, self._modules))
        self._hooks = [getattr(module, hooks) for module in self._modules for hooks in _HOOKS]
        self._hooked = any(self._hooks)
        self._layout = self._where()

    def _where(self) -> list[tuple[object, ...]]:
        """Where and how parameters lie: an assignment of `data` changes neither the parameter nor its version, and an
        address may be used again, for values of another dtype or for a part of the old ones.
        """  # fmt: skip
        return [(p.data_ptr(), p.dtype, p.shape, p.is_contiguous()) for p in self._parameters]

    def still(self) -> bool:
        """Whether the layer is what it was; asked at every call, so written to be quick."""
        try:
            return (
                all(map(is_, [mapping[name] for mapping, name in self._places], self._found))
                and list(map(type, self._modules)) == self._types
                and list(map(len, self._states)) == self._lengths
                and any(self._hooks) == self._hooked
                and self._where() == self._layout
            )
        except KeyError:
            return False

    def form(self) -> tuple[object, ...]:
        """What layers of one stack must have alike."""
        return self.hidden, self.dtype, self.head_dim, self.kv_width, self.experts, self.top_k

    def needs_gradients(self) -> bool:
        """Whether any parameter does."""
        return any(p.requires_grad for p in self._parameters)

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
        types = _TYPES.get(name.rpartition(".")[2], ())
        if name and (type(module) not in types or "forward" in vars(module)):
            return f"modules of type {type(module).__name__} in the place of ours"
        if any(getattr(module, hooks) for hooks in _HOOKS if name):
            return "modules with hooks"
        if getattr(module, "backend", AUTO) not in (AUTO, "cpu"):
            return f"the backend {module.backend}"
    attention, router, moe = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    if moe.activation is not F.silu:
        return "experts with another activation than silu"
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
    f = _shape(moe, "down_proj")[-1]
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (width, d), "self_attn.v_proj": (width, d),
        "self_attn.o_proj": (d, d), "self_attn.q_norm": (d,), "self_attn.k_norm": (width,),
        "post_attention_layernorm": (d,), "mlp.gate": (e, d),
    }  # fmt: skip
    fits = all(_shape(layer.get_submodule(name), "weight") == shape for name, shape in shapes.items())
    fits &= _shape(moe, "gate_up_proj") == (e, 2 * f, d) and _shape(moe, "down_proj") == (e, d, f)
    for name, rows in zip(_PROJECTIONS, (d, width, width, d), strict=True):
        bias = getattr(attention, name).bias
        fits &= bias is None or bias.shape == (rows,)
    fits &= d % attention.head_dim == 0 and width % attention.head_dim == 0 and 0 < router.top_k <= e
    return None if fits and d % width == 0 else "parameters whose shapes do not belong together"


def _prepare(layer: DecoderLayer) -> _Prepared:
    """The kernels' view of `layer` as it is now."""
    prepared = _Prepared(layer)
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
        _shape(moe, "down_proj")[-1],
    )
    return prepared


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
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


def fuse(root: nn.Module) -> None:
    """Let the decoder layers under `root`, and decoders as a whole, use the C++ kernels where these fit."""
    for module in root.modules():
        if type(module) is DecoderLayer:
            module.__class__ = FusedDecoderLayer
        elif type(module) is Decoder:
            module.__class__ = FusedDecoder


def unfuse(root: nn.Module) -> None:
    """Make fused layers and decoders plain ones again."""
    for module in root.modules():
        if type(module) is FusedDecoder:
            module.__class__ = Decoder  # type: ignore[assignment]
        if type(module) is FusedDecoderLayer:
            module.__dict__.pop("_prepared", None)
            module.__class__ = DecoderLayer  # type: ignore[assignment]


def require(backend: str) -> None:
    """Raise unless `backend` is one of auto, cpu, torch and reference, and can run here."""
    if backend not in (AUTO, "cpu", "torch", "reference"):
        raise UserError(f"Unknown backend {backend!r}; choose one of auto, cpu, torch, reference.")
    if backend == "cpu" and (reason := extension.unavailable()) is not None:
        raise BackendUnavailableError(f"Backend 'cpu' cannot run here: {reason}; use the backend torch.")
