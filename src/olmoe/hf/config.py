"""`OlmoeConfig`: transformers' own configuration of OLMoE, checked, and translated for our network."""

from __future__ import annotations

from typing import Any

from transformers.models.olmoe.configuration_olmoe import OlmoeConfig as TransformersOlmoeConfig

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError, shown
from olmoe.hf.view import view_as
from olmoe.io.hub import folder_or_id

MODEL_TYPE = "olmoe"
ROUTER_LOSSES = ("pooled", "per_layer")


class OlmoeConfig(TransformersOlmoeConfig):
    """The configuration of an OLMoE model, with the parameters and defaults that transformers documents.

    It is transformers' class, so files and objects pass both ways unchanged. In addition, values that no
    OLMoE network can have are refused on construction with one sentence (`ConfigError`).

    Two optional parameters choose the auxiliary losses; they are written to `config.json` only if given:

    - `router_loss`: "pooled" (transformers' loss, the default) or "per_layer" (what OLMoE was trained with,
      see `olmoe.model.router_losses`; then part of every training loss).
    - `router_z_loss_coef`: weight of the router z-loss (OLMoE: 0.001), with "per_layer" only.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill defaults as transformers does, then check that a network of this shape exists."""
        super().__post_init__(**kwargs)
        self.network()
        if self.router_loss_kind not in ROUTER_LOSSES:
            raise ConfigError(
                f"router_loss must be one of {', '.join(ROUTER_LOSSES)}, not {shown(self.router_loss_kind)}."
            )
        z = self.router_z_coefficient
        if not isinstance(z, int | float) or isinstance(z, bool) or not 0 <= z < float("inf"):
            raise ConfigError(f"router_z_loss_coef must be a number of at least 0, not {shown(z)}.")
        if z > 0 and self.router_loss_kind != "per_layer":
            raise ConfigError(f"router_z_loss_coef {z} needs router_loss='per_layer'; set that, or leave it out.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """transformers' hook that finds and reads `config.json`; "olmoe-tiny" is the shipped model's."""
        return super().get_config_dict(folder_or_id(pretrained_model_name_or_path), **kwargs)

    @property
    def router_loss_kind(self) -> Any:
        """`router_loss`, or its default."""
        return getattr(self, "router_loss", ROUTER_LOSSES[0])

    @property
    def router_z_coefficient(self) -> Any:
        """`router_z_loss_coef`, or its default."""
        return getattr(self, "router_z_loss_coef", 0.0)

    def network(self) -> ModelConfig:
        """The architecture in the form that `olmoe.model` takes.

        RoPE is left at its default: the angles are computed by transformers' own rules, which
        support more kinds of scaling.
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
            pad_token_id=None,  # negative ids have a special meaning in transformers
            tie_word_embeddings=bool(self.tie_word_embeddings),
            attention_bias=self.attention_bias,
            attention_dropout=self.attention_dropout,
            clip_qkv=self.clip_qkv,
            num_experts_per_tok=self.num_experts_per_tok,
            num_experts=self.num_experts,
            router_aux_loss_coef=self.router_aux_loss_coef,
            norm_topk_prob=self.norm_topk_prob,
        )


class FromConfig:
    """An attribute of a module with its configuration's value, until it is set on the module itself.

    transformers copies such values when it builds a module and reads the copy; ours also follow the configuration.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        return vars(module).get(self._name, getattr(module.config, self._name))

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value


def adopt(config: Any) -> OlmoeConfig:
    """`config` as an `OlmoeConfig`: itself, or a view of transformers' own OLMoE configuration, checked.

    A view, because transformers relies on changes to the object that it passed reaching `model.config`. Raises
    `ConfigError` for the configuration of another kind of model.
    """
    if isinstance(config, OlmoeConfig):
        return config
    if type(config) is not TransformersOlmoeConfig:
        raise ConfigError(f"An OLMoE model needs an OlmoeConfig, not a {type(config).__name__}; build one first.")
    OlmoeConfig.network(config)
    return view_as(OlmoeConfig, config)
