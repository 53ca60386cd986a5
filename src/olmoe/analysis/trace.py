"""Runs texts through a model into a trace (a file of `olmoe.runner.trace_file`), window by window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from olmoe.runner import Batch, CacheView, Runner, Trace, TraceWriter, Want
from olmoe.runner.trace_file import SCHEMA
from olmoe.runtime import inference_mode

__all__ = ["SCHEMA", "WINDOW", "Document", "Trace", "TraceWriter", "record"]

# Tokens that the model reads at once, as in the paper's analysis (App. G), if its positions reach that far.
WINDOW = 2048

# Token ids; an array of them takes a tenth of the memory of a list.
Document = Sequence[int] | npt.NDArray[np.integer]


def record(
    runner: Runner, documents: Iterable[Document], writer: TraceWriter, *, window: int = WINDOW
) -> Iterator[int]:
    """Run documents (token ids) through a model and write what they choose; yields the tokens of every step.

    A document is read in windows of at most `window` tokens, each with nothing before it, as in the paper's analysis.
    Short ones run through the network together. Predicted ids are recorded if the writer takes them.
    """
    window = min(window, int(runner.config.max_position_embeddings * runner.config.rope.factor))
    group: list[list[int]] = []
    for document in documents:
        for start in range(0, len(document), window):
            part = np.asarray(document[start : start + window]).tolist()
            if group and sum(map(len, group)) + len(part) > runner.chunk_tokens:
                yield from _record_group(runner, group, writer)
                group = []
            group.append(part)
    if group:
        yield from _record_group(runner, group, writer)


@inference_mode
def _record_group(runner: Runner, windows: Sequence[list[int]], writer: TraceWriter) -> Iterator[int]:
    """Record windows that fit into one step together, or a single longer one in several steps."""
    blocks = runner.new_cache(len(windows), max(map(len, windows)))
    step = runner.chunk_tokens
    table = np.arange(blocks.blocks, dtype=np.int32).reshape(len(windows), -1)
    if len(windows) > 1:
        chunks = [(list(windows), [0] * len(windows))]
    else:
        whole = windows[0]
        chunks = [([whole[start : start + step]], [start]) for start in range(0, len(whole), step)]
    for parts, lengths in chunks:
        counts, ids = [len(part) for part in parts], [i for part in parts for i in part]
        every = range(len(ids))
        batch = Batch(ids, counts, lengths, [len(each) for each in windows])
        output = runner.forward(batch, CacheView(blocks, table), Want(every if writer.predictions else (), every))
        assert output.trace is not None
        chosen, weights = (values.cpu().numpy() for values in output.trace)
        predicted = output.logits.argmax(dim=-1).cpu().numpy() if writer.predictions else ()
        first = 0
        for count, length in zip(counts, lengths, strict=True):
            if length == 0:
                writer.start()
            end = first + count
            writer.append(chosen[first:end], weights[first:end], ids[first:end], predicted[first:end])
            first = end
        yield len(ids)
