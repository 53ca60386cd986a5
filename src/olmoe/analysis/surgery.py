"""Edits of a model's weights, saved as an ordinary checkpoint: prune, merge or move experts, copy layers, change k.

    >>> edit("allenai/OLMoE-1B-7B-0924", "pruned", Edits(prune=16))                   # doctest: +SKIP
    >>> edit("olmoe-tiny", "out", Edits(merge=8, top_k=4), calibration=["a.txt"])     # doctest: +SKIP

Choices that depend on what experts do are made on calibration text, which runs through the original once. Edits of one
call apply in the order of the fields of `Edits`, whatever order they are named in.

Shapes legend: L layers, E experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from olmoe.analysis.contributions import Contributions, measure_contributions, weight_similarity
from olmoe.errors import UserError, shown
from olmoe.io import targets
from olmoe.io.documents import read_documents
from olmoe.io.text_file import read_text
from olmoe.weights import sample_text
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.edited import EditedSource, check_target, write
from olmoe.weights.hf_folder import HFFolder
from olmoe.weights.packed_file import PackedFile
from olmoe.weights.source import WeightSource, tokenizer_of

# Numbers of experts: the same for all layers, or by layer, in which case every layer must be named.
Lists = Sequence[int] | Sequence[Sequence[int]] | Mapping[int, Sequence[int]]
Texts = Sequence[str | os.PathLike[str]]
Progress = Callable[[int, int], None]

CRITERIA = ("reap", "load", "random")
# Tokens of calibration text, and tokens that the model reads at once.
TOKENS, WINDOW = 8192, 512


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What to change; the fields apply in this order, and those that are None or empty change nothing.

    - `prune`: the number of experts to remove from each layer, the least useful ones by `by`; or lists of experts.
    - `by`: "reap" (by the mean of weight times norm of output over the tokens that choose an expert), "load" (by the
      share of tokens that do), or "random" (a control, drawn with `seed`).
    - `merge`: the number by which the experts of each layer are reduced, by averaging the most similar ones.
    - `reorder`: "load" puts the busiest first; lists give the order.
    - `layers`: the numbers of the layers in their new order; omits, moves and repeats layers.
    - `duplicate_layers`: each of these is followed by a copy. Numbers are those after `layers`.
    - `top_k`, `normalize_top_k`: experts per token, and whether their probabilities are divided by their sum.
    """

    prune: int | Lists | None = None
    by: str = "reap"
    merge: int | None = None
    reorder: Literal["load"] | Lists | None = None
    layers: Sequence[int] | None = None
    duplicate_layers: Sequence[int] = ()
    top_k: int | None = None
    normalize_top_k: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in CRITERIA:
            raise UserError(f"Experts cannot be pruned by {self.by!r}; choose one of {', '.join(CRITERIA)}.")
        if isinstance(self.reorder, str) and self.reorder != "load":
            raise UserError(f"Experts cannot be ordered by {self.reorder!r}; choose load, or give lists.")

    @property
    def needs_text(self) -> bool:
        """Whether any choice depends on what experts do on text, and cannot be made without it."""
        return (isinstance(self.prune, int) and self.by != "random") or self.reorder == "load"

    def named(self) -> dict[str, Any]:
        """The fields that change something, for JSON."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if not isinstance(self.prune, int):
            del given["by"]
        if given.get("by") != "random":
            del given["seed"]
        return {name: value for name, value in given.items() if value is not None and _size(value) != 0}


def edit(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    edits: Edits,
    *,
    calibration: Texts | None = (sample_text.CALIBRATION,),
    tokens: int = TOKENS,
    overwrite: bool = False,
    progress: Progress | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Blueprint:
    """Write the edited model to the folder `target`, and return what it is made of.

    `model` is a checkpoint folder or a hub id, packed or not. `calibration` is a list of text files (UTF-8, or .jsonl
    with text or messages), from which `tokens` are read in equal parts; the default is a short public-domain sample.
    None does without: nothing can then be chosen by load or output, and experts are merged by the similarity of their
    weights. `progress(done, total)` is called first for calibration, then for writing.

    An ordinary checkpoint gives an ordinary one and a packed one a packed one (see `olmoe.weights.edited.write`). The
    folder is written whole or not at all. Raises `UserError` subclasses for errors in model, target, text or edits;
    those that can be found without reading weights are raised before any are read.
    """
    target = Path(os.path.expanduser(target))
    if not overwrite:  # before a model is downloaded
        targets.check_folder(target, (), overwrite=False)
    checkpoint = Checkpoint.open(os.fspath(model), revision=revision, token=token, local_files_only=local_files_only)
    source = cast(HFFolder | PackedFile, checkpoint.source())
    check_target(EditedSource(source, Blueprint.unchanged(source.config)), target, overwrite=overwrite)
    blueprint = plan(source, edits, calibration=calibration, tokens=tokens, progress=progress)
    notes = {"model": source.path.resolve().name, "edits": _listed(edits.named())}
    write(EditedSource(source, blueprint, notes), target, overwrite=overwrite, progress=progress)
    return blueprint


def plan(
    source: WeightSource,
    edits: Edits,
    *,
    calibration: Texts | None = (sample_text.CALIBRATION,),
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> Blueprint:
    """The blueprint of the edited model; see `edit`."""
    if not edits.named():
        raise UserError("Nothing is to be edited; say what: prune, merge, reorder, layers, duplicate-layers or top-k.")
    _rehearse(source, edits)
    found = None
    if edits.needs_text or (edits.merge and calibration is not None):
        if calibration is None:
            raise UserError(
                "Experts are chosen by what they do on text, but there is none; give calibration text, or prune by "
                "lists or at random."
            )
        windows = calibration_windows(source, calibration, tokens)
        found = measure_contributions(source, windows, similarity=bool(edits.merge), progress=progress)
    elif edits.merge:
        shape = (source.config.num_hidden_layers, source.config.num_experts)
        found = Contributions(0, np.zeros(shape), np.zeros(shape), weight_similarity(source, progress))
    return apply(Blueprint.unchanged(source.config), edits, found)


def _rehearse(source: WeightSource, edits: Edits) -> None:
    """Raise what the edits would raise, before anything is computed, by applying them to meaningless numbers."""
    config = source.config
    shape = (config.num_hidden_layers, config.num_experts)
    zeros = np.zeros((*shape, config.num_experts))
    _ = apply(Blueprint.unchanged(config), edits, Contributions(0, zeros[..., 0], zeros[..., 0], zeros)).config


def apply(blueprint: Blueprint, edits: Edits, found: Contributions | None) -> Blueprint:
    """Apply edits in their order, with what is known about the original's experts if they need it."""
    if edits.prune is not None:
        blueprint = blueprint.without(_pruned(blueprint, edits, found))
    if edits.merge is not None:
        assert found is not None
        assert found.similarity is not None
        _check_count(edits.merge, blueprint, "merge")
        groups = [
            group_alike(found.similarity[layer.origin], [mix.experts for mix in layer.experts], edits.merge)
            for layer in blueprint.layers
        ]
        blueprint = blueprint.merged(groups, found.load.tolist())
    if edits.reorder is not None:
        blueprint = blueprint.reordered(_orders(blueprint, edits.reorder, found))
    if edits.layers is not None:
        blueprint = blueprint.with_layers(edits.layers)
    blueprint = blueprint.with_copies(edits.duplicate_layers)
    return blueprint.with_routing(edits.top_k, edits.normalize_top_k)


