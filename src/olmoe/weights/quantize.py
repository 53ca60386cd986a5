"""Packing a model: from any weight source into a packed folder, one matrix at a time.

Only one matrix, one expert and the small tensors are in memory. With calibration text, a forward pass
(`olmoe.weights.calibrate`) finds the inputs of each matrix, and codes are chosen by them (`olmoe.quant.search`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from olmoe.config import read_object
from olmoe.errors import CheckpointError, UserError, shown
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder
from olmoe.io.documents import Chat
from olmoe.io.tensor_file import TensorWriter
from olmoe.quant import BlockFormat, Format, layout_formats, search
from olmoe.quant.formats import CODES
from olmoe.quant.modules import part_name
from olmoe.runtime import inference_mode
from olmoe.weights import packed_file, sample_text
from olmoe.weights.calibrate import Calibrated, calibrate
from olmoe.weights.checkpoint import open_source
from olmoe.weights.contents import Packed, describe
from olmoe.weights.recipes import BASE_RECIPES, RECIPES, BaseRecipe, Recipe
from olmoe.weights.source import BlockSource, WeightSource, read_finite, tokenizer_of
from olmoe.weights.table import Row, TensorTable

# Tokens that recipes are calibrated on; more take time, and hardly help.
CALIBRATION_TOKENS = 8192
WINDOW = 512


def quantize(
    source: str | os.PathLike[str] | WeightSource,
    target: str | os.PathLike[str],
    format: str | Recipe | BaseRecipe = "int4",
    *,
    calibration: str | os.PathLike[str] | Iterable[str | Chat] | None = sample_text.CALIBRATION,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Packed:
    """Pack a model into a folder with fewer bits per weight, which `LLM`, `OlmoeForCausalLM` and all commands load.

    >>> olmoe.quantize("allenai/OLMoE-1B-7B-0924", "olmoe-int4").bits_per_weight     # doctest: +SKIP

    `source` is a checkpoint folder, a hub id (at `revision`, with `token`; `local_files_only` downloads nothing), a
    .gguf file, or an open `WeightSource`. `format` is "int4", "int4-high", "int8", "q4_0", a `Recipe`, or the name of a
    weight format, which is then used for every matrix; "nf4" and "nf4-double" are for training adapters on top.

    `calibration` is text like what the model will be used on, for recipes that choose codes by their effect (int4 and
    int4-high): a file (text, or .jsonl with text or messages), or texts and chats themselves. The default is a short
    public-domain sample; None does without. `progress(done, total)` is called after each matrix, in weights.

    `target` is written whole or not at all. An existing one is refused unless `overwrite`, and then only files of a
    model are replaced. Raises `UserError` subclasses for errors in source, target or text.
    """
    recipe = _recipe(format)
    target = Path(os.path.expanduser(target))
    if not overwrite:  # before a source is fetched
        path = os.path.expanduser(source) if isinstance(source, str | os.PathLike) else source.path
        targets.check_folder(target, (), overwrite=False, source=path)
    if isinstance(source, str | os.PathLike):
        source = open_source(source, revision=revision, token=token, local_files_only=local_files_only)
    # Before hours of work, and without `pack`'s exception for its own folders.
    names = {packed_file.FILE_NAME, "config.json", *source.files()}
    targets.check_folder(target, names, overwrite=overwrite, source=source.path)
    windows = None
    if recipe.searches and calibration is not None:
        windows = _windows(source, calibration)
    return pack(source, target, recipe, windows, progress, overwrite=overwrite)


def _recipe(format: str | Recipe | BaseRecipe) -> Recipe | BaseRecipe:
    """The recipe of this name. Raises `UserError` if there is none."""
    if isinstance(format, Recipe | BaseRecipe):
        return format
    if isinstance(format, str) and format in BASE_RECIPES:
        return BASE_RECIPES[format]
    if isinstance(format, str) and format in RECIPES:
        return RECIPES[format]
    if isinstance(format, str) and format in layout_formats():
        return Recipe(format, format)
    known = dict.fromkeys((*RECIPES, *BASE_RECIPES, *layout_formats()))
    raise UserError(f"Nothing can be packed as {shown(format)}; choose one of {', '.join(known)}.")


def _windows(source: WeightSource, calibration: str | os.PathLike[str] | Iterable[str | Chat]) -> list[list[int]]:
    """Windows of calibration text as token ids, all of the same length."""
    tokenizer = tokenizer_of(source)
    if isinstance(calibration, str | os.PathLike):
        ids = sample_text.read_ids(calibration, tokenizer)
    else:
        ids = sample_text.ids_of(calibration, tokenizer)
        if not ids:
            raise UserError("The calibration text is empty; give a few sentences, or calibration=None to do without.")
    length = min(WINDOW, source.config.max_position_embeddings)
    return sample_text.windows(ids, length, CALIBRATION_TOKENS // length)


def pack(
    source: WeightSource,
    target: Path,
    recipe: Recipe | BaseRecipe,
    calibration: list[list[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
) -> Packed:
    """Write the packed folder `target`, whole or not at all.

    An old packed folder is replaced if it holds nothing else; another checkpoint is replaced only with `overwrite`,
    and files that packing does not write itself never are.

    `calibration` is a list of windows of token ids (of equal length), used by recipes that search.
    `progress(done, total)` is called after each matrix, in weights. Raises `UserError` subclasses for errors in source
    or target.
    """
    target = Path(os.path.expanduser(target))
    texts = source.files()
    names = {*texts, packed_file.FILE_NAME, "config.json"}
    _check_target(source, target, names, overwrite)
    layout = recipe.layout() if isinstance(recipe, Recipe) else recipe.layout(source.config)
    table = TensorTable(source.config, layout)
    plain = {name: source.read(name, row.first_expert).dtype for name, row in table.items() if row.format is None}
    tensors = packed_file.file_tensors(table, plain)
    known = calibrate(source, torch.tensor(calibration)) if calibration and recipe.searches else ()
    with atomic_folder(target) as temporary:
        with packed_file.writer(temporary / packed_file.FILE_NAME, tensors) as out:
            _write(out, table, source, recipe, known, progress)
        for name, text in texts.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        text = packed_file.config_text(source.config, layout, tensors["model.norm.weight"][1])
        (temporary / "config.json").write_text(text, encoding="utf-8")
        size = (temporary / packed_file.FILE_NAME).stat().st_size
        # Again: hours may have passed, and something may have appeared there.
        _check_target(source, target, names, overwrite)
    return describe(table, tensors, size)


def _check_target(source: WeightSource, target: Path, names: set[str], overwrite: bool) -> None:
    """Raise `UserError` if packing into `target` would lose anything; see `pack`."""
    targets.check_is_checkpoint(target, "packing")
    config = target / "config.json"
    if not overwrite and config.is_file() and packed_file.is_packed(read_object(config)):
        overwrite = not targets.foreign_entries(target, names)
    targets.check_folder(target, names, overwrite=overwrite, source=source.path)


@inference_mode
def _write(
    out: TensorWriter,
    table: TensorTable,
    source: WeightSource,
    recipe: Recipe | BaseRecipe,
    known: Iterable[Calibrated],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Encode and write every matrix: first those with `known` inputs, in that order, then all others."""
    left, done = dict.fromkeys(table), 0

    def others() -> Iterator[tuple[str, int | None, Tensor | None, search.Inputs | None]]:
        for name in list(left):
            experts = table[name].experts
            yield from ((name, expert, None, None) for expert in ([None] if experts is None else range(experts)))

    for name, expert, weight, inputs in chain(known, others()):
        row = table[name]
        parts = _stored_parts(source, row, expert)
        if parts is None:
            weight = read_finite(source, name, expert) if weight is None else weight
            parts = {CODES: weight} if row.format is None else _encode(row, row.format, weight, recipe, inputs)
        for part, value in parts.items():
            out.write(part_name(name, part), value, (expert or 0) * value.nbytes)
        left.pop(name, None)
        done += math.prod(row.shape)
        if progress is not None:
            progress(done, source.config.num_parameters)


def _encode(
    row: Row, format: Format, weight: Tensor, recipe: Recipe | BaseRecipe, inputs: search.Inputs | None
) -> dict[str, Tensor]:
    """The parts of a matrix."""
    try:
        if recipe.searches and isinstance(format, BlockFormat):
            return {CODES: search.encode(format, weight, inputs)}
        return format.encode(weight)
    except CheckpointError as error:
        raise CheckpointError(f"{row.name}: {error}") from None


def _stored_parts(source: WeightSource, row: Row, expert: int | None) -> dict[str, Tensor] | None:
    """The parts of a matrix if its source already stores it in the target format; else None."""
    if not isinstance(source, BlockSource) or not isinstance(row.format, BlockFormat):
        return None
    if set(source.stored_as(row.name, expert)) != {row.format.name.upper()}:
        return None
    return {CODES: row.format.from_gguf(torch.from_numpy(np.array(source.blocks(row.name, expert))))}
