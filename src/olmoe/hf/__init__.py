"""The transformers face: our network behind transformers' configuration, model, cache and generation classes.

Only this package imports transformers. Importing it changes nothing in transformers.
"""

from __future__ import annotations

from olmoe.hf.classification import OlmoeForSequenceClassification
from olmoe.hf.config import OlmoeConfig
from olmoe.hf.model import OlmoeForCausalLM, OlmoeModel, OlmoePreTrainedModel
from olmoe.hf.register import register, unregister
from olmoe.hf.routing import record_routing
from olmoe.hf.step_balance import BalancedSteps, balanced_over

__all__ = [
    "BalancedSteps",
    "OlmoeConfig",
    "OlmoeForCausalLM",
    "OlmoeForSequenceClassification",
    "OlmoeModel",
    "OlmoePreTrainedModel",
    "balanced_over",
    "record_routing",
    "register",
    "unregister",
]
