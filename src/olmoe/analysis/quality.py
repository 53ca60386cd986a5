"""What quantization costs: perplexity, the distance of next-token distributions, and whether routers still agree.

`measure` is for weights, `measure_cache` for the keys and values that a model keeps. Both sides read the same
held-out text in windows. For each predicted token, with p the distribution of the reference and q that of the
candidate:

    perplexity    exp of the mean of -log q(next token)
    KL            sum over the vocabulary of p (log p - log q), in nats: its mean and its 99th percentile
    routing       the share of the reference's top-k experts that the candidate chose too, by layer

Every number comes from free-running models: a layer's router sees the hidden states produced by the quantized layers
before it.

Shapes legend: B windows, T tokens of a window, N = B*T tokens, V vocabulary, K experts per token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoe.errors import UserError
from olmoe.model import CausalLM, causal_attend
from olmoe.runner import Batch, CacheView, Runner, Want, make_runner, to_cache_dtype
from olmoe.runner.policy import ResolvedPolicy
from olmoe.runtime import available_memory_bytes, inference_mode, log
from olmoe.weights import checkpoint, sample_text
from olmoe.weights.checkpoint import open_source
from olmoe.weights.source import WeightSource, load_model, tokenizer_of

BATCH_TOKENS = 2048
# Tokens whose logits of both models exist at a time: 256 x 50304 fp32 are 51 MB.
LOGIT_TOKENS = 256
# Tokens per window of text, if the model's positions reach that far.
WINDOW = 512


@dataclass(frozen=True)
class Report:
    """The quality of a candidate against its reference on `tokens` predicted tokens."""

    tokens: int
    reference_perplexity: float
    perplexity: float
    kl_mean: float
    kl_p99: float
    same_top_token: float  # share of tokens whose most probable next token is the same
    routing_agreement: tuple[float, ...]  # by layer

    @property
    def routing_mean(self) -> float:
        """Routing agreement over all layers."""
        return sum(self.routing_agreement) / len(self.routing_agreement)

    def table(self) -> str:
        """The report as a Markdown table, and the routing of each layer on a line below."""
        rows = [
            ("tokens", f"{self.tokens:,}"),
            ("perplexity, reference", f"{self.reference_perplexity:.4f}"),
            ("perplexity", f"{self.perplexity:.4f} ({self.perplexity / self.reference_perplexity - 1:+.2%})"),
            ("KL, mean", f"{self.kl_mean:.5f} nats"),
            ("KL, 99th percentile", f"{self.kl_p99:.5f} nats"),
            ("same most probable token", f"{self.same_top_token:.2%}"),
            ("routing agreement", f"{self.routing_mean:.2%}"),
        ]
        lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join([*lines, "", "by layer: " + " ".join(f"{share:.2%}" for share in self.routing_agreement)])

    def to_dict(self) -> dict[str, Any]:
        """The numbers by name, for JSON."""
        return asdict(self) | {"routing_mean": self.routing_mean}


def measure(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] = sample_text.HELD_OUT,
    tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Report:
    """What `olmoe.quantize(source, target)` cost: compares both models on at most `tokens` tokens of held-out text.

    Each is a checkpoint folder, a hub id or a .gguf file, and computes in fp32 if memory suffices, else in the dtype
    that it is stored in. `progress(done, total)` is called in tokens.
    """
    reference, candidate = (
        open_source(name, revision=revision, token=token, local_files_only=local_files_only)
        for name in (source, target)
    )
    ids = sample_text.read_ids(text, tokenizer_of(reference))[:tokens]
    length = min(WINDOW, reference.config.max_position_embeddings)
    return compare(_model(reference), _model(candidate), ids, length, progress)


def _model(source: WeightSource) -> CausalLM:
    """The whole model of a source."""
    free = available_memory_bytes()
    fits = free is None or 4 * source.config.num_parameters < 0.8 * free
    if not fits:
        log.warning("%s does not fit into memory in fp32, so it is measured as stored", source.path)
    if source.path.is_dir():
        return checkpoint.load(source.path, dtype=torch.float32 if fits else None)
    return load_model(source, torch.float32 if fits else torch.bfloat16)


@inference_mode
def compare(
    reference: CausalLM,
    candidate: CausalLM,
    token_ids: list[int],
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Run both models over `token_ids` in windows of `length` inputs. Raises `UserError` if there are too few.

    Every token but the first is predicted once, from those before it in its window; a last window that is not full
    counts too. `progress(done, total)` is called in tokens.
    """
    tally = _Tally(len(token_ids) - 1, reference.config.num_hidden_layers, progress)
    for ids in _batches(token_ids, length):
        inputs_BT, labels_N = ids[:, :-1], ids[:, 1:].flatten()
        positions = torch.arange(inputs_BT.shape[1]).expand_as(inputs_BT)
        outputs = [model(inputs_BT, positions, causal_attend) for model in (reference, candidate)]
        for layer, (expected, actual) in enumerate(zip(outputs[0].routers, outputs[1].routers, strict=True)):
            tally.add_routing(layer, expected.expert_ids, actual.expert_ids)
        hidden = [output.hidden.flatten(0, 1) for output in outputs]
        for start in range(0, len(labels_N), LOGIT_TOKENS):
            part = slice(start, start + LOGIT_TOKENS)
            tally.add_tokens(reference.logits(hidden[0][part]), candidate.logits(hidden[1][part]), labels_N[part])
        tally.show()
    return tally.report()


