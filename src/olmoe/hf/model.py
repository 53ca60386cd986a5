"""transformers' model classes for OLMoE, built from the modules of `olmoe.model`.

Names, arguments and outputs are those that transformers documents. Parameters have the names and shapes
of transformers' own classes, so its checkpoint conversion, adapters and sharding plans apply unchanged. Modules also
take, return and have the same attributes: hooks and tools written for transformers' classes work on these.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from olmoe.hf.adapted import settle
from olmoe.hf.attention import CachedAttend, OlmoeAttention, OlmoeRMSNorm, OlmoeRotaryEmbedding, rope_of, step
from olmoe.hf.cache_name import CACHE, EitherNameGenerationMixin, one_cache, warns_of_old_name
from olmoe.hf.config import FromConfig, OlmoeConfig, adopt
from olmoe.hf.experts import OlmoeExperts
from olmoe.hf.initialization import Initialization
from olmoe.hf.inputs import causal_mask, kept, positions_of
from olmoe.hf.kernel_layer import KernelDecoderLayer
from olmoe.hf.kernels import KernelBackend
from olmoe.hf.lora import route_lora
from olmoe.hf.losses import WholeStep, router_losses, share_of_step
from olmoe.hf.quantization import PackedLoading
from olmoe.hf.recording import (
    ATTENTIONS,
    INPUTS,
    ROUTERS,
    CheckpointsWithin,
    checkpointed,
    note,
    note_routing,
    recording,
    wanted_states,
)
from olmoe.hf.router_policy import LayerPolicy, RouterPolicies, with_policy_of_now
from olmoe.hf.switching import SwitchableExperts
from olmoe.model import Linear, Router, SparseMoeBlock
from olmoe.runner.compile import CompiledLayer
from olmoe.runtime import log


class OlmoeTopKRouter(Router):
    """The network's router under transformers' signature."""

    computes_as = Router

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(OlmoeConfig.network(config))
        self.num_experts, self.hidden_dim = config.num_experts, config.hidden_size
        self.policy: LayerPolicy | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """hidden_states (..., D) -> logits (N, E), weights and expert ids (N, K).

        A policy changes weights and ids; the logits are the router's own.
        """
        policy = None if self.policy is None else self.policy.on(hidden_states.device)
        # A plain tuple: hooks rebuild one from its type, which fails for a named tuple.
        logits_NE, weights_NK, expert_ids_NK = super().forward(hidden_states.reshape(-1, self.hidden_dim), policy)
        return logits_NE, weights_NK, expert_ids_NK


class OlmoeSparseMoeBlock(SparseMoeBlock):
    """The network's mixture of experts, which here returns only hidden states."""

    computes_as = SparseMoeBlock

    def __init__(self, config: OlmoeConfig) -> None:
        nn.Module.__init__(self)
        self.gate = OlmoeTopKRouter(config)
        self.experts = OlmoeExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (..., D) -> (..., D)."""
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = self.gate(x_ND)
        note_routing([routed])
        _, weights_NK, expert_ids_NK = routed
        return self.experts(x_ND, expert_ids_NK, weights_NK).view(hidden_states.shape)


class OlmoeDecoderLayer(CheckpointsWithin, GradientCheckpointingLayer, KernelDecoderLayer):
    """The network's layer under transformers' signature. Its parts are in transformers' order, since optimizers number
    parameters.
    """  # fmt: skip

    def __init__(self, config: OlmoeConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = OlmoeAttention(config, layer_idx)
        self.mlp = OlmoeSparseMoeBlock(config)
        self.input_layernorm = OlmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OlmoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, T, D), position_embeddings (cos, sin) each (B or 1, T, Dh) -> (B, T, D)."""
        note(INPUTS, hidden_states)
        cache = one_cache(kwargs.pop("past_key_values", None), cache)
        options = kwargs | {"position_ids": position_ids, "use_cache": use_cache}
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            options["use_cache"] = False  # the second pass would append to the cache again
            block = functools.partial(self._block, position_embeddings, attention_mask, None, options)
            checkpoint: Any = self._gradient_checkpointing_func
            return checkpointed(checkpoint, with_policy_of_now(self, block), hidden_states)
        return self._block(position_embeddings, attention_mask, cache, options, hidden_states)

    def _block(self, position_embeddings: Any, mask: Any, cache: Any, options: dict[str, Any], x: Tensor) -> Tensor:
        attend = CachedAttend(self.self_attn, mask, cache, options)
        done = self.through_kernels(x, rope_of(position_embeddings), attend)
        if done is not None:
            note(ATTENTIONS, attend.weights)
            if done[1] is not None:
                note_routing([done[1]])
            return done[0]
        attended, weights = self.self_attn(
            hidden_states=self.input_layernorm(x),
            attention_mask=mask,
            **{CACHE: cache},
            position_embeddings=position_embeddings,
            **options,
        )
        note(ATTENTIONS, weights)
        return self.after_attention(x + attended)[0]

    def after_attention(self, x: Tensor, policy: None = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        """See `DecoderLayer.after_attention`; the router itself notes what it decides."""
        return x + self.mlp(self.post_attention_layernorm(x)), None

    def current(self, x: Tensor) -> CompiledLayer | None:
        """See `KernelDecoderLayer.current`; what transformers reads from the configuration may have changed."""
        attention, experts = self._modules.get("self_attn"), getattr(self._modules.get("mlp"), "experts", None)
        if isinstance(attention, OlmoeAttention):
            attention.follow_config()
        if isinstance(experts, OlmoeExperts) and not experts.computes_itself():
            return None
        return super().current(x)


class OlmoePreTrainedModel(
    Initialization, KernelBackend, RouterPolicies, SwitchableExperts, PackedLoading, PreTrainedModel
):
    """What all OLMoE models share: configuration class, initialisation, and what transformers may do with them."""

    config: OlmoeConfig
    config_class = OlmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("OlmoeDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values", "cache")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # What can be requested, and the modules it comes from. `OlmoeModel.forward` collects it itself, without hooks.
    _can_record_outputs = {  # noqa: RUF012  (transformers' protocol)
        "router_logits": OutputRecorder(OlmoeTopKRouter, index=0),
        "hidden_states": OlmoeDecoderLayer,
        "attentions": OlmoeAttention,
    }

    def __init__(self, config: OlmoeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(adopt(config), *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: parameters are named and shaped as in transformers' own classes, so its conversions apply."""
        return False


class OlmoeModel(OlmoePreTrainedModel):
    """The decoder without a head: token embedding, layers, final norm."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(OlmoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = OlmoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = OlmoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @warns_of_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_logits: bool | None = None,
        cache_position: Tensor | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """See transformers' documentation of `OlmoeModel`. input_ids (B, T) or inputs_embeds (B, T, D).

        `cache` is what transformers calls `past_key_values` from 5.24 on.
        """
        cache = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        config = self.config
        if hasattr(config, "is_causal"):
            kwargs.setdefault("is_causal", config.is_causal)
        if use_cache is None:  # a training step does not need a cache
            use_cache = config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if use_cache or cache is not None:
                _warn_once("A cache cannot be used with gradient checkpointing; continuing without one")
            use_cache, cache = False, None  # the second forward pass would append to it again
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if output_attentions and config._attn_implementation not in ("eager", None):
            _warn_once(
                f"attn_implementation={config._attn_implementation!r} does not return attention probabilities; "
                "use model.set_attn_implementation('eager') with output_attentions=True."
            )
        made = bool(use_cache) and cache is None
        if made:
            cache = DynamicCache(config=config)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        given = position_ids is not None
        position_ids = positions_of(x, position_ids, cache_position, cache)
        mask = causal_mask(config, x, attention_mask, cache, position_ids, kwargs, made, given)
        if not is_compiling():
            settle(self)
        route_lora(self.layers)
        rope = self.rotary_emb(x, position_ids)
        layers = list(self.layers)[: config.num_hidden_layers]
        wanted = wanted_states(self, output_hidden_states, len(layers) + 1)
        asked = {ROUTERS: output_router_logits, ATTENTIONS: output_attentions, INPUTS: wanted}
        with recording(name for name, chosen in asked.items() if chosen) as notes:
            states = [x]
            done = None if wanted else step(layers, x, rope, mask, cache, kwargs, OlmoeDecoderLayer)
            if done is not None:
                x, routers = done
                note_routing(routers)
            else:
                for layer in layers:
                    x = layer(
                        x,
                        position_embeddings=rope,
                        attention_mask=mask,
                        position_ids=position_ids,
                        **{CACHE: cache},
                        use_cache=use_cache,
                        **kwargs,
                    )
                    states.append(x)
        states[:1] = notes.get(INPUTS, [])[:1] or states[:1]
        x = self.norm(x)
        if getattr(config, "tie_last_hidden_states", None) is not False:
            states[-1] = x
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: cache},
            hidden_states=tuple(s if i in wanted else None for i, s in enumerate(states)) if wanted else None,
            attentions=tuple(notes[ATTENTIONS]) if output_attentions else None,
            router_logits=tuple(notes[ROUTERS]) if output_router_logits else None,
        )


class OlmoeForCausalLM(OlmoePreTrainedModel, EitherNameGenerationMixin):
    """OLMoE with its language-model head, and transformers' `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' protocol)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    router_aux_loss_coef, num_experts, num_experts_per_tok = FromConfig(), FromConfig(), FromConfig()
    whole_step: WholeStep | None = None  # what load balancing looks at in training, if not at each batch by itself

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.model = OlmoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @warns_of_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_router_logits: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | slice | Tensor = 0,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """See transformers' documentation of `OlmoeForCausalLM`. labels (B, T) are -100 for tokens without a loss.

        `cache` is what transformers calls `past_key_values` from 5.24 on.
        """
        config = self.config
        if not is_compiling():
            settle(self)
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        auxiliary = output_router_logits
        if self.training and labels is not None and not auxiliary:
            auxiliary = config.router_loss_kind == "per_layer"
            if not auxiliary and self.router_aux_loss_coef > 0:
                _warn_once(
                    f"router_aux_loss_coef is {self.router_aux_loss_coef}, but the auxiliary loss is off, as in "
                    "transformers, because output_router_logits is false; set that to true, or the coefficient to 0."
                )
        if labels is not None and use_cache is None:
            use_cache = False  # nothing continues after a loss
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: one_cache(past_key_values, cache)},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=auxiliary,
            cache_position=cache_position,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(kept(outputs.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if auxiliary:
            step = self.whole_step if self.training else None
            aux_loss, addition = router_losses(self, outputs.router_logits, attention_mask, step)
            if loss is not None and labels is not None:
                loss = loss + (share_of_step(labels, kwargs, step) * addition).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


def _warn_once(message: str) -> None:
    """Log a warning, once per process; not while a graph is compiled."""
    if not is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    log.warning(message)
