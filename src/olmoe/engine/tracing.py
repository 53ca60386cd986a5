"""What the routers chose for every token that an engine computes, step by step, and writing it to a file.

Shapes legend: L layers, K experts per token.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from olmoe.config import ModelConfig
from olmoe.engine.request import Request
from olmoe.errors import UserError
from olmoe.runner import TraceWriter


class Traced(NamedTuple):
    """What a step computed of one request: the tokens from position `start` on, and what each chose in every layer.

    `expert_ids` (n, L, K) are by falling probability, -1 where a token chose fewer; `weights` belong to the same
    entries. Both are the step's own arrays: nobody writes to them later.
    """

    request: Request
    start: int
    input_ids: list[int]
    expert_ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]


OnTrace = Callable[[Sequence[Traced]], None]
# Where `LLM` writes a trace: a file, or a writer that is already open and records several calls.
TraceTarget = str | Path | TraceWriter | None


class RequestTraces:
    """For `Engine(on_trace=...)`: writes what each request chooses as its own window.

    Windows are in the order in which requests were expected, or else first seen. With `prefix_cache=False` they are
    complete; tokens found in a prefix cache were not computed, so nothing was chosen for them.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._windows: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()

    def expect(self, requests: Sequence[Request]) -> None:
        """Fix the order of these requests' windows."""
        for request in requests:
            self._windows[request] = self._writer.start()

    def __call__(self, traced: Sequence[Traced]) -> None:
        """Write what one step computed."""
        for request, _, input_ids, expert_ids, weights in traced:
            if request not in self._windows:
                self.expect([request])
            self._writer.append(expert_ids, weights, input_ids, window=self._windows[request])


def writer_of(
    target: TraceTarget, requests: Sequence[Request], config: ModelConfig
) -> AbstractContextManager[TraceWriter | None]:
    """A writer to enter, wide enough for these requests; None if there is no target.

    Raises `UserError` for a file that cannot be written, and for a writer meant for another model.
    """
    if target is None:
        return nullcontext()
    most = max((request.policy.top_k for request in requests if request.policy), default=0)
    most = max(most, config.num_experts_per_tok)
    if not isinstance(target, TraceWriter):
        return TraceWriter.of(config, target, top_k=most)
    if target.layers != config.num_hidden_layers or target.top_k < most or target.predictions:
        predictions = " and predicted ids" if target.predictions else ""
        raise UserError(
            f"The trace has {target.layers} layers and {target.top_k} experts per token{predictions}, but here are "
            f"{config.num_hidden_layers} and {most}, without predicted ids; make the writer with "
            f"TraceWriter.of(config, path, top_k={most})."
        )
    return nullcontext(target)
