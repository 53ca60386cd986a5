"""What a forward pass returns on request besides its result: each layer's router logits and attention probabilities.

transformers collects them with hooks, which it leaves on the modules. That would force ours to be computed module by
module for good, so here modules record these values themselves while a caller has requested them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import (
    CompileableContextVar,
    resolve_hidden_states_indices,
    selected_hidden_states,
)

from olmoe.model import RouterOutput

ROUTERS: Final = "router_logits"
ATTENTIONS: Final = "attentions"
INPUTS: Final = "inputs"  # of each layer, as its forward pre-hooks leave them
EXPERT_IDS: Final = "expert_ids"  # (N, K) of each layer, and their weights
EXPERT_WEIGHTS: Final = "expert_weights"

_notes: Any = CompileableContextVar("olmoe_notes")  # a list for each requested name


@contextmanager
def recording(names: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Collect what is noted under `names` in the block, in the order of computation. Without names nothing happens.

    What an outer block has requested is collected there, unless it has the same name.
    """
    notes: dict[str, list[Any]] = {name: [] for name in names}
    if not notes:
        yield notes
        return
    token = _notes.set((asked() or {}) | notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def asked() -> dict[str, list[Any]] | None:
    """The lists that a caller wants filled, by name; None if there are none."""
    if torch.compiler.is_dynamo_compiling() and not _notes.compiling:
        return None  # what is not set inside a graph cannot be read there
    return _notes.get()


def note(name: str, value: Any) -> None:
    """Keep `value` if `name` was requested; a module without attention probabilities records None."""
    notes = asked()
    if notes is not None and name in notes and value is not None:
        notes[name].append(value)


def note_routing(routers: Iterable[RouterOutput]) -> None:
    """Keep the requested parts of what the routers of some layers decided."""
    if asked():
        for logits_NE, weights_NK, expert_ids_NK in routers:
            note(ROUTERS, logits_NE)
            note(EXPERT_IDS, expert_ids_NK)
            note(EXPERT_WEIGHTS, weights_NK)


def checkpointed(checkpoint: Callable[..., Any], block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`block(x)` under gradient checkpointing, with gradients for what it notes.

    Reentrant checkpointing computes without a graph and gives gradients only to the outputs of its function, so what
    is noted is made one of these outputs.
    """
    outer = asked()
    if not outer:
        return checkpoint(block, x)
    counts: list[int] = []

    def whole(x: Tensor) -> tuple[Tensor, ...]:
        with recording(outer) as notes:
            y = block(x)
        counts[:] = [len(values) for values in notes.values()]
        return (y, *(value for values in notes.values() for value in values))

    y, *found = checkpoint(whole, x)
    for name, count in zip(outer, counts, strict=True):
        outer[name] += found[:count]
        found = found[count:]
    return y


class CheckpointsWithin:
    """Mixed before transformers' checkpointing layer into one that calls `checkpointed` itself.

    That class wraps the `forward` of its subclasses, and would checkpoint all of it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        nn.Module.__init_subclass__(**kwargs)


def wanted_states(model: Any, output_hidden_states: bool | int | list[int] | None, count: int) -> set[int]:
    """Which of `count` hidden states to return: all, none, or those of an index or indices.

    Negative ones count from the end of the configuration's number of layers, as in transformers.
    """
    chosen = selected_hidden_states(output_hidden_states)
    if chosen is None:
        return set(range(count)) if output_hidden_states else set()
    return resolve_hidden_states_indices(model, chosen)
