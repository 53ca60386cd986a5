"""The OLMoE network, whole, with Hugging Face parameter names.

It knows neither transformers, nor caches, nor distribution, nor quantized formats: what differs between
uses is passed in.

- Attention is a callable `attend(q, k, v, layer) -> out` from the caller, who owns masks and caches.
- Modules take any leading dimensions: (B, T, D) in training, flat (N, D) in the engine.
- A quantized or fused layer is another module with the call signature of `Linear` or `Experts`, swapped
  in from outside.
- What the routers decided is returned, layer by layer, never kept aside.

Forward pass of a layer (pre-norm; arXiv 2409.02060, released training code):

    h   = x + o_proj(attend(RoPE(q_norm(q_proj(x'))), RoPE(k_norm(k_proj(x'))), v_proj(x')))    x' = RMSNorm(x)
    out = h + sum over the top-k experts e of p_e * down_e(act(gate_e h') * up_e h')            h' = RMSNorm(h)

with p = softmax(router(h')) over all experts in fp32, not renormalised over the chosen ones.

Shapes legend: B batch, T sequence, N = B*T tokens, D hidden, H heads, G KV heads, Dh head dim,
E experts, K experts per token, F expert width, V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmoe import ops
from olmoe.config import ModelConfig, RopeParameters
from olmoe.errors import ConfigError
from olmoe.ops.activation import plain_activation
from olmoe.ops.types import RoutePolicy

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class Attend(Protocol):
    """Causal attention over whatever keys the caller keeps for `layer`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, /) -> Tensor:
        """q (..., H, Dh), k and v (..., G, Dh) of the current tokens -> (..., H, Dh)."""
        ...


class RouterOutput(NamedTuple):
    """What one layer's router decided for N tokens (leading dimensions flattened)."""

    logits: Tensor  # (N, E), fp32
    weights: Tensor  # (N, K), fp32, the probabilities of the chosen experts
    expert_ids: Tensor  # (N, K), by falling probability


class Output(NamedTuple):
    """What the network returns: `hidden` (..., D) after the final norm, and each layer's `RouterOutput`."""

    hidden: Tensor
    routers: Sequence[RouterOutput]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation with this Hugging Face name. Raises `ConfigError` for others."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is unknown; choose one of {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]


def network_type(module: nn.Module) -> type[nn.Module]:
    """The class that `module` computes like: its own, or the class of this file that it names as `computes_as`.

    So code that looks for these modules finds them behind other signatures, but never somebody's own subclass.
    """
    kind: type[nn.Module] = vars(type(module)).get("computes_as", type(module))
    return kind


class Linear(nn.Linear):
    """`nn.Linear` through `ops`, so that half precision is fast on every CPU."""

    backend = ops.AUTO
    products: torch.dtype | None = None  # see `set_products`

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return ops.linear(x, self.weight, self.bias, products=self.products, backend=self.backend)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight and fp32 statistics."""

    backend = ops.AUTO

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return ops.rms_norm(x, self.weight, self.eps, backend=self.backend)


class RotaryEmbedding(nn.Module):
    """Angles of rotary position embeddings, in fp32. It is stateless: every call computes them again."""

    def __init__(self, rope: RopeParameters, head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.rope, self.head_dim, self.max_positions = rope, head_dim, max_position_embeddings

    def forward(self, positions: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """positions (...) -> cos, sin (..., Dh/2).

        `length` matters only for dynamic scaling: the length of the sequence each position belongs to,
        broadcastable to `positions`; by default one more than the largest position of the call.
        """
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32) / self.head_dim
        base: Tensor | float = self.rope.rope_theta
        if self.rope.rope_type == "dynamic":
            length = positions.max() + 1 if length is None else length
            stretched = length.clamp(min=self.max_positions).float().unsqueeze(-1)  # (..., 1)
            factor = self.rope.factor
            growth = factor * stretched / self.max_positions - (factor - 1)
            base = base * growth ** (self.head_dim / (self.head_dim - 2))
        inverse_frequency = 1.0 / base**exponent  # (Dh/2,) or (..., Dh/2)
        if self.rope.rope_type == "linear":
            inverse_frequency = inverse_frequency / self.rope.factor
        angle = positions.unsqueeze(-1).float() * inverse_frequency
        return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Multi-head or grouped-query attention with QK-norm over the full projection width, before the head split."""

    backend = ops.AUTO

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.clip_qkv = layer, config.head_dim, config.clip_qkv
        kv_width, bias = config.kv_heads * config.head_dim, config.attention_bias
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv_width, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (..., D), rope (cos, sin) each (..., Dh/2) -> (..., D)."""
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        if self.clip_qkv is not None:
            # After QK-norm, as in transformers (the training code clipped before it, with clipping off).
            q, k, v = (t.clamp(-self.clip_qkv, self.clip_qkv) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (..., H or G, Dh)
        q, k = (ops.apply_rope(t, *rope, backend=self.backend) for t in (q, k))
        return self.o_proj(attend(q, k, v, self.layer).flatten(-2))


class Router(nn.Module):
    """Scores every expert for every token and chooses the top-k, in fp32 whatever the model's dtype."""

    backend = ops.AUTO

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x_ND: Tensor, policy: RoutePolicy | None = None) -> RouterOutput:
        """x (N, D) -> logits (N, E), weights and expert ids (N, K)."""
        with ops.without_autocast(x_ND):
            logits_NE = ops.linear(x_ND.float(), self.weight.float(), backend="torch")
        chosen = ops.route(logits_NE, self.top_k, self.norm_topk_prob, policy, backend=self.backend)
        return RouterOutput(logits_NE, *chosen)


