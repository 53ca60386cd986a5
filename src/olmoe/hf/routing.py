"""What the routers of a transformers-face model choose, recorded whatever runs it: a pass, `generate`, a trainer.

Shapes legend: B batch, T sequence, N = B*T tokens, L layers, K experts per token.
"""

from __future__ import annotations

import inspect
import itertools
import threading
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
from olmoe.hf.recording import EXPERT_IDS, EXPERT_WEIGHTS, asked, recording
from olmoe.runner import TraceWriter


@contextmanager
def record_routing(
    model: nn.Module, path: str | Path | None = None, *, metadata: dict[str, str] | None = None
) -> Iterator[TraceWriter]:
    """Record which experts every token chooses while the block runs `model`: one of our classes, or a wrapper (PEFT).

    The trace is in the file `path`, or in memory without one; `trace` of the object that the block gets has its arrays
    once the block has ended. A row of a batch is a window of the trace, which `generate` and other passes with the same
    cache continue; texts that share a row have a window each. Padding, by a mask (B, S), is left out, and so is what a
    cache already holds. No logits are kept, and the kernels run as usual. Tokens given as embeddings have the id -1.
    Blocks may be nested, each with everything that runs inside it, and several threads may run the model, each with its
    own caches.

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
        # At the front: of two recorders, the one that started last ends first.
        after = found.register_forward_hook(recorder.after, with_kwargs=True, always_call=True, prepend=True)
        try:
            yield writer
        finally:
            before.remove()
            after.remove()


class _Passes(threading.local):
    """The state of one thread's passes: `outer` is what others want noted about the current one."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.notes: dict[str, list[Any]] = {}
        self.outer: dict[str, list[Any]] = {}
        self.cached = 0


class _Recorder:
    """Two hooks of a decoder, before and after each of its passes."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._own = _Passes()
        # The window of each row of the last pass with a cache; with another cache other texts start.
        self._windows: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def before(self, module: OlmoeModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start to record; only now is it known how many tokens are in the cache."""
        cache = _given(module, args, kwargs)[2]
        own = self._own
        own.cached = 0 if cache is None else int(cache.get_seq_length())
        own.outer = asked() or {}
        own.notes = own.stack.enter_context(recording((EXPERT_IDS, EXPERT_WEIGHTS)))

    def after(self, module: OlmoeModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Write what was recorded; nothing for a pass that failed."""
        own = self._own
        notes, own.notes = own.notes, {}
        own.stack.close()
        if output is None:
            return
        for name in notes.keys() & own.outer.keys():
            own.outer[name] += notes[name]
        with self._lock:
            self._write(notes, output, own.cached, *_given(module, args, kwargs))

    def _write(
        self, notes: dict[str, list[Any]], output: Any, cached: int, x: Tensor, mask: Any, cache: Any, positions: Any
    ) -> None:
        """Write what the routers chose in a pass, given what it was called with and the tokens in its cache then."""
        batch, count = x.shape[:2]
        layers = len(notes[EXPERT_IDS])
        if layers != self._writer.layers:
            raise UserError(
                f"Only {layers} of {self._writer.layers} layers reported what their routers chose: compiled models do "
                "not, and neither do modules that replace ours; record the model itself."
            )
        cache = getattr(output, "past_key_values", cache)
        windows = self._windows.get(cache, []) if cached and cache is not None else []
        if len(windows) != batch:
            windows = [self._writer.start() for _ in range(batch)]
        if cache is not None:
            self._windows[cache] = windows
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
                    windows[row] = self._writer.start()
                part = places[start:end]
                self._writer.append(chosen[row, part], weights[row, part], ids_BT[row, part], window=windows[row])


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
    """Where a text starts after another one in its row (B, T), which shows in positions that start again."""
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return None
    return restarts(positions.expand(batch, -1), mask).cpu().numpy()


def _stacked(layers: list[Tensor], dtype: torch.dtype, none: int) -> np.ndarray[Any, Any]:
    """(N, k) from each layer, on any device, as (N, L, K) in CPU memory."""
    width, device = max(t.shape[1] for t in layers), layers[0].device
    whole = torch.full((len(layers[0]), len(layers), width), none, dtype=dtype, device=device)
    for number, t in enumerate(layers):
        whole[:, number, : t.shape[1]] = t.detach().to(device)
    return whole.cpu().numpy()
