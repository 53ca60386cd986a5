"""transformers' model classes of OLMoE, built from the modules of `olmoe.model`.

Names, arguments and outputs are those that transformers documents. Parameters have the names and shapes
of transformers' own classes, so its checkpoint conversion, adapters and sharding plans apply unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from olmoe.hf.attention import CachedAttend, RotaryEmbedding, prepare
from olmoe.hf.config import OlmoeConfig
from olmoe.hf.losses import pooled_load_balancing
from olmoe.model import DecoderLayer, Experts, Linear, RMSNorm, Router
from olmoe.runtime import log


class OlmoePreTrainedModel(PreTrainedModel):
    """What all OLMoE models share: configuration class, initialisation, and what transformers may do with them."""

    config: OlmoeConfig
    config_class = OlmoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

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
        self.layers = nn.ModuleList(DecoderLayer(network, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        prepare(self.layers, config)
        self.gradient_checkpointing = False
        self.post_init()

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
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """See transformers' documentation of `OlmoeModel`. input_ids (B, T) or inputs_embeds (B, T, D)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        config = self.config
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and checkpointing:
            log.warning("use_cache=True does not go with gradient checkpointing; continuing without a cache")
            use_cache = False
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        if output_attentions and config._attn_implementation not in ("eager", None):
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} does not return attention probabilities; "
                "use model.set_attn_implementation('eager') with output_attentions=True."
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            if cache_position is not None:
                position_ids = cache_position.unsqueeze(0)
            else:
                seen = 0 if past_key_values is None else past_key_values.get_seq_length()
                position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        attend = CachedAttend(config, self.layers, mask, past_key_values, kwargs)
        rope = self.rotary_emb(inputs_embeds, position_ids)
        x, hidden_states, routers = inputs_embeds, [], []
        for layer in self.layers:
            hidden_states.append(x)
            if checkpointing:
                x, routed = self._gradient_checkpointing_func(layer.__call__, x, rope, attend)
            else:
                x, routed = layer(x, rope, attend)
            routers.append(routed.logits)
        x = self.norm(x)
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attend.weights) if output_attentions else None,
            router_logits=tuple(routers) if output_router_logits else None,
        )


class OlmoeForCausalLM(OlmoePreTrainedModel, GenerationMixin):
    """OLMoE with its language-model head, and transformers' `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' protocol)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__(config)
        self.model = OlmoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """See transformers' documentation of `OlmoeForCausalLM`. labels (B, T) hold -100 where nothing is learnt."""
        config = self.config
        output_router_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            cache_position=cache_position,
            **kwargs,
        )
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            aux_loss = pooled_load_balancing(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
            )
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class OlmoeForSequenceClassification(GenericForSequenceClassification, OlmoePreTrainedModel):
    """OLMoE with a linear head on the last token of each sequence: classifiers and reward models."""

    def __init__(self, config: OlmoeConfig) -> None:
        OlmoePreTrainedModel.__init__(self, config)  # type: ignore[call-arg]  # transformers counts as Any
        self.num_labels = config.num_labels
        self.model = OlmoeModel(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted: the last n (0: all), or those of a 1-D index tensor."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]
