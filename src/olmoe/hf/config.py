"""`OlmoeConfig`: transformers' own configuration of OLMoE, checked, and translated for our network."""

from __future__ import annotations

from typing import Any

from transformers.models.olmoe.configuration_olmoe import OlmoeConfig as TransformersOlmoeConfig

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError


class OlmoeConfig(TransformersOlmoeConfig):
    """The configuration of an OLMoE model, with the parameters and defaults that transformers documents.

    It is transformers' class, so files and objects pass both ways unchanged. In addition, values that no
    OLMoE network can have are refused on construction with one sentence (`ConfigError`).
    """

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill defaults as transformers does, then check that a network of this shape exists."""
        super().__post_init__(**kwargs)
        self.network()

    def network(self) -> ModelConfig:
        """The architecture as `olmoe.model` takes it.

        RoPE is left at its default there: this face computes its angles by transformers' own rules, which
        know more kinds of scaling.
        """
        head_dim = getattr(self, "head_dim", None)
        if head_dim is not None and head_dim * self.num_attention_heads != self.hidden_size:
            raise ConfigError(
                f"head_dim {head_dim} times num_attention_heads {self.num_attention_heads} is not hidden_size "
                f"{self.hidden_size}, as OLMoE's QK-norm needs."
            )
        eos = self.eos_token_id
        return ModelConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            hidden_act=self.hidden_act,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            rms_norm_eps=self.rms_norm_eps,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=None,  # transformers gives negative ids a meaning of its own
            tie_word_embeddings=bool(self.tie_word_embeddings),
            attention_bias=self.attention_bias,
            attention_dropout=self.attention_dropout,
            clip_qkv=self.clip_qkv,
            num_experts_per_tok=self.num_experts_per_tok,
            num_experts=self.num_experts,
            router_aux_loss_coef=self.router_aux_loss_coef,
            norm_topk_prob=self.norm_topk_prob,
        )
