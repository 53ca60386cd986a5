"""Where weights come from that are read one matrix at a time: what packing and export need, and no more memory.

`FolderSource` reads a checkpoint folder of any layout that `olmoe.weights.checkpoint` knows, packed ones included. GGUF
files have a source of their own (`olmoe.weights.gguf`).

Shapes legend: D hidden, E experts, F expert width.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import TokenizerError
from olmoe.io import hub
from olmoe.io.tensor_file import TensorFiles
from olmoe.io.text_file import read_text
from olmoe.model import CausalLM, allocate, without_values
from olmoe.tokenizer import TEMPLATES_FOLDER, Tokenizer
from olmoe.weights import checkpoint, packed
from olmoe.weights.table import TensorTable

# Bytes read before mapped files are closed, so that their pages no longer count as this process's memory.
RELEASE_BYTES = 256 * 2**20


class WeightSource(Protocol):
    """Weights of one model by parameter name."""

    config: ModelConfig

    @property
    def path(self) -> Path:
        """The file or folder that is read."""
        ...

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """A parameter of `model.CausalLM` by its name; of a stack of experts that of one `expert`, (2F, D) or (D, F).

        Returns a floating CPU tensor in the precision that it is stored in (fp32 where it is quantized).
        """
        ...

    def files(self) -> dict[str, str]:
        """Texts that travel with the weights, by file name: tokenizer.json, generation_config.json and the like."""
        ...


@runtime_checkable
class BlockSource(WeightSource, Protocol):
    """A source whose matrices may already be stored in GGUF's blocks, which then travel without rounding again."""

    def stored_as(self, parameter: str) -> tuple[str, ...]:
        """GGUF's names of the types of a parameter's tensors: ("Q4_0",), or two for a fused matrix."""
        ...

    def blocks(self, parameter: str, expert: int | None = None) -> Any:
        """The bytes of a matrix row by row, (R, bytes) uint8, as a numpy array; all its tensors have one type."""
        ...


def open_source(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> WeightSource:
    """The source that a name means: a .gguf file, a checkpoint folder, or a hub id."""
    if os.fspath(name).lower().endswith(".gguf"):
        from olmoe.weights.gguf.source import GGUFSource  # which is built on this module

        return GGUFSource(os.path.expanduser(name))
    place = name if isinstance(name, str) else Path(name)
    return FolderSource(hub.resolve(place, revision=revision, token=token, local_files_only=local_files_only))


def tokenizer_of(source: WeightSource) -> Tokenizer:
    """The tokenizer that travels with the weights. Raises `TokenizerError` if there is none."""
    files = source.files()
    if "tokenizer.json" not in files:
        raise TokenizerError(
            "The model comes without a tokenizer.json, which is needed to read text; put one beside it, or do without "
            "calibration text (--calibration none) and reports."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():  # chat templates included, for calibration on chats
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return Tokenizer.from_folder(folder, eos_ids=source.config.eos_token_ids, pad_id=source.config.pad_token_id)


class FolderSource:
    """A `WeightSource` over a checkpoint folder: shards are mapped, and pages that were read are given back."""

    def __init__(self, folder: Path) -> None:
        opened = checkpoint.Checkpoint(folder)
        self.config, self._folder = opened.config, folder
        self._handles: dict[Path, Any] = {}
        self._read_bytes = 0
        self._packed: tuple[TensorTable, TensorFiles] | None = None
        if opened.layout is not None:
            file = opened.packed_files
            self._packed = packed.check(self.config, opened.layout, file.entries, file.path), file
            return
        self._stored, self._parts = opened.stored, opened.parts
        self._places: dict[tuple[str, int | None], list[str]] = {}
        for name, part in self._parts.items():
            self._places.setdefault((part.parameter, part.expert), []).append(name)

    @property
    def path(self) -> Path:
        """See `WeightSource.path`."""
        return self._folder

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        if self._packed is not None:
            table, file = self._packed
            return table[parameter].read(file, expert)
        names = self._places.get((parameter, expert))
        if names is None:  # a stack that is stored fused
            (name,) = self._places[parameter, None]
            stored = self._stored[name]
            if expert is None:
                return self._whole(name)
            return self._counted(self._handle(stored.file).get_slice(name)[expert])
        # The gate comes first in a fused matrix, and its rows start at 0.
        names.sort(key=lambda name: self._parts[name].first_row)
        pieces = [self._whole(name) for name in names]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        found = {name: self._folder / name for name in checkpoint.TRAVELLING}
        for path in sorted((self._folder / TEMPLATES_FOLDER).glob("*.jinja")):
            found[f"{TEMPLATES_FOLDER}/{path.name}"] = path
        return {name: read_text(path) for name, path in found.items() if path.is_file()}

    def _whole(self, name: str) -> Tensor:
        return self._counted(self._handle(self._stored[name].file).get_tensor(name))

    def _counted(self, value: Tensor) -> Tensor:
        """A copy, which keeps no file mapped."""
        copy = value.clone()
        self._read_bytes += copy.nbytes
        if self._read_bytes >= RELEASE_BYTES:
            self._handles.clear()
            self._read_bytes = 0
        return copy

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._handles[file]


def load_model(source: WeightSource, dtype: torch.dtype) -> CausalLM:
    """All weights of a source in an ordinary model, in evaluation mode without gradients."""
    model = allocate(without_values(source.config).to(dtype), "cpu").eval().requires_grad_(False)
    if source.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            for e in range(source.config.num_experts):
                parameter.data[e] = source.read(name, e)
        else:
            parameter.data.copy_(source.read(name))
    return model
