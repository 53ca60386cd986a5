"""Small packed checkpoints for tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from conftest import make_model
from olmoe.model import CausalLM
from olmoe.weights import export
from olmoe.weights.checkpoint import open_source
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES

# Every matrix has whole blocks of 32 columns; small_config's own experts (12 wide) do not in down_proj.
WHOLE = {"intermediate_size": 32}


def plain_folder(folder: Path, tokenizer_file: Path | None = None, **changes: Any) -> Path:
    """An ordinary bf16 checkpoint of a small random model."""
    export.save(make_model(**changes), folder, dtype=torch.bfloat16)
    if tokenizer_file is not None:
        shutil.copy(tokenizer_file, folder / "tokenizer.json")
    return folder


def packed_folder(folder: Path, recipe: str = "int4", tokenizer_file: Path | None = None, **changes: Any) -> Path:
    """A packed checkpoint of the same model; `folder`-plain beside it holds the ordinary one."""
    plain = plain_folder(folder.with_name(f"{folder.name}-plain"), tokenizer_file, **changes)
    pack(open_source(plain), folder, RECIPES[recipe])
    return folder


def decoded(model: CausalLM) -> CausalLM:
    """An ordinary model, in fp32, with the weights that a packed one decodes to."""
    from olmoe.quant import PackedModule

    plain = CausalLM(model.config).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if not isinstance(module, PackedModule) or leaf not in module.shapes:
                parameter.copy_(module.get_parameter(leaf))
            elif parameter.dim() == 3:
                parameter.copy_(torch.stack([module.decode(leaf, torch.float32, e) for e in range(len(parameter))]))
            else:
                parameter.copy_(module.decode(leaf, torch.float32))
    return plain
