"""transformers' Auto classes and `pipeline`, with our classes behind OLMoE checkpoints and nothing changed globally.

Each class here subclasses transformers' own and differs in one entry: model type "olmoe". Every other model
type, and everything that other packages register with transformers, is left to transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from olmoe.chat_template import OLMOE_CHAT_TEMPLATE
from olmoe.errors import CheckpointError
from olmoe.hf.classification import OlmoeForSequenceClassification
from olmoe.hf.config import MODEL_TYPE, OlmoeConfig, adopt
from olmoe.hf.model import OlmoeForCausalLM, OlmoeModel
from olmoe.io.hub import folder_or_id
from olmoe.io.json_file import read_object
from olmoe.tokenizer import Tokenizer

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "infer_device",
    "pipeline",
]

# Arguments about the location of a checkpoint, for every loader of transformers.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def infer_device() -> str:
    """The type of the accelerator that torch can use here ("cuda", "mps", "xpu", ...), or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


class _ByName:
    """Mixed into Auto classes: the shipped model loads by its name."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> Any:
        """As transformers documents it; "olmoe-tiny" is the shipped model."""
        return super().from_pretrained(folder_or_id(pretrained_model_name_or_path), *inputs, **kwargs)  # type: ignore[misc]


class AutoConfig(transformers.AutoConfig):
    """`transformers.AutoConfig`, giving `olmoe.OlmoeConfig` for OLMoE checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As transformers documents it; a pair with `return_unused_kwargs`."""
        loaded = super().from_pretrained(folder_or_id(pretrained_model_name_or_path), **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.model_type == MODEL_TYPE:
            config = adopt(config)
        return (config, *loaded[1:]) if isinstance(loaded, tuple) else config

    @classmethod
    def for_model(cls, model_type: str, *args: Any, **kwargs: Any) -> Any:
        """A configuration of that model type from its parameters."""
        if model_type == MODEL_TYPE:
            return OlmoeConfig(*args, **kwargs)
        return transformers.AutoConfig.for_model(model_type, *args, **kwargs)


class _Classes(Mapping[type, Any]):
    """Configuration class -> model class: ours for OLMoE, those registered here, else transformers' own."""

    def __init__(self, ours: type, theirs: Any) -> None:
        self._ours, self._theirs = ours, theirs
        self._registered: dict[type, Any] = {}

    def __getitem__(self, config_class: type) -> Any:
        if config_class in self._registered:
            return self._registered[config_class]
        if getattr(config_class, "model_type", None) == MODEL_TYPE:
            return self._ours
        return self._theirs[config_class]

    def __contains__(self, config_class: object) -> bool:
        known = config_class in self._registered or getattr(config_class, "model_type", None) == MODEL_TYPE
        return known or config_class in self._theirs

    def __iter__(self) -> Iterator[type]:
        return iter(dict.fromkeys([OlmoeConfig, *self._registered, *self._theirs]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def register(self, config_class: type, model_class: Any, exist_ok: bool = False) -> None:
        """Serve `model_class` for that configuration, in this Auto class only."""
        if config_class in self and not exist_ok:
            raise ValueError(f"{config_class.__name__} is already used by a model; pass exist_ok=True to replace it.")
        self._registered[config_class] = model_class


class AutoModel(_ByName, transformers.AutoModel):
    """`transformers.AutoModel`, giving `olmoe.OlmoeModel` for OLMoE checkpoints."""

    _model_mapping = _Classes(OlmoeModel, transformers.AutoModel._model_mapping)


class AutoModelForCausalLM(_ByName, transformers.AutoModelForCausalLM):
    """`transformers.AutoModelForCausalLM`, giving `olmoe.OlmoeForCausalLM` for OLMoE checkpoints."""

    _model_mapping = _Classes(OlmoeForCausalLM, transformers.AutoModelForCausalLM._model_mapping)


class AutoModelForSequenceClassification(_ByName, transformers.AutoModelForSequenceClassification):
    """`transformers.AutoModelForSequenceClassification`, which also knows OLMoE."""

    _model_mapping = _Classes(
        OlmoeForSequenceClassification, transformers.AutoModelForSequenceClassification._model_mapping
    )


class AutoTokenizer(transformers.AutoTokenizer):
    """`transformers.AutoTokenizer`, which knows an OLMoE checkpoint's special tokens by id, and its chat template.

    transformers identifies the tokens by name if a folder has no `tokenizer_config.json`, and adds the name to the
    vocabulary if the tokenizer does not have it. A checkpoint without a template gets OLMoE-Instruct's, whose
    generation marks say which tokens are the assistant's; `save_pretrained` writes it.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any) -> Any:
        """As transformers documents it."""
        name = folder_or_id(pretrained_model_name_or_path)
        other = kwargs.get("gguf_file") or kwargs.get("tokenizer_type")
        if other or _model_type(str(name), _hub(kwargs)) != MODEL_TYPE:
            return super().from_pretrained(name, *inputs, **kwargs)
        by_id = _special_tokens(str(name), kwargs)
        tokenizer = super().from_pretrained(name, *inputs, **(by_id | kwargs))
        if tokenizer.chat_template is None:
            tokenizer.chat_template = OLMOE_CHAT_TEMPLATE
        return tokenizer


def _special_tokens(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens for an OLMoE checkpoint whose `tokenizer_config.json` names none; otherwise nothing."""
    hub = _hub(kwargs)
    named = get_tokenizer_config(name, **hub)
    file = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub)
    if "eos_token" in named or file is None:
        return {}
    config = kwargs.get("config") or OlmoeConfig.from_pretrained(name, **hub)
    eos = config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos]
    tokenizer = Tokenizer.from_file(file, eos_ids=[i for i in eos_ids if i is not None], pad_id=config.pad_token_id)
    return {key: text for key, text in tokenizer.special_tokens().items() if key not in named}


