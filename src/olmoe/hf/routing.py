"""What the routers of a transformers-face model choose, recorded while anything runs it: a pass, `generate`, a trainer.

Shapes legend: B batch, T sequence, N = B*T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from olmoe.errors import UserError
from olmoe.hf.inputs import restarts
from olmoe.hf.model import OlmoeModel
from olmoe.hf.recording import EXPERT_IDS, EXPERT_WEIGHTS, recording
from olmoe.runner import TraceWriter


@contextmanager
def record_routing(
    model: nn.Module, path: str | Path | None = None, *, metadata: dict[str, str] | None = None
) -> Iterator[TraceWriter]:
    """Record which experts every token chooses while the block runs `model`: one of our classes, or around one (PEFT).

    The trace is in the file `path`, or without one in memory; `trace` of what the block gets has its arrays once the
    block has ended. A row of a batch is a window of the trace, which `generate` and other passes with the same cache
    continue; texts that share a row have a window each. Padding, by a mask (B, S), is left out, and so is what a cache
    holds already. Nothing is kept of logits, and kernels compute what they compute otherwise. Tokens that are given as
    embeddings have the id -1.

    >>> with record_routing(model, "routing.safetensors") as recording:    # doctest: +SKIP
    ...     model.generate(**inputs)
    >>> recording.trace.expert_ids                                         # (tokens, layers, experts of a token)

    Raises `UserError` if there is none of our models, or for a file that cannot be written.
    """
    found = next((module for module in model.modules() if isinstance(module, OlmoeModel)), None)
    if found is None:
        raise UserError(f"The model, a {type(model).__name__}, holds no OlmoeModel, whose routing could be recorded.")
    top_k = max((gate.top_k for layer in found.layers if (gate := getattr(layer.mlp, "gate", None))), default=None)
    with TraceWriter.of(found.config, path, top_k=top_k, metadata=metadata) as writer:
        recorder = _Recorder(writer)
        before = found.register_forward_pre_hook(recorder.before, with_kwargs=True)
        after = found.register_forward_hook(recorder.after, with_kwargs=True, always_call=True)
        try:
            yield writer
        finally:
            before.remove()
            after.remove()


class _Recorder:
    """Two hooks of a decoder, before and after each of its passes."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._stack = ExitStack()
        self._notes: dict[str, list[Any]] = {}
        self._cached = 0
        self._windows: list[int] = []  # of each row of the last pass
        self._cache: weakref.ref[Any] | None = None  # of the last pass: with another one, other texts begin

    def before(self, module: OlmoeModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to note; how many tokens there are in the cache is known only now."""
        cache = _given(module, args, kwargs)[2]
        self._cached = 0 if cache is None else int(cache.get_seq_length())
        self._notes = self._stack.enter_context(recording((EXPERT_IDS, EXPERT_WEIGHTS)))

    def after(self, module: OlmoeModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Write what was noted; nothing of a pass that has failed."""
        notes, self._notes = self._notes, {}
        self._stack.close()
        if output is None:
            return
        x, mask, cache, positions = _given(module, args, kwargs)
        batch, count = x.shape[:2]
        layers = len(notes[EXPERT_IDS])
        if layers != self._writer.layers:
            raise UserError(
                f"Only {layers} of {self._writer.layers} layers told what their routers chose: what is compiled does "
                "not, and neither do modules that replace ours; record the model itself."
            )
        cache = getattr(output, "past_key_values", cache)
        if not self._cached or len(self._windows) != batch or self._cache is None or self._cache() is not cache:
            self._windows = [self._writer.start() for _ in range(batch)]
        self._cache = None if cache is None else weakref.ref(cache)
        ids_BT = x.cpu().numpy() if x.dim() == 2 else np.full((batch, count), -1)
        mask = mask[:, -count:].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        keep_BT = np.ones((batch, count), dtype=bool) if mask is None else mask.cpu().numpy()
        begins_BT = _begins(positions, mask, batch)
        shape = (batch, count, layers, -1)
        chosen = _stacked(notes[EXPERT_IDS], torch.int16, -1).reshape(shape)
        weights = _stacked(notes[EXPERT_WEIGHTS], torch.float32, 0).reshape(shape)
        for row in range(batch):
            places = np.flatnonzero(keep_BT[row])
            cuts = () if begins_BT is None else np.flatnonzero(begins_BT[row, places])
            for start, end in itertools.pairwise([0, *cuts, len(places)]):
                if start:
                    self._windows[row] = self._writer.start()
                part = places[start:end]
                self._writer.append(chosen[row, part], weights[row, part], ids_BT[row, part], window=self._windows[row])


def _given(module: OlmoeModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, Any, Any]:
    """What a pass was called with: ids (B, T) or embeddings (B, T, D), mask, cache and positions."""
    given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    x = given.get("input_ids")
    cache = given.get("past_key_values")
    return (
        given["inputs_embeds"] if x is None else x,
        given.get("attention_mask"),
        given.get("cache") if cache is None else cache,
        given.get("position_ids"),
    )


def _begins(positions: Any, mask: Tensor | None, batch: int) -> np.ndarray[Any, Any] | None:
    """Where a text begins behind another one in its row (B, T), which positions tell that start again."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return None
    return restarts(positions.expand(batch, -1), mask).cpu().numpy()


def _stacked(layers: list[Tensor], dtype: torch.dtype, none: int) -> np.ndarray[Any, Any]:
    """(N, k) of each layer, on any device, as (N, L, K) in memory of the CPU."""
    width, device = max(t.shape[1] for t in layers), layers[0].device
    whole = torch.full((len(layers[0]), len(layers), width), none, dtype=dtype, device=device)
    for number, t in enumerate(layers):
        whole[:, number, : t.shape[1]] = t.detach().to(device)
    return whole.cpu().numpy()
