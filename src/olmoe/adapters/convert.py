"""An adapter for other software: merged into its model, in PEFT's other layout, or as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch

from olmoe.adapters.files import CONFIG_NAME, WEIGHTS_NAME, base_of, read_adapter, write_adapter
from olmoe.adapters.gguf import write_gguf_adapter
from olmoe.adapters.merge import merge
from olmoe.errors import UserError
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder
from olmoe.tokenizer import chat_templates
from olmoe.weights import export
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.source import texts_of


def open_base(folder: Path, base: str | None, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """The model that an adapter belongs to: `base`, or else the one that the adapter names."""
    return Checkpoint.open(base or base_of(folder), revision=revision, local_files_only=offline)


def merge_to_folder(
    folder: Path, base: Checkpoint, target: Path, dtype: torch.dtype | None = None, *, overwrite: bool = False
) -> None:
    """Write the model with the adapter in `folder` added to its weights, as an ordinary checkpoint.

    `dtype` is that of the written weights, by default the base's. The adapter's tokenizer and chat template replace
    the base's. Raises `UserError` for a packed base.
    """
    if base.layout is not None:
        raise UserError(
            f"{base.folder} is packed, so an adapter cannot be added to its weights; give the checkpoint that it was "
            "packed from with --base, and pack the result."
        )
    adapter = read_adapter(folder, base.config)
    model = base.load()
    kept = next(model.parameters()).dtype
    merge(model, adapter)
    files = texts_of(base.folder)
    if chat_templates(folder):
        files.pop("chat_template.jinja", None)  # which would win over one in the adapter's tokenizer_config.json
    files = {name: text for name, text in (files | texts_of(folder)).items() if "/" not in name}
    files.pop("generation_config.json", None)  # it is derived
    if not overwrite:
        targets.check_folder(target, (), overwrite=False)
    export.save(model, target, dtype=dtype or kept, extra_files=files, overwrite=overwrite)


def convert_layout(folder: Path, base: Checkpoint, target: Path, layout: str, *, overwrite: bool = False) -> None:
    """Write the adapter in `folder` in PEFT's "fused" or "per_expert" layout, with its tokenizer's files."""
    adapter, files = read_adapter(folder, base.config), texts_of(folder)
    targets.check_folder(target, {CONFIG_NAME, WEIGHTS_NAME, *files}, overwrite=overwrite, source=folder)
    with atomic_folder(target) as temporary:
        write_adapter(adapter, temporary, base_of(folder), layout)
        for name, text in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")


def convert_to_gguf(folder: Path, base: Checkpoint, target: Path, *, overwrite: bool = False) -> None:
    """Write the adapter in `folder` as a GGUF file."""
    targets.check_file(target, overwrite=overwrite)
    write_gguf_adapter(read_adapter(folder, base.config), base.config, target, folder.resolve().name)