# Tasks of transformers' pipelines that an OLMoE checkpoint supports -> the class that it uses.
PIPELINE_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "sentiment-analysis": AutoModelForSequenceClassification,
    "feature-extraction": AutoModel,
}


def pipeline(
    task: str | None = None, model: Any = None, config: Any = None, tokenizer: Any = None, **kwargs: Any
) -> Any:
    """`transformers.pipeline`, with our model class if `model` names an OLMoE checkpoint.

    Arguments are transformers'. Without a task, that of the checkpoint's architecture is used.
    """
    model, tokenizer, config = folder_or_id(model), folder_or_id(tokenizer), folder_or_id(config)
    name, hub = str(model), _hub(kwargs)
    if not isinstance(model, str | Path) or _model_type(name, hub) != MODEL_TYPE:
        return transformers.pipeline(task, model, config, tokenizer, **kwargs)
    if not isinstance(config, PreTrainedConfig):
        config = AutoConfig.from_pretrained(config or _base(name, hub), **hub)
    if task is None:
        classifies = any("SequenceClassification" in kind for kind in config.architectures or ())
        task = "text-classification" if classifies else "text-generation"
    if task not in PIPELINE_CLASSES:
        raise CheckpointError(
            f"{name} is an OLMoE checkpoint, which cannot do {task!r}; choose one of {', '.join(PIPELINE_CLASSES)}."
        )
    options = dict(kwargs.pop("model_kwargs", None) or {})
    for option in ("device_map", "trust_remote_code"):
        if kwargs.get(option) is not None:
            options[option] = kwargs.pop(option)
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    options.setdefault("dtype", dtype or "auto")
    loaded = PIPELINE_CLASSES[task].from_pretrained(name, config=config, **hub, **options)
    if tokenizer is None or isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer or _base(name, hub), **hub)
    for option in set(HUB_ARGUMENTS) & set(kwargs):
        kwargs.pop(option)
    return transformers.pipeline(task, loaded, tokenizer=tokenizer, **kwargs)


def _hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say where the checkpoint is."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def _base(name: str, hub: Mapping[str, Any]) -> str:
    """The checkpoint whose configuration applies: `name`, or the base model if `name` is only an adapter."""
    if (Path(name) / "config.json").is_file():
        return name
    file = find_adapter_config_file(name, **{k: v for k, v in hub.items() if k in ("cache_dir", "revision", "token")})
    if file is None:
        return name
    return str(read_object(Path(file))["base_model_name_or_path"])


def _model_type(name: str, hub: Mapping[str, Any]) -> str | None:
    """The model type that a checkpoint declares; None if it cannot be read, so that transformers reports the error."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(_base(name, hub), **hub)
    except (OSError, ValueError):
        return None
    return values.get("model_type")