def measure_cache(
    source: str | os.PathLike[str],
    cache_dtype: str | torch.dtype = "int8",
    *,
    reference: str | torch.dtype = "float16",
    text: str | os.PathLike[str] = sample_text.HELD_OUT,
    tokens: int = 16384,
    progress: Callable[[int, int], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Report:
    """What a KV cache of `cache_dtype` costs compared with one of `reference`; both may be any dtype that `LLM` takes.

    The model and the other arguments are those of `measure`.
    """
    found = open_source(source, revision=revision, token=token, local_files_only=local_files_only)
    dtypes = [to_cache_dtype(name) for name in (reference, cache_dtype)]
    ids = sample_text.read_ids(text, tokenizer_of(found))[:tokens]
    length = min(WINDOW, found.config.max_position_embeddings)
    return compare_caches(make_runner(_model(found)), ids, length, dtypes[0], dtypes[1], progress)


@inference_mode
def compare_caches(
    runner: Runner,
    token_ids: list[int],
    length: int,
    reference: torch.dtype | None = None,
    candidate: torch.dtype | None = torch.int8,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Like `compare`, for one model with its keys and values in two dtypes; None is the runner's own."""
    return compare_sides(Side(runner, reference), Side(runner, candidate), token_ids, length, progress=progress)


@dataclass(frozen=True)
class Side:
    """A model as `compare_sides` runs it: None as cache dtype or router policy means the model's own."""

    runner: Runner
    cache_dtype: torch.dtype | None = None
    policy: ResolvedPolicy | None = None


def by_layer(expected_NLK: Tensor, actual_NLK: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What two models chose, as pairs to compare: layer by layer, (N, K) of each."""
    return list(zip(expected_NLK.unbind(1), actual_NLK.unbind(1), strict=True))


@inference_mode
def compare_sides(
    reference: Side,
    candidate: Side,
    token_ids: list[int],
    length: int,
    *,
    pairs: Callable[[Tensor, Tensor], list[tuple[Tensor, Tensor]]] = by_layer,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Like `compare`, for models in runners.

    `pairs` is given the expert ids (N, L, K) of both sides, and says which of them to compare for the routing of each
    of the candidate's layers, for models whose layers or experts are not those of the reference.
    """
    tally = _Tally(len(token_ids) - 1, candidate.runner.config.num_hidden_layers, progress)
    views = []
    for side in (reference, candidate):
        blocks = side.runner.new_cache(1, min(length, len(token_ids) - 1), side.cache_dtype)
        views.append(CacheView(blocks, np.arange(blocks.blocks, dtype=np.int32)[None]))
    for first in range(0, len(token_ids) - 1, length):
        window = token_ids[first : first + length + 1]
        inputs, labels_N = window[:-1], torch.tensor(window[1:])
        for start in range(0, len(inputs), LOGIT_TOKENS):
            part = inputs[start : start + LOGIT_TOKENS]
            rows = range(len(part))
            expected, actual = (
                side.runner.forward(
                    Batch(part, [len(part)], [start], [len(inputs)], [side.policy]), view, Want(rows, rows)
                )
                for side, view in zip((reference, candidate), views, strict=True)
            )
            assert expected.trace is not None
            assert actual.trace is not None
            for layer, chosen in enumerate(pairs(expected.trace.expert_ids, actual.trace.expert_ids)):
                tally.add_routing(layer, *chosen)
            labels = labels_N[start : start + len(part)].to(expected.logits.device)
            tally.add_tokens(expected.logits, actual.logits, labels)
        tally.show()
    return tally.report()


class _Tally:
    """The sums of a report over the tokens so far. Raises `UserError` if there are no tokens at all."""

    def __init__(self, total: int, layers: int, progress: Callable[[int, int], None] | None) -> None:
        if total < 1:
            raise UserError("The text has fewer than two tokens, so nothing can be predicted; give a longer one.")
        self._total, self._progress = total, progress
        self._reference_nats = self._nats = 0.0
        self._same, self._done = 0, 0
        self._kls: list[Tensor] = []
        self._kept = torch.zeros(layers, dtype=torch.float64)

    def add_routing(self, layer: int, expected_NK: Tensor, actual_NK: Tensor) -> None:
        met_NKK = expected_NK.unsqueeze(2) == actual_NK.unsqueeze(1)
        self._kept[layer] += met_NKK.any(dim=2).double().mean(dim=1).sum()

    def add_tokens(self, reference_NV: Tensor, candidate_NV: Tensor, labels_N: Tensor) -> None:
        log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (reference_NV, candidate_NV))
        chosen = labels_N.unsqueeze(1)
        self._reference_nats -= float(log_p.gather(1, chosen).sum())
        self._nats -= float(log_q.gather(1, chosen).sum())
        self._same += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
        self._kls.append(((log_p - log_q) * log_p.exp()).sum(dim=-1).cpu())
        self._done += len(labels_N)

    def show(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)

    def report(self) -> Report:
        total, kl_N = self._total, torch.cat(self._kls)
        return Report(
            tokens=total,
            reference_perplexity=math.exp(self._reference_nats / total),
            perplexity=math.exp(self._nats / total),
            kl_mean=float(kl_N.mean()),
            kl_p99=float(kl_N.quantile(0.99)) if total < 2**24 else float(kl_N.sort().values[int(0.99 * total)]),
            same_top_token=self._same / total,
            routing_agreement=tuple((self._kept / total).tolist()),
        )


def _batches(token_ids: list[int], length: int) -> list[Tensor]:
    """Windows of `length` + 1 ids that overlap by one, several per batch; a shorter last one comes alone."""
    ids = torch.tensor(token_ids, dtype=torch.long)
    full = (len(ids) - 1) // length
    windows = ids[: full * length + 1].unfold(0, length + 1, length) if full else ids.new_empty(0, length + 1)
    batches = list(windows.split(max(1, BATCH_TOKENS // length))) if full else []
    rest = ids[full * length :]
    return [*batches, rest.unsqueeze(0)] if len(rest) > 1 else batches