def calibration_windows(source: WeightSource, texts: Texts, tokens: int = TOKENS) -> torch.Tensor:
    """Windows of token ids (B, T) from text files, about as many from each file, at most `tokens`.

    Raises `UserError` for a text that cannot be read or is empty.
    """
    if tokens < 1:
        raise UserError(f"The number of calibration tokens must be at least 1, not {tokens}.")
    tokenizer, ids = tokenizer_of(source), list[int]()
    for path in texts:
        own: list[int] = []
        for document in read_documents(Path(os.path.expanduser(path))):
            own += sample_text.ids_of([document], tokenizer)
            if len(own) >= -(-tokens // len(texts)):
                break
        if not own:
            raise UserError(f"The text {path} is empty; give one with at least a few sentences.")
        ids += own[: -(-tokens // len(texts))]
    if not ids:
        raise UserError("There is no calibration text; give at least one file.")
    length = min(WINDOW, source.config.max_position_embeddings, tokens)
    return torch.tensor(sample_text.windows(ids, length, tokens // length))


def read_lists(path: str | os.PathLike[str]) -> Lists:
    """`Lists` in a JSON file: `[3, 7]` for all layers, `[[3, 7], [1, 2]]` or `{"0": [3, 7], "1": [1, 2]}` by layer."""
    path = Path(os.path.expanduser(path))
    try:
        found = json.loads(read_text(path))
        if isinstance(found, dict):
            return {int(key): value for key, value in found.items()}
    except OSError as error:
        raise UserError(f"The lists of experts {path} cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold lists of experts in JSON ({error}).") from None
    if not isinstance(found, list):
        raise UserError(f"{path} must hold lists of numbers of experts, not {shown(found)}.")
    return found


# ---- choosing experts ----


def _pruned(blueprint: Blueprint, edits: Edits, found: Contributions | None) -> list[list[int]]:
    """The experts to leave out of each layer."""
    prune = edits.prune
    if not isinstance(prune, int):
        return by_layer(prune, blueprint)
    _check_count(prune, blueprint, "prune")
    if edits.by == "random":
        generator = np.random.default_rng(edits.seed)
        return [sorted(generator.permutation(blueprint.num_experts)[:prune].tolist()) for _ in blueprint.layers]
    assert found is not None
    return least(found.load if edits.by == "load" else found.reap, prune)


def least(scores_LE: npt.NDArray[np.floating[Any]], count: int) -> list[list[int]]:
    """The `count` experts of each layer with the lowest scores; among equal ones, those with the highest numbers."""
    order = np.argsort(scores_LE[:, ::-1], axis=1, kind="stable")[:, :count]
    return [sorted((scores_LE.shape[1] - 1 - row).tolist()) for row in order]


def group_alike(
    similarity_EE: npt.NDArray[np.floating[Any]], members: Sequence[Sequence[int]], fewer: int
) -> list[list[int]]:
    """Groups of two or more `members`, such that merging each group reduces their number by `fewer`.

    Members are experts, or sets of already merged ones, by their rows of `similarity_EE`. The two groups that are most
    similar on average over their pairs are joined repeatedly (hierarchical clustering with average linkage); among
    equal pairs, those with the lowest numbers.
    """
    groups = [[i] for i in range(len(members))]
    experts = [list(each) for each in members]
    # Sums over pairs, since those of a joined group are the sums of its parts.
    sums = np.array([[similarity_EE[np.ix_(a, b)].sum() for b in experts] for a in experts], dtype=np.float64)
    sizes = np.array([len(each) for each in experts], dtype=np.float64)
    for _ in range(fewer):
        means = sums / np.outer(sizes, sizes)
        means[np.tril_indices(len(means))] = -np.inf
        a, b = divmod(int(means.argmax()), len(means))
        groups[a] += groups.pop(b)
        sums[a] += sums[b]
        sums[:, a] += sums[:, b]
        sums = np.delete(np.delete(sums, b, axis=0), b, axis=1)
        sizes[a] += sizes[b]
        sizes = np.delete(sizes, b)
    return [sorted(group) for group in groups if len(group) > 1]


def _orders(blueprint: Blueprint, reorder: str | Lists, found: Contributions | None) -> list[list[int]]:
    """The order of the experts of each layer."""
    if not isinstance(reorder, str):
        return by_layer(reorder, blueprint)
    assert found is not None
    orders = []
    for layer in blueprint.layers:
        load = [sum(float(found.load[layer.origin, e]) for e in mix.experts) for mix in layer.experts]
        orders.append(sorted(range(len(load)), key=lambda e: (-load[e], e)))
    return orders


def by_layer(lists: Any, blueprint: Blueprint) -> list[list[int]]:
    """`Lists` as a list for each layer. Raises `UserError` if layers are missing or unknown, or for anything else."""
    count = len(blueprint.layers)
    if isinstance(lists, Mapping):
        for key in lists:
            if key not in range(count):
                raise UserError(f"There is no layer {key}; the model's are 0 to {count - 1}.")
        missing = [i for i in range(count) if i not in lists]
        if missing:
            raise UserError(
                f"The lists name no experts of layer {missing[0]}, but all layers of a checkpoint have the same number "
                "of experts; give every layer a list."
            )
        lists = [lists[i] for i in range(count)]
    elif isinstance(lists, Sequence) and all(_is_number(e) for e in lists):
        lists = [lists] * count
    if not isinstance(lists, Sequence) or not all(
        isinstance(each, Sequence) and all(map(_is_number, each)) for each in lists
    ):
        raise UserError(f"Experts are named in lists of numbers, one for each layer or for all, not as {shown(lists)}.")
    if len(lists) != count:
        raise UserError(f"There are {len(lists)} lists of experts, but {count} layers; give one per layer.")
    return [list(each) for each in lists]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_count(count: int, blueprint: Blueprint, what: str) -> None:
    if not 0 <= count < blueprint.num_experts:
        raise UserError(
            f"A layer has {blueprint.num_experts} experts, so {what} must be from 0 to {blueprint.num_experts - 1}, "
            f"not {count}."
        )


def _size(value: Any) -> int | None:
    """The length of anything that has one."""
    return len(value) if isinstance(value, Sized) else None


def _listed(value: Any) -> Any:
    """Sequences as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _listed(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_listed(each) for each in value]
    return int(value) if _is_number(value) else value
