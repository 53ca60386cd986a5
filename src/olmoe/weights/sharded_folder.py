"""Checkpoints that several processes wrote together, each its own shards: torch's DCP format, read without a group.

A folder holds `.metadata`, which says where each part of each tensor is, and the shard files. Any part of any tensor
can be read by itself, so that any number of processes can continue from what another number wrote.

`.metadata` is a pickle, which could run code of whoever made it; here only DCP's own description is unpickled.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmoe.config import ModelConfig, read_object
from olmoe.errors import CheckpointError, shown
from olmoe.model import CausalLM
from olmoe.weights import source
from olmoe.weights.names import parameter_shapes

METADATA_NAME = ".metadata"
# The prefix of parameters among the other tensors of a run.
MODEL_PREFIX = "model/"

_MODULES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


def is_sharded(folder: Path) -> bool:
    """Whether a folder is such a checkpoint."""
    return (folder / METADATA_NAME).is_file()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _MODULES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class _Shard(NamedTuple):
    """A part of a tensor: its offset in the tensor, its shape, and its bytes in a file."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


class ShardFiles:
    """The tensors of a folder by name.

    Raises `CheckpointError` with one sentence if a file is missing, cut short, or not what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._shards: dict[str, list[_Shard]] = {}
        self._last: tuple[_Shard, Tensor] | None = None
        try:
            with (folder / METADATA_NAME).open("rb") as file:
                self._describe(_Unpickler(file).load())
        except FileNotFoundError:
            raise CheckpointError(f"There is no file {folder / METADATA_NAME}; the checkpoint is incomplete.") from None
        except CheckpointError:
            raise
        except Exception as error:  # damaged or foreign bytes can raise anything
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise CheckpointError(f"{folder / METADATA_NAME} is damaged or foreign ({reason}).") from None
        self._check_files()

    def _describe(self, metadata: Any) -> None:
        stored = {(index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items()}
        for name, tensor in metadata.state_dict_metadata.items():
            self.shapes[name], self.dtypes[name] = tuple(tensor.size), tensor.properties.dtype
            self._shards[name] = []
            for chunk in tensor.chunks:
                if 0 in chunk.sizes:
                    continue  # of a rank that holds no part of it
                info = stored[name, tuple(chunk.offsets)]
                place = str(info.relative_path), info.offset, info.length
                self._shards[name].append(_Shard(tuple(chunk.offsets), tuple(chunk.sizes), *place))

    def _check_files(self) -> None:
        """Every shard must be present and complete, and so must each tensor in them."""
        ends: dict[str, int] = {}
        for name, shards in self._shards.items():
            if sum(math.prod(shard.shape) for shard in shards) != math.prod(self.shapes[name]):
                raise CheckpointError(f"The shards of {self.folder} do not make up {shown(name)}.")
            for shard in shards:
                ends[shard.file] = max(ends.get(shard.file, 0), shard.offset + shard.length)
        for file, end in sorted(ends.items()):
            if os.path.basename(file) != file:
                raise CheckpointError(f"{self.folder} names the shard {shown(file)}, which is not a file of its own.")
            if not (self.folder / file).is_file():
                raise CheckpointError(f"The shard {file} is missing from {self.folder}.")
            if (size := (self.folder / file).stat().st_size) < end:
                raise CheckpointError(f"The shard {self.folder / file} is cut short: it has {size} of {end} bytes.")

    @property
    def num_bytes(self) -> int:
        """The size of the shard files."""
        files = {shard.file for shards in self._shards.values() for shard in shards}
        return sum((self.folder / file).stat().st_size for file in files)

    def read(self, name: str, part: Sequence[slice] | None = None) -> Tensor:
        """A part of a tensor (by default all of it), given by a slice for each dimension."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.folder} does not hold {shown(name)}.")
        shape = self.shapes[name]
        wanted = [range(*s.indices(n)) for s, n in zip(part or [slice(None)] * len(shape), shape, strict=True)]
        out = torch.empty([len(r) for r in wanted], dtype=self.dtypes[name])
        for shard in self._shards[name]:
            both = [
                (max(r.start, first), min(r.stop, first + size))
                for r, first, size in zip(wanted, shard.start, shard.shape, strict=True)
            ]
            if all(first < last for first, last in both):
                value = self._load(shard)
                here = tuple(slice(a - r.start, b - r.start) for (a, b), r in zip(both, wanted, strict=True))
                there = tuple(slice(a - s, b - s) for (a, b), s in zip(both, shard.start, strict=True))
                out[here] = value[there]
        return out

    def _load(self, shard: _Shard) -> Tensor:
        if self._last is not None and self._last[0] == shard:  # experts are read one after another
            return self._last[1]
        try:
            with (self.folder / shard.file).open("rb") as file:
                file.seek(shard.offset)
                value = torch.load(io.BytesIO(file.read(shard.length)), map_location="cpu", weights_only=True)
        except Exception:  # torch.load raises many kinds of errors for damaged bytes, with very long messages
            raise CheckpointError(f"The shard {self.folder / shard.file} is damaged.") from None
        if not isinstance(value, Tensor) or tuple(value.shape) != shard.shape:
            raise CheckpointError(f"The shard {self.folder / shard.file} does not hold what {METADATA_NAME} says.")
        self._last = (shard, value)
        return value


class ShardedFolder:
    """The model of such a checkpoint: loads it whole, or gives its matrices one by one (a `WeightSource`)."""

    layout = None  # nothing is packed

    def __init__(self, folder: Path, raw: dict[str, Any] | None = None) -> None:
        self.config = ModelConfig.from_dict(read_object(folder / "config.json") if raw is None else raw)
        self._folder = folder
        self._files = ShardFiles(folder)

    @property
    def path(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def num_bytes(self) -> int:
        """The size of its files, the optimizer's state included."""
        return self._files.num_bytes

    @property
    def format(self) -> str:
        """The name of its weights' dtype."""
        return str(self._dtype()).removeprefix("torch.")

    @property
    def dtypes(self) -> list[str]:
        """Names of the dtypes of its weights, by safetensors' names."""
        self.check()
        names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
        return sorted(
            {names.get(self._files.dtypes[MODEL_PREFIX + name], "?") for name in parameter_shapes(self.config)}
        )

    def _dtype(self) -> torch.dtype:
        return self._files.dtypes.get(MODEL_PREFIX + "model.norm.weight", torch.float32)

    def check(self) -> None:
        """Raise `CheckpointError` if the tensors do not fit the configuration."""
        for name, shape in parameter_shapes(self.config).items():
            found = self._files.shapes.get(MODEL_PREFIX + name)
            if found != shape:
                what = "is not there" if found is None else f"has the shape {list(found)}"
                raise CheckpointError(f"{self._folder} does not fit its config.json: {name} {what}, not {list(shape)}.")

    def load(
        self,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> CausalLM:
        """The model, in evaluation mode without gradients; `dtype` None keeps what is stored."""
        self.check()
        return source.load_model(self, dtype or self._dtype(), progress).to(device)

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        name = MODEL_PREFIX + parameter
        if expert is None:
            return self._files.read(name)
        rest = [slice(None)] * (len(self._files.shapes[name]) - 1)
        return self._files.read(name, [slice(expert, expert + 1), *rest])[0]

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`."""
        return source.texts_of(self._folder)
