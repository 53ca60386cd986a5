"""OLMoE as a classifier or reward model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from olmoe.hf.cache_name import one_cache, warns_of_old_name
from olmoe.hf.config import OlmoeConfig
from olmoe.hf.model import OlmoeModel, OlmoePreTrainedModel
from olmoe.model import Linear


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
        """See transformers' documentation of sequence classification. labels (B,), or (B, classes) for several each.

        `cache` is what transformers calls `past_key_values` from 5.24 on.
        """
        kept = one_cache(past_key_values, cache)  # passed by position, under no name
        if labels is not None and use_cache is None:
            use_cache = False  # nothing continues after a loss
        return super().forward(
            input_ids, attention_mask, position_ids, kept, inputs_embeds, labels=labels, use_cache=use_cache, **kwargs
        )
