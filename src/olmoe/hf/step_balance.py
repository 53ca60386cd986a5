"""Load balancing over a whole optimizer step: all batches that are accumulated, on all ranks.

The load-balancing losses are products of two means over tokens, how often an expert was chosen and how probable it was.
So their mean over batches is not their value over all tokens, and by default each batch balances its own load, as
OLMoE's training code and transformers do. Here the choices of the whole step are counted first, by forward passes
without gradients; they carry none, so each batch then adds its exact share of the step's loss and gradient.

Shapes legend: B batch, T sequence, N tokens, L layers, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from olmoe.errors import UserError
from olmoe.hf.losses import WholeStep, kept_tokens
from olmoe.hf.model import OlmoeForCausalLM
from olmoe.runtime import log, no_grad

# Arguments of a forward pass that decide what routers see; flash attention is told of packed texts by the last ones.
_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "inputs_embeds",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


@contextmanager
def balanced_over(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, copies: int = 1) -> Iterator[None]:
    """Let the training losses of `model` inside the block balance experts over these batches, on all ranks.

    `batches` are what one optimizer step accumulates, as arguments of the model by name. Every rank of a process group
    enters the block together; `copies` is how many ranks have the same batches (tensor parallel). With
    `num_items_in_batch` a batch's loss holds its share of the step; without, the mean over all batches and ranks is
    the step's loss.

    >>> with balanced_over(model, batches):                                      # doctest: +SKIP
    ...     for batch in batches:
    ...         (model(**batch, output_router_logits=True).loss / len(batches)).backward()

    Raises `UserError` if there is no `OlmoeForCausalLM` in `model`, or for batches without its inputs.
    """
    found = _causal_lm(model)
    before = found.whole_step
    try:
        found.whole_step = count_step(model, batches, copies=copies)
        yield
    finally:
        found.whole_step = before


class BalancedSteps:
    """A mixin for transformers' Trainer and TRL's SFTTrainer, whose steps then are `balanced_over` all their batches.

    >>> class Trainer(BalancedSteps, transformers.Trainer):                      # doctest: +SKIP
    ...     pass

    A step costs one more forward pass. Raises `UserError` in training if losses are averaged otherwise than by
    `average_tokens_across_devices`, transformers' default.
    """

    model: Any
    args: Any

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Trainer: the batches of a step, and their number of items."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.args.world_size > 1 and not self.args.average_tokens_across_devices:
            raise UserError("BalancedSteps needs average_tokens_across_devices=True in the TrainingArguments; set it.")
        if batches:
            copies: int = self.get_tp_size()  # type: ignore[attr-defined]
            _causal_lm(self.model).whole_step = count_step(self.model, batches, copies=copies)
        return batches, items

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Trainer."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            _causal_lm(self.model).whole_step = None


@no_grad
def count_step(model: nn.Module, batches: Sequence[Mapping[str, Any]], *, copies: int = 1) -> WholeStep:
    """How often each expert is chosen for the tokens of these batches, on all ranks."""
    found = _causal_lm(model)
    device, experts, k = found.device, found.num_experts, found.num_experts_per_tok
    counts_LE = torch.zeros(found.config.num_hidden_layers, experts, dtype=torch.int64, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, batches
    # What is drawn at random here (dropout) is drawn again in training.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in batches:
            inputs = {name: _on(device, batch[name]) for name in _INPUTS if batch.get(name) is not None}
            if "input_ids" not in inputs and "inputs_embeds" not in inputs:
                raise UserError(f"A batch has no input_ids to balance experts over, only {', '.join(batch)}.")
            logits = model(**inputs, output_router_logits=True, use_cache=False, logits_to_keep=1).router_logits
            weight_N = kept_tokens(logits[0], inputs.get("attention_mask"))
            for layer, logits_NE in enumerate(logits):
                ids_NK = logits_NE.to(device).topk(k, dim=-1).indices
                counts_LE[layer].index_add_(0, ids_NK.flatten(), weight_N.repeat_interleave(k))
            totals += torch.stack((weight_N.sum(), torch.ones_like(totals[0])))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(counts_LE)
        dist.all_reduce(totals)
    tokens, count = (int(total) // copies for total in totals)
    if tokens == 0:
        log.warning("a step has no tokens to balance experts over")
    return WholeStep(counts_LE, tokens, count)


def _causal_lm(model: nn.Module) -> OlmoeForCausalLM:
    """Our model, by itself or inside a wrapper such as PEFT's or DDP's."""
    for module in model.modules():
        if isinstance(module, OlmoeForCausalLM):
            return module
    raise UserError(f"The model, a {type(model).__name__}, holds no OlmoeForCausalLM, whose experts could be balanced.")


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
