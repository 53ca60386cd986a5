"""Dense models as OLMoE with one expert: a folder of Hugging Face's `olmo` layout (OLMo-1B), as a `WeightSource`.

OLMo differs from OLMoE in two ways besides its dense MLP. It normalises with a LayerNorm without weights, which
subtracts the mean before it divides by the root mean square. Weights that write to the residual stream are therefore
read without their mean over the stream's width: the mean of the stream is then always zero, and an RMSNorm of weight
one gives the same numbers. And OLMo does not normalise queries and keys. An RMSNorm divides them by their root mean
square, which differs from token to token; the mean of that, measured on text, becomes its weight, so that attention
scores keep their scale. That is the only change that does not preserve the function.

Shapes legend: D hidden, F width of the dense MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olmoe.config import ModelConfig, read_object
from olmoe.errors import CheckpointError, ConfigError, shown
from olmoe.io.targets import some
from olmoe.model import CausalLM, causal_attend
from olmoe.model.network import Attention
from olmoe.runtime import inference_mode
from olmoe.weights.hf_folder import FLOAT_DTYPES, open_file, read_headers
from olmoe.weights.names import EMBEDDING, HEAD
from olmoe.weights.source import load_model, texts_of

MODEL_TYPE = "olmo"
_NORM_EPSILON = 1e-5  # of OLMo's LayerNorm; its config.json has no key for it
# What transformers assumes if config.json says nothing.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "eos_token_id": 50279,
}
# Parameters of a layer that have the same name in the file.
_SAME = tuple(f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias"))
_WRITES_TO_STREAM = ("self_attn.o_proj.weight", "self_attn.o_proj.bias")


class OlmoFolder:
    """The OLMo in a folder, read matrix by matrix as an OLMoE with one expert."""

    def __init__(self, folder: Path) -> None:
        """Read configuration and headers. Raises `ConfigError` or `CheckpointError` if it is not an OLMo."""
        raw = read_object(folder / "config.json")
        if raw.get("model_type") != MODEL_TYPE:
            raise ConfigError(
                f"{folder} has the model type {shown(raw.get('model_type'))}; what can be made sparse is an OLMo "
                f"({MODEL_TYPE!r}, such as OLMo-1B-hf), or an OLMoE with one expert."
            )
        self.config = _sparse_config(raw)
        self._folder, self._stored = folder, read_headers(folder)
        self._qk_norms: dict[str, float] = {}
        self._check()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`; all in fp32, since some weights are computed."""
        if parameter == EMBEDDING:
            return _centred(self._tensor(EMBEDDING), dim=1)
        if parameter == HEAD:
            return self._tensor(HEAD)
        if parameter == "model.norm.weight":
            return torch.ones(self.config.hidden_size)
        prefix, name = _split(parameter)
        if name in _SAME:
            value = self._tensor(parameter)
            return _centred(value, dim=0) if name in _WRITES_TO_STREAM else value
        if name.endswith("norm.weight"):
            kv_width = self.config.kv_heads * self.config.head_dim
            width = kv_width if name == "self_attn.k_norm.weight" else self.config.hidden_size
            return torch.full((width,), self._qk_norms.get(parameter, 1.0))
        if name == "mlp.gate.weight":
            return torch.zeros(1, self.config.hidden_size)
        if name == "mlp.experts.gate_up_proj":
            return torch.cat([self._tensor(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up")])
        assert name == "mlp.experts.down_proj"
        return _centred(self._tensor(f"{prefix}mlp.down_proj.weight"), dim=0)

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return texts_of(self._folder)

    def dense_model(self) -> CausalLM:
        """The original OLMo, in fp32: queries and keys are not normalised."""
        model = load_model(self, torch.float32)
        for attention in _attentions(model):
            for name in ("q_norm", "k_norm"):
                setattr(attention, name, nn.Identity())
        return model

    @inference_mode
    def fit_norms(self, token_ids: list[int], window: int) -> None:
        """Measure the size of queries and keys on text; from then on it is read as their norms' weights."""
        model = self.dense_model()
        sums: dict[str, list[Tensor]] = {}
        hooks = [
            getattr(attention, f"{kind}_proj").register_forward_hook(
                lambda _module, _inputs, output, name=f"model.layers.{i}.self_attn.{kind}_norm.weight": sums.setdefault(
                    name, []
                ).append(output.float().square().mean(dim=-1).sqrt().flatten())
            )
            for i, attention in enumerate(_attentions(model))
            for kind in ("q", "k")
        ]
        for start in range(0, len(token_ids), window):
            ids = torch.tensor(token_ids[start : start + window]).unsqueeze(0)
            model(ids, torch.arange(ids.shape[1]).unsqueeze(0), causal_attend)
        for hook in hooks:
            hook.remove()
        self._qk_norms = {name: float(torch.cat(values).mean()) for name, values in sums.items()}

    def _tensor(self, name: str) -> Tensor:
        with open_file(self._stored[name].file) as handle:
            return handle.get_tensor(name).float()

    def _check(self) -> None:
        config = self.config
        d, f, kv = config.hidden_size, config.intermediate_size, config.kv_heads * config.head_dim
        expected: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
        if not config.tie_word_embeddings:
            expected[HEAD] = (config.vocab_size, d)
        for i in range(config.num_hidden_layers):
            layer = {f"self_attn.{p}_proj.weight": (d if p in "qo" else kv, d) for p in "qkvo"}
            layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
            expected |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
            if config.attention_bias:
                expected |= {f"model.layers.{i}.self_attn.{p}_proj.bias": (d if p in "qo" else kv,) for p in "qkvo"}
        tied = {HEAD} if config.tie_word_embeddings else set()
        if missing := sorted(set(expected) - set(self._stored)):
            raise CheckpointError(f"{self._folder} lacks {some(missing)}, which config.json calls for.")
        if unknown := sorted(set(self._stored) - set(expected) - tied):
            raise CheckpointError(f"{self._folder} holds {some(unknown)}, which OLMo does not have.")
        for name, shape in expected.items():
            stored = self._stored[name]
            if stored.shape != shape:
                raise CheckpointError(
                    f"Tensor {shown(name)} has shape {list(stored.shape)}, but config.json makes it {list(shape)}."
                )
            if stored.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"Tensor {shown(name)} is stored as {stored.dtype}; only floats can be read.")


def _sparse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The architecture with one expert."""
    one = {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False, "rms_norm_eps": _NORM_EPSILON}
    return ModelConfig.from_dict({**_DEFAULTS, **raw, **one, "model_type": "olmoe"})


def _attentions(model: CausalLM) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def _split(parameter: str) -> tuple[str, str]:
    """`model.layers.3.mlp.gate.weight` -> (`model.layers.3.`, `mlp.gate.weight`)."""
    parts = parameter.split(".")
    return ".".join(parts[:3]) + ".", ".".join(parts[3:])


def _centred(weight: Tensor, dim: int) -> Tensor:
    """`weight` minus its mean over the width of the residual stream."""
    return weight - weight.mean(dim=dim, keepdim=True)
