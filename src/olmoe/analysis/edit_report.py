"""What an edit costs and what it saves: the edited model, or the model under a router policy, against the original.

Both read the same held-out texts in windows; the numbers are those of `olmoe.analysis.quality`. An edited model's
experts are identified by their origin: routing agrees if a token chooses an expert that it chose in the original, or
one that this was merged into, in the layer that the edited one comes from.

The schema ("olmoe-edit-report-1") of `EditReport.to_dict`:

    schema, original, edited          names
    policy                            the policy's file, if one was measured
    models.{original, edited}         layers, experts, top_k, file_bytes, bytes_a_token,
                                      prompt_tokens_per_s, decode_tokens_per_s (if speed was measured)
    texts.NAME                        the numbers of `quality.Report`; routing_agreement has one number per layer
    texts.NAME.load.{original, edited}      the share of tokens that choose each expert, by layer (Eq. 7)

Shapes legend: N tokens, L layers, K experts per token, E experts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olmoe.analysis import metrics
from olmoe.analysis.quality import WINDOW, Report, Side, compare_sides
from olmoe.errors import UserError
from olmoe.io.json_file import read_object
from olmoe.ops.dispatch import AUTO
from olmoe.runner import Batch, CacheView, Want, make_runner
from olmoe.runner.policy import ResolvedPolicy
from olmoe.runner.policy_file import read_policy
from olmoe.runtime import inference_mode, resolve_dtype
from olmoe.weights import sample_text
from olmoe.weights.blueprint import FILE_NAME, Blueprint
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.contents import bytes_a_token
from olmoe.weights.hf_folder import HFFolder
from olmoe.weights.packed_file import PackedFile
from olmoe.weights.source import tokenizer_of

SCHEMA = "olmoe-edit-report-1"
TOKENS = 16384
# For timings: tokens of the prompt, new tokens after it, rounds over which the median is taken.
PROMPT, STEPS, ROUNDS = 256, 32, 5

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Model:
    """One of the two models: its size, and its speed if that was measured."""

    layers: int
    experts: int
    top_k: int
    file_bytes: int
    bytes_a_token: int
    prompt_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True)
class OnText:
    """Both models on one text: how far they differ, and the load of each, (L, E) as from `metrics.load`."""

    quality: Report
    original_load: Floats
    edited_load: Floats


@dataclass(frozen=True)
class EditReport:
    """The edited model against the original. `policy` is set if the same weights were measured under one."""

    names: tuple[str, str]
    policy: str | None
    original: Model
    edited: Model
    texts: Mapping[str, OnText]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, by the schema above."""

        def on_text(text: OnText) -> dict[str, Any]:
            load = {"original": text.original_load.tolist(), "edited": text.edited_load.tolist()}
            return text.quality.to_dict() | {"load": load}

        found: dict[str, Any] = {"schema": SCHEMA, "original": self.names[0], "edited": self.names[1]}
        if self.policy is not None:
            found["policy"] = self.policy
        return found | {
            "models": {"original": asdict(self.original), "edited": asdict(self.edited)},
            "texts": {name: on_text(text) for name, text in self.texts.items()},
        }

    def table(self) -> str:
        """Three Markdown tables: sizes and speed, quality by text, and how evenly experts are used by text."""
        return "\n\n".join((self._sizes(), self._quality(), self._loads()))

    def _sizes(self) -> str:
        one, other = self.original, self.edited
        rows = [
            ("layers", f"{one.layers}", f"{other.layers}", ""),
            ("experts per layer", f"{one.experts}", f"{other.experts}", ""),
            ("experts per token", f"{one.top_k}", f"{other.top_k}", ""),
            _compared("bytes on disk", one.file_bytes, other.file_bytes),
            _compared("bytes a token reads", one.bytes_a_token, other.bytes_a_token),
        ]
        for what, a, b in (
            ("prompt, tokens/s", one.prompt_tokens_per_s, other.prompt_tokens_per_s),
            ("decoding, tokens/s", one.decode_tokens_per_s, other.decode_tokens_per_s),
        ):
            if a is not None and b is not None:
                rows.append((what, f"{a:,.1f}", f"{b:,.1f}", f"{b / a - 1:+.1%}"))
        return _table(("", "original", "policy" if self.policy else "edited", "change"), rows)

    def _quality(self) -> str:
        rows = []
        for name, text in self.texts.items():
            found = text.quality
            rows.append(
                (
                    name,
                    f"{found.tokens:,}",
                    f"{found.reference_perplexity:.3f}",
                    f"{found.perplexity:.3f} ({found.perplexity / found.reference_perplexity - 1:+.2%})",
                    f"{found.kl_mean:.4f}",
                    f"{found.kl_p99:.4f}",
                    f"{found.same_top_token:.2%}",
                    f"{found.routing_mean:.2%}",
                )
            )
        head = (
            "text",
            "tokens",
            "perplexity, original",
            "edited",
            "KL",
            "KL, 99 %",
            "same first token",
            "same experts",
        )
        return _table(head, rows)

    def _loads(self) -> str:
        rows = []
        for name, text in self.texts.items():
            before, after = (metrics.balance(load) for load in (text.original_load, text.edited_load))
            rows.append(
                (
                    name,
                    *(f"{each.entropy.mean():.3f}" for each in (before, after)),
                    *(f"{each.max_over_mean.mean():.2f}" for each in (before, after)),
                    *(f"{each.dead.sum()}" for each in (before, after)),
                )
            )
        return _table(
            ("load of experts", "entropy, original", "edited", "busiest / mean", "edited", "never chosen", "edited"),
            rows,
        )


