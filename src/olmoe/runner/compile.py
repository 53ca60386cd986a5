"""From modules of the network to the kernels' view of them: addresses of weights, or why the kernels cannot be used.

Shapes legend: D hidden, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe.model import (
    Attention,
    CausalLM,
    Decoder,
    DecoderLayer,
    Experts,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    Router,
    SparseMoeBlock,
    network_type,
)
from olmoe.ops.cpu import extension
from olmoe.ops.dispatch import AUTO
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from olmoe.runner.base import Unfit
from olmoe.runtime import outside_inference_mode

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # the others play no part in inference
# The modules that the kernels implement; anything else, subclasses included, may compute something different.
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "self_attn": (Attention,), "mlp": (SparseMoeBlock,), "gate": (Router,),
    "experts": (Experts, PackedExperts), **dict.fromkeys(PROJECTIONS, (Linear, PackedLinear)),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"), (RMSNorm,)),
}  # fmt: skip


class CompiledLayer:
    """The kernels' view of one decoder layer, and what it points to. Raises `Unfit` if they cannot compute it."""

    hidden: int
    head_dim: int
    kv_heads: int
    experts: int
    top_k: int
    dtype: torch.dtype

    def __init__(self, layer: DecoderLayer) -> None:
        """Compile the layer's parts; its own class, and whether it has hooks, is for the caller to check."""
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if path and name != "act_fn":  # see `Experts.activation`
                require_unmodified(module, _TYPES.get(name, ()))
        _require_backend(layer)
        attention, router, moe = layer.self_attn, layer.mlp.gate, layer.mlp.experts
        norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
        _require_alike(layer)
        self.kept: list[Tensor] = []
        self.copies: list[tuple[Tensor, Tensor]] = []  # (fp32 copy, the weight in half precision)
        self.hidden, self.head_dim = layer.input_layernorm.weight.shape[0], attention.head_dim
        self.kv_heads = attention.k_norm.weight.shape[0] // self.head_dim
        self.experts, self.top_k = router.weight.shape[0], router.top_k
        self.dtype = layer.input_layernorm.weight.dtype
        projections = [getattr(attention, name) for name in PROJECTIONS]
        self.kernel = extension.kernels().Layer(
            self.hidden,
            self.hidden // self.head_dim,
            self.kv_heads,
            self.head_dim,
            self.top_k,
            layer.input_layernorm.eps,
            attention.clip_qkv or 0.0,
            router.norm_topk_prob,
            [self.matrix(module, "weight", self.dtype) for module in projections],
            [0 if module.bias is None else self.vector(module.bias) for module in projections],
            [self.vector(norm.weight) for norm in norms],
            # Whatever its dtype: the router's products and sums are in fp32.
            self.matrix(router, "weight", torch.float32),
            self.matrix(moe, "gate_up_proj", self.dtype),
            self.matrix(moe, "down_proj", self.dtype),
            self.experts,
            matrix_shape(moe, "down_proj")[-1],
        )

    def signature(self) -> tuple[object, ...]:
        """What all layers of a decoder must have in common."""
        return self.hidden, self.dtype, self.head_dim, self.kv_heads, self.experts, self.top_k

    def matrix(self, module: nn.Module, name: str, inputs: torch.dtype) -> Any:
        """A matrix, or stack of matrices, for the kernels; it is kept alive."""
        self.kept.append(getattr(module, name).detach())
        return kernel_matrix(module, name, inputs)

    def vector(self, weight: Tensor) -> int:
        """The address of a vector in fp32, its own memory or a copy; it is kept alive."""
        source = weight.detach()
        if weight.dtype != torch.float32:
            with outside_inference_mode():  # so that it can be written to in any mode
                copy = source.float()
            self.copies.append((copy, source))
            source = copy
        self.kept.append(source)
        return source.data_ptr()

    def refresh(self) -> None:
        """Copy again, since weights may have changed in place, which cannot be detected (`p.data.mul_(2)`)."""
        for copy, source in self.copies:
            copy.copy_(source)


