"""`Checkpoint`: a model on disk in any supported format; and `load`, the shortcut to the model itself.

A folder whose `config.json` has a `quantization_config` is a packed one (`olmoe.weights.packed_file`), one with
`.metadata` was written by several processes (`olmoe.weights.sharded_folder`), others are Hugging Face's
(`olmoe.weights.hf_folder`). Callers need not know which.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from olmoe.config import ModelConfig, read_object
from olmoe.io import hub
from olmoe.model import CausalLM
from olmoe.quant import Layout
from olmoe.weights.hf_folder import HFFolder
from olmoe.weights.packed_file import PackedFile, is_packed
from olmoe.weights.sharded_folder import ShardedFolder, is_sharded
from olmoe.weights.source import WeightSource


class Checkpoint:
    """A model on disk: its configuration and the headers of its weights, each read once."""

    def __init__(self, folder: Path) -> None:
        """Read the headers in `folder`. Raises `CheckpointError` or `ConfigError` if something is wrong with them."""
        raw = read_object(folder / "config.json")
        self.folder = folder
        self._weights: PackedFile | HFFolder | ShardedFolder
        if is_packed(raw):
            self._weights = PackedFile(folder, raw)
        else:
            self._weights = ShardedFolder(folder, raw) if is_sharded(folder) else HFFolder(folder, raw)

    @classmethod
    def open(
        cls,
        model_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """The checkpoint in a folder, or of a hub id, which is downloaded unless it is cached."""
        return cls(hub.resolve(model_id, revision=revision, token=token, local_files_only=local_files_only))

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self._weights.config

    @property
    def layout(self) -> Layout | None:
        """How a packed checkpoint stores its matrices; None for one in floating dtypes."""
        return self._weights.layout

    @property
    def format(self) -> str:
        """How most weights are stored, for display: a dtype, a format, or the recipe that packed them."""
        return self._weights.format

    @property
    def dtypes(self) -> list[str]:
        """Names of the dtypes of its tensors. Raises `CheckpointError` if they do not fit the configuration."""
        return self._weights.dtypes

    @property
    def num_bytes(self) -> int:
        """The size of its weight files."""
        return self._weights.num_bytes

    def source(self) -> WeightSource:
        """The weights one by one. Raises `CheckpointError` if they do not fit the configuration."""
        self._weights.check()
        return self._weights

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> CausalLM:
        """The model; see the function `load` for the arguments and errors."""
        return self._weights.load(dtype=dtype, device=device, progress=progress)


def load(
    model_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load a model from a folder or a hub id, in evaluation mode without gradients.

    `dtype` is that of the parameters in memory; None keeps what is stored. For a packed checkpoint it is the dtype of
    hidden states and products, fp32 by default. `progress(done, total)` is called after each tensor. Raises
    `CheckpointError` or `ConfigError` with one sentence for everything that can be wrong with the files; nothing is
    returned half-loaded.
    """
    found = Checkpoint.open(model_id, revision=revision, token=token, local_files_only=local_files_only)
    return found.load(dtype=dtype, device=device, progress=progress)


def open_source(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> WeightSource:
    """The weight source for a .gguf file, a checkpoint folder, or a hub id."""
    if os.fspath(name).lower().endswith(".gguf"):
        from olmoe.weights.gguf.source import GGUFSource  # needed for nothing else

        return GGUFSource(os.path.expanduser(name))
    where = name if isinstance(name, str) else Path(name)
    return Checkpoint.open(where, revision=revision, token=token, local_files_only=local_files_only).source()
