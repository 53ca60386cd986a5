"""Which experts the tokens of a story chose, and what the next word becomes without one of them: plain torch hooks.

`with_hooks` and `with_cache` are the two tools that interpretability work is made of, in the style of TransformerLens
and baukit: names of modules, and what is done to their outputs for the time of a run. A router (`mlp.gate`) returns
logits of all experts, the weights of the chosen ones and their ids; what a hook returns in their place is what the
experts then compute.

python examples/interpretability/hooks.py ["The beginning of a story"]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from olmoe import AutoModelForCausalLM, AutoTokenizer

TEXT = "Once upon a time there was a little girl named Lily. She loved to play with her"
LAYER = 2
ROUTER = f"model.layers.{LAYER}.mlp.gate"

Routing = tuple[Tensor, Tensor, Tensor]


@contextmanager
def with_hooks(model: torch.nn.Module, hooks: dict[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Inside, the output of each named module is what its function makes of it (None: left as it is)."""
    with ExitStack() as stack:
        for name, change in hooks.items():
            module = model.get_submodule(name)
            handle = module.register_forward_hook(lambda _, args, output, change=change: change(output))
            stack.callback(handle.remove)
        yield


def with_cache(model: torch.nn.Module, ids: Tensor, names: list[str]) -> tuple[Tensor, dict[str, Any]]:
    """The logits of a text, and what the named modules returned on the way."""
    cache: dict[str, Any] = {}
    with with_hooks(model, {name: lambda output, name=name: cache.update({name: output}) for name in names}):
        return model(ids).logits[0], cache


def knocked_out(expert: int) -> Callable[[Routing], Routing]:
    """A router that cannot choose an expert: each token takes its next best one instead."""

    def change(output: Routing) -> Routing:
        logits, _, ids = output
        logits = logits.index_fill(-1, torch.tensor(expert), -torch.inf)
        return logits, *logits.softmax(dim=-1).topk(ids.shape[-1])

    return change


def forced(expert: int) -> Callable[[Routing], Routing]:
    """A router that sends the last token to an expert with the weight of its first choice, whose place that takes."""

    def change(output: Routing) -> Routing:
        logits, weights, ids = output
        ids = ids.clone()
        ids[-1, 0] = expert
        return logits, weights, ids

    return change


def divergence(before: Tensor, after: Tensor) -> float:
    """How far the next token's distribution moved: Kullback and Leibler's, in nats, from log-probabilities."""
    return float((before.exp() * (before - after)).sum())


@torch.no_grad()
def main(text: str) -> None:
    """Print who chose what, which expert of the last token matters most, and what the model says without it."""
    model = AutoModelForCausalLM.from_pretrained("olmoe-tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("olmoe-tiny")
    prompt = tokenizer(text, return_tensors="pt")
    ids = prompt["input_ids"]

    def next_token(hooks: dict[str, Callable[[Any], Any]]) -> Tensor:
        with with_hooks(model, hooks):
            return model(ids).logits[0, -1].log_softmax(dim=-1)

    def story(hooks: dict[str, Callable[[Any], Any]]) -> str:
        with with_hooks(model, hooks):
            written = model.generate(**prompt, max_new_tokens=20, do_sample=False)
        return tokenizer.decode(written[0, ids.shape[1] :]).strip()

    logits, cache = with_cache(model, ids, [ROUTER])
    _, weights, experts = cache[ROUTER]
    print(f"The first four of {experts.shape[1]} experts that each token chose in layer {LAYER}, and their weights:")
    for token, chosen, shares in zip(ids[0].tolist(), experts.tolist(), weights.tolist(), strict=True):
        columns = [f"{e:3d} ({w:4.0%})" for e, w in zip(chosen[:4], shares[:4], strict=True)]
        print(f"  {tokenizer.decode([token])!r:12}", "  ".join(columns))

    plain = logits[-1].log_softmax(dim=-1)
    moved = {e: divergence(plain, next_token({ROUTER: knocked_out(e)})) for e in experts[-1].tolist()}
    print("\nHow far the next token's distribution moves (KL, nats) without each expert of the last token:")
    print("  " + "  ".join(f"{e}: {value:.3f}" for e, value in moved.items()))
    most = max(moved, key=lambda e: moved[e])
    # Of all others, the one that the last token was farthest from choosing.
    stranger = int(cache[ROUTER][0][-1].argmin())

    runs = {
        "as it is": {},
        f"without {most}": {ROUTER: knocked_out(most)},
        f"with {stranger}": {ROUTER: forced(stranger)},
    }
    found = {name: next_token(hooks) for name, hooks in runs.items()}
    likely = dict.fromkeys(token for after in found.values() for token in after.topk(4).indices.tolist())
    print(f"\nThe next token, {', '.join(runs)} in layer {LAYER}:")
    for token in likely:
        columns = [f"{name}: {float(after[token].exp()):6.1%}" for name, after in found.items()]
        print(f"  {tokenizer.decode([token])!r:12}", "   ".join(columns))
    print("\nThe story goes on:")
    for name, hooks in runs.items():
        print(f"  {name}: {story(hooks)!r}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else TEXT)