def measure_edit(
    original: str | os.PathLike[str],
    edited: str | os.PathLike[str] | None = None,
    *,
    policy: str | os.PathLike[str] | None = None,
    texts: Mapping[str, str | os.PathLike[str]] | None = None,
    tokens: int = TOKENS,
    speed: bool = True,
    backend: str = AUTO,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> EditReport:
    """Compare what `olmoe.analysis.surgery.edit` wrote with its original, or a model under a `policy` with itself.

    `texts` are files by name, read up to `tokens` tokens each; the default is a short public-domain sample. Models are
    loaded as stored (None) or in a `dtype`, both at once, and run on `backend`. `speed` briefly times prompts and
    decoding of both in turn; it is only meaningful if nothing else runs on the machine.
    `progress(done, total)` is called in tokens.
    """
    if (edited is None) == (policy is None):
        raise UserError("A report is about an edited model or a router policy; give one of them.")
    texts = {"sample": sample_text.HELD_OUT} if texts is None else texts
    if tokens < 2 or not texts:
        raise UserError(f"A report needs texts of at least 2 tokens, not {tokens} tokens of {len(texts)} texts.")
    options: dict[str, Any] = {"token": token, "local_files_only": local_files_only}
    first = Checkpoint.open(os.fspath(original), revision=revision, **options)
    second = first if edited is None else Checkpoint.open(os.fspath(edited), **options)
    blueprint = _blueprint(first, second)
    resolved = None if policy is None else read_policy(os.path.expanduser(policy)).resolve(first.config)
    tokenizer = tokenizer_of(first.source())
    ids = {name: sample_text.read_ids(path, tokenizer)[:tokens] for name, path in texts.items()}

    runner = make_runner(first.load(dtype=resolve_dtype(dtype)), backend)
    other = runner if second is first else make_runner(second.load(dtype=resolve_dtype(dtype)), backend)
    sides = (Side(runner), Side(other, policy=resolved))
    total, done, found = sum(len(each) - 1 for each in ids.values()), 0, {}
    for name, each in ids.items():
        before = done

        def advance(now: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + now, total)

        found[name] = _on_text(sides, each, blueprint, advance)
        done += len(each) - 1
    speeds = _speeds(sides) if speed else [(None, None), (None, None)]
    return EditReport(
        (_name(first), _name(second)),
        None if policy is None else Path(policy).name,
        _model(first, None, *speeds[0]),
        _model(second, resolved, *speeds[1]),
        found,
    )


def _blueprint(original: Checkpoint, edited: Checkpoint) -> Blueprint:
    """What became of the original's experts. Raises `UserError` if that is not known."""
    path = edited.folder / FILE_NAME
    if edited is original:
        return Blueprint.unchanged(original.config)
    if not path.is_file():
        shapes = [(c.config.num_hidden_layers, c.config.num_experts) for c in (original, edited)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{edited.folder} has no {FILE_NAME}, which says what its experts were; only what olmoe edit wrote, or "
                "a model with as many layers and experts, can be compared."
            )
        return Blueprint.unchanged(original.config)
    try:
        return Blueprint.from_dict(read_object(path), original.config)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a JSON object ({error}); edit the model again.") from None


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.folder.resolve().name


def _model(checkpoint: Checkpoint, policy: ResolvedPolicy | None, prompt: float | None, decode: float | None) -> Model:
    config = checkpoint.config
    top_k = config.num_experts_per_tok if policy is None else policy.top_k
    source = cast(HFFolder | PackedFile, checkpoint.source())
    return Model(
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        top_k=top_k,
        file_bytes=checkpoint.num_bytes,
        bytes_a_token=bytes_a_token(source, top_k),
        prompt_tokens_per_s=prompt,
        decode_tokens_per_s=decode,
    )


def _on_text(sides: tuple[Side, Side], ids: list[int], blueprint: Blueprint, progress: Progress) -> OnText:
    """The two models on one text."""
    configs = [side.runner.config for side in sides]
    counts = [np.zeros((config.num_hidden_layers, config.num_experts), dtype=np.int64) for config in configs]
    members = _members(blueprint)

    def pairs(expected_NLK: Tensor, actual_NLK: Tensor) -> list[tuple[Tensor, Tensor]]:
        for count, config, chosen in zip(counts, configs, (expected_NLK, actual_NLK), strict=True):
            count += metrics.counts(chosen.numpy(), config.num_experts)
        return [
            (expected_NLK[:, plan.origin], _were(actual_NLK[:, layer], members[layer]))
            for layer, plan in enumerate(blueprint.layers)
        ]

    length = min(WINDOW, *(config.max_position_embeddings for config in configs))
    report = compare_sides(*sides, ids, length, pairs=pairs, progress=progress)
    loads = [count / report.tokens for count in counts]
    return OnText(report, loads[0], loads[1])


def _members(blueprint: Blueprint) -> list[Tensor]:
    """For each layer the original experts that each of its own consists of, (E, most), padded with -1.

    The last row is for no expert: the index -1 leads to it.
    """
    found = []
    for plan in blueprint.layers:
        most = max(len(mix.experts) for mix in plan.experts)
        rows = [[*mix.experts, *[-1] * (most - len(mix.experts))] for mix in plan.experts]
        found.append(torch.tensor([*rows, [-1] * most]))
    return found


def _were(chosen_NK: Tensor, members: Tensor) -> Tensor:
    """Experts of an edited layer as experts of the original: (N, K) -> (N, K * most)."""
    return members[chosen_NK.long()].flatten(1)


# ---- speed ----


def _speeds(sides: Sequence[Side]) -> list[tuple[float, float]]:
    """Tokens per second for a prompt and for decoding after it, for each side: medians of alternating rounds."""
    context = min(int(side.runner.config.max_position_embeddings * side.runner.config.rope.factor) for side in sides)
    prompt = max(1, min(PROMPT, context - STEPS))
    steps = max(1, min(STEPS, context - prompt))
    times: list[list[tuple[float, float]]] = [[] for _ in sides]
    for turn in range(ROUNDS + 1):
        for side, taken in zip(sides, times, strict=True):
            found = _timed(side, prompt, steps)
            if turn:  # the first call of anything is slower
                taken.append(found)
    return [
        (prompt / statistics.median(a for a, _ in taken), steps / statistics.median(b for _, b in taken))
        for taken in times
    ]


@inference_mode
def _timed(side: Side, prompt: int, steps: int) -> tuple[float, float]:
    """Seconds for a prompt of random ids, and for steps after it."""
    runner = side.runner
    blocks = runner.new_cache(1, prompt + steps, side.cache_dtype)
    view = CacheView(blocks, np.arange(blocks.blocks, dtype=np.int32)[None])
    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, prompt + steps).tolist()
    started = time.perf_counter()
    for first in range(0, prompt, runner.chunk_tokens):
        part = ids[first : min(prompt, first + runner.chunk_tokens)]
        runner.forward(Batch(part, [len(part)], [first], [prompt], [side.policy]), view, Want([len(part) - 1]))
    between = time.perf_counter()
    for length in range(prompt, prompt + steps):
        runner.forward(Batch([ids[length]], [1], [length], None, [side.policy]), view, Want([0]))
    return between - started, time.perf_counter() - between


# ---- tables ----


def _compared(what: str, before: int, after: int) -> tuple[str, str, str, str]:
    return what, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with numbers aligned to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *rows))
