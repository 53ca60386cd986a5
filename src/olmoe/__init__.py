"""OLMoE, the open sparse mixture-of-experts language model, as practical software.

Public names load on first use: `import olmoe` imports neither torch nor transformers and changes nothing
in either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmoe.config import ModelConfig, RopeParameters
    from olmoe.engine.llm import LLM
    from olmoe.engine.request import Completion
    from olmoe.engine.sampling_params import SamplingParams
    from olmoe.engine.stream import Stream
    from olmoe.errors import UserError
    from olmoe.hf import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification, OlmoeModel
    from olmoe.hf.auto import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
        infer_device,
        pipeline,
    )
    from olmoe.model import CausalLM
    from olmoe.tokenizer import Tokenizer
    from olmoe.weights.quantize import quantize

__version__ = "0.1.0"

_HOMES = {
    "AutoConfig": "olmoe.hf.auto",
    "AutoModel": "olmoe.hf.auto",
    "AutoModelForCausalLM": "olmoe.hf.auto",
    "AutoModelForSequenceClassification": "olmoe.hf.auto",
    "AutoTokenizer": "olmoe.hf.auto",
    "BitsAndBytesConfig": "olmoe.hf.auto",
    "CausalLM": "olmoe.model",
    "Completion": "olmoe.engine.request",
    "LLM": "olmoe.engine.llm",
    "ModelConfig": "olmoe.config",
    "OlmoeConfig": "olmoe.hf",
    "OlmoeForCausalLM": "olmoe.hf",
    "OlmoeForSequenceClassification": "olmoe.hf",
    "OlmoeModel": "olmoe.hf",
    "RopeParameters": "olmoe.config",
    "SamplingParams": "olmoe.engine.sampling_params",
    "Stream": "olmoe.engine.stream",
    "Tokenizer": "olmoe.tokenizer",
    "UserError": "olmoe.errors",
    "infer_device": "olmoe.hf.auto",
    "pipeline": "olmoe.hf.auto",
    "quantize": "olmoe.weights.quantize",
}
__all__ = [
    "LLM",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BitsAndBytesConfig",
    "CausalLM",
    "Completion",
    "ModelConfig",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    "OlmoeForSequenceClassification",
    "OlmoeModel",
    "RopeParameters",
    "SamplingParams",
    "Stream",
    "Tokenizer",
    "UserError",
    "__version__",
    "infer_device",
    "pipeline",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'olmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
