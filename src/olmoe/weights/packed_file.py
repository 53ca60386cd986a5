"""Packed checkpoints: a folder whose matrices are stored as `olmoe.quant.formats.blocks` lays them out in memory.

    config.json          as usual, with an `olmoe.quant.PackedLayout` under "quantization_config"
    model.safetensors    one file; tensors are named like the parameters of the packed modules (`save_pretrained`
                         may have made several with an index of it)
    tokenizer files

Loading maps the file and puts views of it into packed modules: nothing is read, converted or copied except norms,
routers, biases and matrices that stay plain, which take the dtype that the model computes in. Packed tensors come
first in the file, each at a multiple of 64 bytes (of 32 if a matrix has an odd number of blocks of 16 rows).

What `save_pretrained` and `olmoe quantize --format nf4` stored in nf4, fp4 or int8 (`olmoe.quant.SavedLayout`) is read
the same way.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olmoe.config import ModelConfig, read_object
from olmoe.config_keys import METHOD, check_quantization
from olmoe.errors import CheckpointError, shown
from olmoe.io.foreign import check_names
from olmoe.io.tensor_file import DTYPES, SINGLE_NAME, Entry, TensorFiles, TensorWriter
from olmoe.model import CausalLM, without_values
from olmoe.quant import BlockFormat, Layout, PackedLayout, SavedLayout, saved_formats
from olmoe.quant.swap import pack_modules, set_compute_dtype
from olmoe.runtime import without_garbage_collection
from olmoe.weights.names import EMBEDDING, HEAD, count_layers
from olmoe.weights.source import texts_of
from olmoe.weights.table import TensorTable

FILE_NAME = SINGLE_NAME
CONFIG_KEY = "quantization_config"
FLOATS = ("F32", "F16", "BF16")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


def is_packed(raw: Mapping[str, Any]) -> bool:
    """Whether the contents of a `config.json` say that the weights are packed, by this package or another."""
    return raw.get(CONFIG_KEY) not in (None, {})


class PackedFile:
    """A packed folder with its file mapped: loads the model, or gives its matrices one by one (a `BlockSource`)."""

    def __init__(self, folder: Path, raw: Mapping[str, Any] | None = None) -> None:
        """Read configuration (or take `raw`) and headers. Raises `ConfigError` or `CheckpointError`."""
        raw = read_object(folder / "config.json") if raw is None else raw
        self._folder = folder
        self.layout: Layout
        asked = raw.get(CONFIG_KEY)
        architecture = {key: value for key, value in raw.items() if key != CONFIG_KEY}
        if isinstance(asked, Mapping):
            check_quantization(CONFIG_KEY, asked)
        if (
            isinstance(asked, Mapping)
            and asked.get("quant_method") == METHOD
            and asked.get("weight_format") in saved_formats()
        ):
            self.config = ModelConfig.from_dict(architecture)
            self.tensors = open_tensors(folder, self.config)
            self.layout = SavedLayout.from_dict(asked, self.tensors.entries)
            return
        self.layout = PackedLayout.from_dict(asked)
        self.config = ModelConfig.from_dict(architecture)
        self.tensors = open_tensors(folder, self.config)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def num_bytes(self) -> int:
        """The size of its weight files."""
        return self.tensors.num_bytes

    @property
    def format(self) -> str:
        """How its matrices are stored, for display: the recipe that packed them, or their format."""
        return self.layout.recipe or self.layout.weight_format

    @property
    def dtypes(self) -> list[str]:
        """Names of the dtypes of its tensors, after a check against the configuration."""
        self.check()
        return sorted({entry.dtype for entry in self.tensors.entries.values()})

    @functools.cached_property
    def table(self) -> TensorTable:
        """What each stored tensor is; see `check` for the errors."""
        return check(self.config, self.layout, self.tensors.entries, self.tensors.path)

    def check(self) -> None:
        """Raise `CheckpointError` if the tensors do not fit the configuration."""
        _ = self.table

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
        frozen: bool = False,
    ) -> CausalLM:
        """The model, in evaluation mode without gradients. On a CPU its matrices are views of the file.

        `dtype` is that of hidden states and products (None: fp32). `progress(done, total)` is called after each tensor.
        Of a `frozen` model embeddings and head are views of the file too (see `frozen.py`). Raises
        `CheckpointError` for everything that can be wrong with the file.
        """
        return self._load(dtype or torch.float32, device, progress, frozen)

    @without_garbage_collection
    def _load(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        progress: Callable[[int, int], None] | None,
        frozen: bool,
    ) -> CausalLM:
        parts = self.table.parts()
        model = build(self.config, self.layout)
        set_compute_dtype(model, dtype)
        for done, (name, (_, _, fixed)) in enumerate(parts.items(), start=1):
            value = self.tensors.tensor(name)
            if fixed is None and not (frozen and name in (EMBEDDING, HEAD)):
                value = value.to(dtype)
            _set_parameter(model, name, value.to(device))
            if progress is not None:
                progress(done, len(parts))
        _tie(model)
        return model.eval().requires_grad_(False)

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        return self.table[parameter].read(self.tensors, expert)

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return texts_of(self._folder)

    def stored_as(self, parameter: str, expert: int | None = None) -> tuple[str, ...]:
        """The name of the type in which a parameter is stored: Q8_0, Q5_0, Q4_0, or a floating one."""
        format = self.table[parameter].format
        return (format.name.upper() if isinstance(format, BlockFormat) else self.tensors.entries[parameter].dtype,)

    def blocks(self, parameter: str, expert: int | None = None) -> Any:
        """A matrix of blocks in GGUF's layout, the same values: (R, bytes of a row) as a numpy array."""
        row = self.table[parameter]
        assert isinstance(row.format, BlockFormat), f"{parameter} is not stored in blocks"
        rows, columns = row.shape
        stored = self.tensors.tensor(parameter)
        stored = stored if expert is None else stored[expert]
        return row.format.to_gguf(stored, rows, columns).contiguous().numpy()