class Experts(nn.Module):
    """The SwiGLU experts of one layer as two stacked weights, computed for the chosen tokens only."""

    backend = ops.AUTO
    products: torch.dtype | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, d, f = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts, self.hidden_dim, self.intermediate_dim = e, d, f
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * f, d))  # gate rows first, then up
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        self.act_fn: Callable[[Tensor], Tensor] = activation(config.hidden_act)

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """`act_fn`, or the plain function behind it, which kernels recognise."""
        return plain_activation(self.act_fn)

    @activation.setter
    def activation(self, value: Callable[[Tensor], Tensor]) -> None:
        self.act_fn = value

    def forward(self, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """x (N, D), expert ids and weights (N, K) -> (N, D)."""
        return ops.moe(
            x_ND,
            weights_NK,
            expert_ids_NK,
            self.gate_up_proj,
            self.down_proj,
            self.activation,
            products=self.products,
            backend=self.backend,
        )


class SparseMoeBlock(nn.Module):
    """Router and experts: the dropless mixture that takes the place of a dense model's MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, policy: RoutePolicy | None = None) -> tuple[Tensor, RouterOutput]:
        """x (..., D) -> (..., D) and what the router decided for the flattened tokens."""
        x_ND = x.reshape(-1, x.shape[-1])
        routed = self.gate(x_ND) if policy is None else self.gate(x_ND, policy)
        # A policy may choose fewer experts for some tokens: -1, with a weight of 0.
        expert_ids = routed.expert_ids if policy is None else routed.expert_ids.clamp(min=0)
        return self.experts(x_ND, expert_ids, routed.weights).view(x.shape), routed


class DecoderLayer(nn.Module):
    """One layer: attention, then the mixture of experts, each with an RMSNorm before it and a residual around it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoeBlock(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, policy: RoutePolicy | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """x (..., D) -> (..., D) and what the router decided, by `policy` if there is one."""
        return self.after_attention(x + self.self_attn(self.input_layernorm(x), rope, attend), policy)

    def after_attention(self, x: Tensor, policy: RoutePolicy | None = None) -> tuple[Tensor, RouterOutput]:
        """The second half of `forward`, applied to the output of the first."""
        normed = self.post_attention_layernorm(x)
        y, routed = self.mlp(normed) if policy is None else self.mlp(normed, policy)
        return x + y, routed


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything but the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, config.max_position_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        length: Tensor | None = None,
        policies: Sequence[RoutePolicy] | None = None,
    ) -> Output:
        """input_ids and positions (...), see `RotaryEmbedding.forward` for `length` -> hidden states (..., D).

        `policies`, one per layer, change what the routers choose.
        """
        x, rope, routers = self.embed_tokens(input_ids), self.rotary(positions, length), []
        for number, layer in enumerate(self.layers):
            x, routed = layer(x, rope, attend) if policies is None else layer(x, rope, attend, policies[number])
            routers.append(routed)
        return Output(self.norm(x), routers)


class CausalLM(nn.Module):
    """The OLMoE language model: a `Decoder` under `model`, and `lm_head`.

    `forward` returns hidden states; `logits` turns those that matter into scores. They are separate
    because generation needs the last token's logits only, and training never needs them all at once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        length: Tensor | None = None,
        policies: Sequence[RoutePolicy] | None = None,
    ) -> Output:
        """See `Decoder.forward`."""
        return self.model(input_ids, positions, attend, length, policies)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> (..., V)."""
        return self.lm_head(hidden)


def set_backend(model: nn.Module, backend: str) -> None:
    """Make every operation of `model` use `backend` ("auto", or a name of `olmoe.ops.dispatch.PRIORITY`)."""
    for module in model.modules():
        if hasattr(module, "backend"):
            setattr(module, "backend", backend)  # noqa: B010  (mypy: every module has attributes of any type)


def set_products(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Let products with weights round their inputs to `dtype`: experts, projections and output head, not routers.

    Weights, gradients and everything between products keep their dtype. Attention is the caller's (`causal_attend`).
    """
    for module in model.modules():
        if isinstance(module, Linear | Experts):
            module.products = dtype


def causal_attend(q: Tensor, k: Tensor, v: Tensor, layer: int, products: torch.dtype | None = None) -> Tensor:
    """`attend` for whole sequences without a cache: q (B, T, H, Dh), k, v (B, T, G, Dh) -> (B, T, H, Dh).

    `products` is what factors are rounded to, as in `set_products`.
    """
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return ops.attention(*heads_first, causal=True, products=products).transpose(1, 2)
