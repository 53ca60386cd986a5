"""transformers' model classes of OLMoE, built from the modules of `olmoe.model`.

Names, arguments and outputs are those that transformers documents. Parameters have the names and shapes
of transformers' own classes, so its checkpoint conversion, adapters and sharding plans apply unchanged.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, resolve_hidden_states_indices, selected_hidden_states

from olmoe.fused import FusedDecoderLayer
from olmoe.hf.attention import CachedAttend, RotaryEmbedding, prepare
from olmoe.hf.cache_name import CACHE, EitherNameGenerationMixin, is_paged, one_cache, warns_of_old_name
from olmoe.hf.config import OlmoeConfig, adopt
from olmoe.hf.kernels import KernelBackend
from olmoe.hf.loading import accept_single_experts
from olmoe.hf.lora import route_lora
from olmoe.hf.losses import router_losses, share_of_step
from olmoe.hf.quantization import PackedLoading
from olmoe.hf.switching import SwitchableExperts
from olmoe.model import Attend, Attention, Experts, Linear, RMSNorm, Router
from olmoe.runtime import log


class OlmoeDecoderLayer(GradientCheckpointingLayer, FusedDecoderLayer):
    """The network's block as transformers checkpoints, splits and shards it: outputs are a flat tuple of tensors."""

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x (B, T, D) -> (B, T, D) and the router's logits (B*T, E).

        Flat, because reentrant checkpointing passes gradients to the tensors of a tuple but of nothing nested.
        """
        x, routed = FusedDecoderLayer.forward(self, x, rope, attend)
        return x, routed.logits


class OlmoePreTrainedModel(KernelBackend, SwitchableExperts, PackedLoading, PreTrainedModel):
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
    # What can be asked for and where it arises. `OlmoeModel.forward` collects it itself, without hooks.
    _can_record_outputs = {  # noqa: RUF012  (transformers' protocol)
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": OlmoeDecoderLayer,
        "attentions": Attention,
    }

    def __init__(self, config: OlmoeConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(adopt(config), *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: parameters are named and shaped as in transformers' own classes, so its conversions apply."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """OLMoE's initialisation: matrices truncated normal at 3 sigma, norms 1, biases 0."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding | Router):
            init.trunc_normal_(module.weight, 0.0, std, -3 * std, 3 * std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
            padding = getattr(module, "padding_idx", None)
            if padding is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[padding])
        elif isinstance(module, Experts):
            init.trunc_normal_(module.gate_up_proj, 0.0, std, -3 * std, 3 * std)
            init.trunc_normal_(module.down_proj, 0.0, std, -3 * std, 3 * std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            inv_freq, _ = module.compute(self.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)


class OlmoeModel(OlmoePreTrainedModel):
    """The decoder without a head: token embedding, blocks, final norm."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        network = config.network()
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(OlmoeDecoderLayer(network, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        prepare(self.layers, config)
        self.switch_experts()
        accept_single_experts(self.layers)
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
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if use_cache or cache is not None:
                _warn_once("A cache does not go with gradient checkpointing; continuing without one")
            use_cache, cache = False, None  # the second forward pass would append to it again
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if output_attentions and config._attn_implementation not in ("eager", None):
            _warn_once(
                f"attn_implementation={config._attn_implementation!r} does not return attention probabilities; "
                "use model.set_attn_implementation('eager') with output_attentions=True."
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            if cache_position is not None:
                position_ids = cache_position.unsqueeze(0)
            else:
                seen = 0 if cache is None else cache.get_seq_length()
                position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = attention_mask
        if not is_paged(cache):
            mask = create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
        route_lora(self.layers)
        attend = CachedAttend(config, self.layers, mask, cache, kwargs)
        rope = self.rotary_emb(inputs_embeds, position_ids)
        x, hidden_states, routers = inputs_embeds, [], []
        wanted = _wanted_states(self, output_hidden_states)
        step = None if wanted else attend.step(x, rope, OlmoeDecoderLayer)
        if step is not None:
            x, routers = step[0], [routed.logits for routed in step[1]]
        else:
            for i, layer in enumerate(self.layers):
                hidden_states.append(x if i in wanted else None)
                x, router_logits = layer(x, rope, attend)
                routers.append(router_logits)
        x = self.norm(x)
        hidden_states.append(x if len(self.layers) in wanted else None)
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            **{CACHE: cache},
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(w for w in attend.weights if w is not None) if output_attentions else None,
            router_logits=tuple(routers) if output_router_logits else None,
        )


class OlmoeForCausalLM(OlmoePreTrainedModel, EitherNameGenerationMixin):
    """OLMoE with its language-model head, and transformers' `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' protocol)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

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
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """See transformers' documentation of `OlmoeForCausalLM`. labels (B, T) hold -100 where nothing is learnt.

        `cache` is what transformers calls `past_key_values` from 5.24 on.
        """
        config = self.config
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        auxiliary = output_router_logits
        if self.training and labels is not None and not auxiliary:
            auxiliary = config.router_loss_kind == "per_layer"
            if not auxiliary and config.router_aux_loss_coef > 0:
                _warn_once(
                    f"router_aux_loss_coef is {config.router_aux_loss_coef}, but the auxiliary loss is off, as in "
                    "transformers, because output_router_logits is false; set that to true, or the coefficient to 0."
                )
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
            **kwargs,
        )
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if auxiliary:
            aux_loss, addition = router_losses(config, outputs.router_logits, attention_mask)
            if loss is not None and labels is not None:
                loss = loss + (share_of_step(labels, kwargs) * addition).to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )


class OlmoeForSequenceClassification(GenericForSequenceClassification, OlmoePreTrainedModel):
    """OLMoE with a linear head on the last token of each sequence: classifiers and reward models."""

    def __init__(self, config: OlmoeConfig) -> None:
        OlmoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = OlmoeModel(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @warns_of_old_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """See transformers' documentation of sequence classification. labels (B,), or (B, classes) of several.

        `cache` is what transformers calls `past_key_values` from 5.24 on.
        """
        kept = one_cache(past_key_values, cache)  # by position, which has no name
        return super().forward(
            input_ids, attention_mask, position_ids, kept, inputs_embeds, labels=labels, use_cache=use_cache, **kwargs
        )


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted: the last n (0: all), or those of a 1-D index tensor."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]


def _wanted_states(model: OlmoeModel, output_hidden_states: bool | int | list[int] | None) -> set[int]:
    """Which hidden states to return: all, none, or those of an index or indices, negative ones from the end."""
    count = len(model.layers) + 1
    chosen = selected_hidden_states(output_hidden_states)
    if chosen is None:
        return set(range(count)) if output_hidden_states else set()
    return resolve_hidden_states_indices(model, chosen, count)


def _warn_once(message: str) -> None:
    """Log a warning, once a process; a compiled graph has no log."""
    if not is_compiling():
        _warn(message)


@functools.cache
def _warn(message: str) -> None:
    log.warning(message)