def open_tensors(folder: Path, config: ModelConfig) -> TensorFiles:
    """The tensors of a packed folder, under the network's names."""
    files = TensorFiles(folder)
    if config.tie_word_embeddings and HEAD in files.entries and EMBEDDING not in files.entries:
        files.rename(HEAD, EMBEDDING)
    return files


def check(config: ModelConfig, layout: Layout, entries: Mapping[str, Entry], path: Path) -> TensorTable:
    """The table of a file's tensors, which must fit it exactly. Raises `CheckpointError` if they do not."""
    if (layers := count_layers(entries)) != config.num_hidden_layers:
        check_names(entries)
        # Before tensors are listed, so that a hostile layer count cannot fill the memory.
        raise CheckpointError(
            f"config.json says {config.num_hidden_layers} layers, but {path.name} holds tensors of {layers}."
        )
    table = TensorTable(config, layout)
    expected = table.parts()
    for name, entry in entries.items():
        if name not in expected:
            check_names(entries)
            raise CheckpointError(
                f"{path} holds the tensor {shown(name)}, which OLMoE with this config.json does not have."
            )
        _, shape, dtype = expected[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"Tensor {shown(name)} has shape {list(entry.shape)}, but config.json makes it {list(shape)}."
            )
        wanted = FLOATS if dtype is None else (_NAMES[dtype],)
        if entry.dtype not in wanted:
            raise CheckpointError(
                f"Tensor {shown(name)} is stored as {entry.dtype}, but config.json makes it {' or '.join(wanted)}."
            )
    missing = [name for name in expected if name not in entries]
    if missing:
        rest = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(f"{path} lacks {shown(missing[0])}{rest}, which config.json calls for.")
    return table


def build(config: ModelConfig, layout: Layout) -> CausalLM:
    """`CausalLM(config)` with packed modules where `layout` packs, on the meta device."""
    model = without_values(config)
    pack_modules(model, layout, compute_dtype=layout.compute_dtype)
    return _tie(model)


def file_tensors(table: TensorTable, plain: torch.dtype | Mapping[str, torch.dtype]) -> Tensors:
    """Shape and dtype of every tensor of a packed file by name, in the order of the file.

    `plain` is the dtype of what is not packed, one for all or by name. Codes come first, and among them those of whole
    cache lines, so that each leaves the next one aligned.
    """
    tensors: Tensors = {}
    for name, (_, shape, fixed) in table.parts().items():
        dtype = fixed or (plain if isinstance(plain, torch.dtype) else plain[name])
        tensors[name] = (shape, dtype)

    def order(item: tuple[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bool, bool, int]:
        (shape, dtype) = item[1]
        # Then wider values before narrower ones, so that all are aligned.
        return dtype != torch.uint8, math.prod(shape) % 64 != 0, -dtype.itemsize

    return dict(sorted(tensors.items(), key=order))


def writer(path: Path, tensors: Tensors) -> TensorWriter:
    """The file of a packed folder, ready to be filled."""
    return TensorWriter(path, tensors, {"format": "pt"})


def config_text(config: ModelConfig, layout: Layout, stored: torch.dtype) -> str:
    """`config.json` of a packed folder; `stored` is the dtype of what is not packed."""
    values = config.to_dict(str(stored).removeprefix("torch.")) | {CONFIG_KEY: layout.to_dict()}
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def _tie(model: CausalLM) -> CausalLM:
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
