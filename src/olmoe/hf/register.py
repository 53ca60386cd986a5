"""`register()`: our classes behind transformers' own names, for code that only knows transformers.

Importing `olmoe` changes nothing in transformers; this does, on request, and `unregister()` undoes it.
Checkpoint conversion needs no entry: our classes have the parameters of transformers' own and say so
(`OlmoePreTrainedModel.is_custom_code`).
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.integrations.moe import ExpertsInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig as TransformersOlmoeConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from olmoe.hf.classification import OlmoeForSequenceClassification
from olmoe.hf.config import MODEL_TYPE, OlmoeConfig
from olmoe.hf.experts_interface import NAME, experts_forward
from olmoe.hf.model import OlmoeForCausalLM, OlmoeModel
from olmoe.hf.quantization import METHOD, PackedConfig, PackedQuantizer

_ABSENT = object()
_undo: list[tuple[dict[Any, Any], Any, Any]] = []  # (table, key, what it held before)


def register() -> None:
    """Put our classes behind transformers' Auto classes and `pipeline`, our experts and packing behind its interfaces.

    From then on `transformers.AutoModelForCausalLM.from_pretrained` and the like return our classes for OLMoE
    checkpoints, packed folders included, and `set_experts_implementation("olmoe")` works on transformers'
    mixture-of-experts models.
    Calling it again changes nothing.
    """
    if _undo:
        return
    _put(CONFIG_MAPPING._extra_content, MODEL_TYPE, OlmoeConfig)
    for auto, model in (
        (transformers.AutoModel, OlmoeModel),
        (transformers.AutoModelForCausalLM, OlmoeForCausalLM),
        (transformers.AutoModelForSequenceClassification, OlmoeForSequenceClassification),
    ):
        for config in (OlmoeConfig, TransformersOlmoeConfig):
            _put(auto._model_mapping._extra_content, config, model)
    _put(ExpertsInterface._global_mapping, NAME, experts_forward)
    # lm-evaluation-harness, for example, reads a checkpoint's quantization before any of our classes is called.
    _put(AUTO_QUANTIZER_MAPPING, METHOD, PackedQuantizer)
    _put(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD, PackedConfig)


def unregister() -> None:
    """Give transformers back what `register` replaced. Calling it again changes nothing."""
    while _undo:
        table, key, before = _undo.pop()
        if before is _ABSENT:
            table.pop(key, None)
        else:
            table[key] = before


def _put(table: dict[Any, Any], key: Any, value: Any) -> None:
    _undo.append((table, key, table.get(key, _ABSENT)))
    table[key] = value
