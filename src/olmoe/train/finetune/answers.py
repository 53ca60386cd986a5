"""What a model in training answers to held-out prompts: greedy, with a cache, through whatever modules it has.

Shapes legend: N tokens, H heads, G KV heads, Dh head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe import ops
from olmoe.model import CausalLM
from olmoe.runtime import no_grad
from olmoe.tokenizer import Tokenizer
from olmoe.train.finetune.chats import Completion, Sample
from olmoe.train.ranks import ALONE, Ranks


def prompt_of(sample: Sample, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The text and the ids that come before the last answer of a sample."""
    if isinstance(sample, Completion):
        text = sample.prompt
    else:
        last = max(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
        before = sample.messages[:last]
        text = tokenizer.render_chat(before, tools=sample.tools) if before else ""
    # Without a prompt, a text begins as after the end of another one.
    return text, tokenizer.encode_rendered(text) or list(tokenizer.eos_ids[:1])


@no_grad
def answer(model: CausalLM, tokenizer: Tokenizer, prompt: list[int], most: int, ranks: Ranks = ALONE) -> str:
    """The likeliest tokens after a prompt until the text ends, `most` of them at most; ranks compute it together."""
    device = model.model.norm.weight.device
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (N, H, Dh), k and v (N, G, Dh) -> (N, H, Dh); earlier keys and values are kept."""
        keys[layer] = torch.cat((keys[layer], k)) if layer in keys else k
        values[layer] = torch.cat((values[layer], v)) if layer in values else v
        heads_first = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys[layer], values[layer]))
        return ops.attention(*heads_first, causal=True)[0].transpose(0, 1)

    new, written = list(prompt), list[int]()
    most = min(most, model.config.max_position_embeddings - len(prompt))
    for _ in range(most):
        start = len(prompt) + len(written) - len(new)
        ids = torch.tensor(new, device=device)
        hidden = model(ids, torch.arange(start, start + len(new), device=device), attend).hidden
        best = int(model.logits(hidden[-1:])[0, : tokenizer.vocab_size].argmax())
        best = ranks.on_first(lambda token=best: token)  # type: ignore[misc]
        if best in tokenizer.eos_ids:
            break
        written.append(best)
        new = [best]
    return tokenizer.decode(written)