class CompiledDecoder:
    """The kernels' view of a whole language model. Raises `Unfit` if they cannot compute it."""

    layers: list[CompiledLayer]
    kernel: Any

    def __init__(self, model: CausalLM) -> None:
        decoder = model.model
        head: Any = model.lm_head
        around: tuple[tuple[nn.Module, tuple[type[nn.Module], ...]], ...] = (
            (decoder.embed_tokens, (nn.Embedding, PackedEmbedding)),
            (decoder.norm, (RMSNorm,)),
            (decoder.rotary, (RotaryEmbedding,)),
            (head, (Linear, PackedLinear)),
            (decoder, (Decoder,)),
            (model, (CausalLM,)),
        )
        for module, types in around:
            require_unmodified(module, types)
        if decoder.embed_tokens.max_norm is not None or head.bias is not None:
            raise Unfit("embeddings with a largest norm, or an output head with a bias")
        layers: list[Any] = list(decoder.layers)
        if not layers:
            raise Unfit("a model without layers")
        for layer in layers:
            require_unmodified(layer, (DecoderLayer,))
        self.layers = [CompiledLayer(layer) for layer in layers]
        first = self.layers[0]
        if any(layer.signature() != first.signature() for layer in self.layers):
            raise Unfit("layers that differ in their shapes or dtypes")
        if any(matrix_shape(m, "weight")[1:] != (first.hidden,) for m in (decoder.embed_tokens, head)):
            raise Unfit("embeddings or an output head of another width than the layers")
        embedding = first.matrix(decoder.embed_tokens, "weight", torch.float32)
        self.embeddings: int = embedding.rows
        self.vocab_size: int = matrix_shape(head, "weight")[0]
        self.kernel = extension.kernels().Decoder(
            [layer.kernel for layer in self.layers],
            embedding,
            first.vector(decoder.norm.weight),
            decoder.norm.eps,
            first.matrix(head, "weight", first.dtype),
        )


def require_unmodified(module: nn.Module, types: tuple[type[nn.Module], ...]) -> None:
    """Raise `Unfit` unless `module` computes what one of `types` does, on the backend of the kernels."""
    if network_type(module) not in types or "forward" in vars(module):
        raise Unfit(f"modules of type {type(module).__name__} in the place of ours")
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise Unfit("modules with hooks")
    _require_backend(module)
    if isinstance(module, PackedModule):
        for format in module.formats.values():
            if format.name not in extension.packed_formats():
                raise Unfit(f"matrices in the format {format.name}")
    for p in module.parameters(recurse=False):
        if type(p) is not nn.Parameter or p.device.type != "cpu" or not p.is_contiguous() or p.numel() == 0:
            raise Unfit("parameters that are distributed, not contiguous or not on the CPU")
        if p.dtype != torch.uint8 and p.dtype not in extension.FLOAT_TYPES:
            raise Unfit(f"parameters of {p.dtype}")


def _require_backend(module: nn.Module) -> None:
    backend = vars(module).get("backend", AUTO)
    if backend not in (AUTO, "cpu"):
        raise Unfit(f"the backend {backend}")


def _require_alike(layer: DecoderLayer) -> None:
    """Raise `Unfit` unless the settings and shapes of a layer fit together."""
    attention, router, moe = layer.self_attn, layer.mlp.gate, layer.mlp.experts
    norms = (layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm)
    if moe.activation is not F.silu:
        raise Unfit("experts with another activation than silu")
    if attention.clip_qkv is not None and not attention.clip_qkv > 0:
        raise Unfit(f"the clip_qkv {attention.clip_qkv}")
    if len({norm.eps for norm in norms}) > 1:
        raise Unfit("norms that differ in their epsilon")
    d, width, e = layer.input_layernorm.weight.numel(), attention.k_norm.weight.numel(), router.weight.shape[0]
    f = matrix_shape(moe, "down_proj")[-1]
    shapes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (width, d), "self_attn.v_proj": (width, d),
        "self_attn.o_proj": (d, d), "self_attn.q_norm": (d,), "self_attn.k_norm": (width,),
        "post_attention_layernorm": (d,), "mlp.gate": (e, d),
    }  # fmt: skip
    fits = all(matrix_shape(layer.get_submodule(name), "weight") == shape for name, shape in shapes.items())
    fits &= matrix_shape(moe, "gate_up_proj") == (e, 2 * f, d) and matrix_shape(moe, "down_proj") == (e, d, f)
    for name, rows in zip(PROJECTIONS, (d, width, width, d), strict=True):
        bias = getattr(attention, name).bias
        fits &= bias is None or bias.shape == (rows,)
    fits &= d % attention.head_dim == 0 and width % attention.head_dim == 0 and 0 < router.top_k <= e
    if not fits or d % width:
        raise Unfit("parameters whose shapes do not belong together")


def matrix_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a matrix, or stack of matrices, of a plain or packed module, or of a vector."""
    weight = getattr(module, name)
    if isinstance(module, PackedModule) and name in module.shapes:
        return (*weight.shape[: weight.dim() - 2], *module.shapes[name])
    return tuple(weight.shape)


def kernel_matrix(module: nn.Module, name: str, inputs: torch.dtype) -> Any:
    """A matrix, or stack of matrices, of a plain or packed module for the kernels, and for hidden states of a dtype."""
    weight = getattr(module, name)
    if isinstance(module, PackedModule) and name in module.formats:
        return extension.packed_matrix(weight, module.formats[name].name, *module.shapes[name])
    return extension.float_matrix(weight, inputs)
