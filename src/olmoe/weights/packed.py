"""Packed checkpoints: a folder whose matrices are stored as `olmoe.quant.blocks` lays them out in memory.

    config.json          the ordinary one, and under "quantization_config" an `olmoe.quant.layout.PackedLayout`
    model.safetensors    one file; tensors are named like the parameters of the packed modules (`save_pretrained`
                         may have made several with an index of it)
    tokenizer files

Loading maps the file and hangs views of it into packed modules: nothing is read, converted or copied but norms,
routers, biases and matrices that stay plain, which take the dtype that the model computes in. Packed tensors come
first in the file, each at a multiple of 64 bytes (of 32 where a matrix has an odd number of blocks of 16 rows).

What `save_pretrained` stored in nf4, fp4 or int8 (`olmoe.quant.SavedLayout`) is read the same way.

Shapes legend: D hidden, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

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
from olmoe.model import CausalLM, Experts, Linear, without_values
from olmoe.quant import (
    PackedEmbedding,
    PackedExperts,
    PackedLayout,
    PackedLinear,
    SavedLayout,
    saved_formats,
)
from olmoe.runtime import garbage_collection_paused
from olmoe.weights.names import EMBEDDING, HEAD, count_layers
from olmoe.weights.table import Layout, TensorTable

FILE_NAME = SINGLE_NAME
CONFIG_KEY = "quantization_config"
FLOATS = ("F32", "F16", "BF16")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


def is_packed(folder: Path) -> bool:
    """Whether the `config.json` of a checkpoint folder says that its weights are packed (by whomever)."""
    return holds_packed(read_object(folder / "config.json"))


def holds_packed(raw: Mapping[str, Any]) -> bool:
    """`is_packed` for the contents of a `config.json`."""
    return raw.get(CONFIG_KEY) not in (None, {})


def read_layout(folder: Path) -> tuple[ModelConfig, Layout]:
    """Architecture and formats of a packed folder. Raises `ConfigError` or `CheckpointError`."""
    config, layout, _ = _read_layout(folder, read_object(folder / "config.json"))
    return config, layout


def open_folder(folder: Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, Layout, TensorFiles]:
    """Architecture, formats and mapped tensors of a packed folder with the `config.json` `raw`."""
    config, layout, files = _read_layout(folder, raw)
    return config, layout, files or open_files(folder, config)


def _read_layout(folder: Path, raw: Mapping[str, Any]) -> tuple[ModelConfig, Layout, TensorFiles | None]:
    """Architecture and formats, and the files if they had to be opened to know."""
    asked = raw.get(CONFIG_KEY)
    architecture = {key: value for key, value in raw.items() if key != CONFIG_KEY}
    if isinstance(asked, Mapping):
        check_quantization(CONFIG_KEY, asked)
    if (
        isinstance(asked, Mapping)
        and asked.get("quant_method") == METHOD
        and asked.get("weight_format") in saved_formats()
    ):
        config = ModelConfig.from_dict(architecture)
        files = open_files(folder, config)
        return config, SavedLayout.from_dict(asked, files.entries), files
    layout = PackedLayout.from_dict(asked)
    return ModelConfig.from_dict(architecture), layout, None


def open_files(folder: Path, config: ModelConfig) -> TensorFiles:
    """The tensors of a packed folder, under the names that the network has for them."""
    files = TensorFiles(folder)
    if config.tie_word_embeddings and HEAD in files.entries and EMBEDDING not in files.entries:
        files.rename(HEAD, EMBEDDING)
    return files


def load(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load a packed folder, in evaluation mode without gradients. On a CPU its matrices are views of the file.

    `dtype` is that of hidden states and products (None: fp32). `progress(done, total)` is called after each tensor.
    Raises `CheckpointError` or `ConfigError` with one sentence for everything that can be wrong with the files.
    """
    opened = open_folder(folder, read_object(folder / "config.json"))
    return load_files(*opened, dtype=dtype, device=device, progress=progress)


def load_files(
    config: ModelConfig,
    layout: Layout,
    files: TensorFiles,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """`load` of a folder that is open already."""
    with garbage_collection_paused():
        return _load(config, layout, files, dtype or torch.float32, device, progress)


def _load(
    config: ModelConfig,
    layout: Layout,
    file: TensorFiles,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
) -> CausalLM:
    parts = check(config, layout, file.entries, file.path).parts()
    model = build(config, layout)
    set_compute_dtype(model, dtype)
    for done, (name, (_, _, fixed)) in enumerate(parts.items(), start=1):
        value = file.tensor(name)
        if fixed is None:
            value = value.to(dtype)
        _set_parameter(model, name, value.to(device))
        if progress is not None:
            progress(done, len(parts))
    _tie(model)
    return model.eval().requires_grad_(False)


def check(config: ModelConfig, layout: Layout, entries: Mapping[str, Entry], path: Path) -> TensorTable:
    """The table that a file's tensors fit exactly. Raises `CheckpointError` if they do not."""
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
    pack_modules(model, layout, compute_dtype=layout.compute_dtype if isinstance(layout, SavedLayout) else None)
    return _tie(model)


def pack_modules(root: nn.Module, layout: Layout, prefix: str = "", compute_dtype: torch.dtype | None = None) -> None:
    """Put packed modules, on the meta device, in the places of the network's modules that `layout` packs.

    Products are computed in `compute_dtype` (None: the dtype of hidden states), and embeddings start hidden states in
    the dtype that they have. `prefix` is what the names of `root`'s modules lack: "model." for a decoder without its
    head. Tied embeddings have the format that `model.embed_tokens` has; the caller ties the parameters again. A head
    other than `lm_head` is left alone.
    """
    config: Any = getattr(root, "config", None)
    tied = config is not None and config.tie_word_embeddings
    for name, module in list(root.named_modules()):
        full = prefix + name
        if isinstance(module, Experts | Linear | nn.Embedding) and (full.startswith("model.") or full == "lm_head"):
            packed = packed_module(module, full, layout, tied, compute_dtype)
            if packed is not None:
                root.set_submodule(name, packed.train(module.training))


def packed_module(
    module: nn.Module, name: str, layout: Layout, tied: bool, compute_dtype: torch.dtype | None
) -> nn.Module | None:
    """The packed module for the place of `module`; None where `layout` leaves all its matrices plain."""
    with torch.device("meta"):
        if isinstance(module, Experts):
            e, d, f = module.down_proj.shape
            formats = {
                "gate_up_proj": layout.format_of(f"{name}.gate_up_proj", 2 * f, d),
                "down_proj": layout.format_of(f"{name}.down_proj", d, f),
            }
            if not any(formats.values()):
                return None
            experts = PackedExperts(e, d, f, module.act_fn, formats, compute_dtype)
            for leaf in formats:
                if formats[leaf] is None:
                    setattr(experts, leaf, nn.Parameter(getattr(experts, leaf).to(module.down_proj.dtype)))
            return experts
        owner = "model.embed_tokens" if tied and name == "lm_head" else name
        assert isinstance(module, Linear | nn.Embedding)
        format = layout.format_of(f"{owner}.weight", *module.weight.shape)
        if format is None:
            return None
        if isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            return PackedEmbedding(rows, columns, format, module.weight.dtype, module.padding_idx)
        linear = PackedLinear(module.in_features, module.out_features, module.bias is not None, format, compute_dtype)
        if module.bias is not None:
            linear.bias = nn.Parameter(linear.bias.to(module.weight.dtype))
        return linear


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the embedding start hidden states in `dtype`; every other module follows its input."""
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.compute_dtype = dtype


def file_tensors(table: TensorTable, plain: torch.dtype | Mapping[str, torch.dtype]) -> Tensors:
    """Shape and dtype of every tensor of a packed file by name, in the order of the file.

    `plain` is the dtype of what is not packed, one for all or by name. Codes come first, those of whole cache lines
    before others, so that sizes keep the next one aligned.
    """
    tensors: Tensors = {}
    for name, (_, shape, fixed) in table.parts().items():
        dtype = fixed or (plain if isinstance(plain, torch.dtype) else plain[name])
        tensors[name] = (shape, dtype)

    def place(item: tuple[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[bool, bool, int]:
        (shape, dtype) = item[1]
        # Then wider values before narrower ones, so that none starts at an odd multiple.
        return dtype != torch.uint8, math.prod(shape) % 64 != 0, -dtype.itemsize

    return dict(sorted(tensors.items(), key=place))


def writer(path: Path, tensors: Tensors) -> TensorWriter:
    """The file of a packed folder, ready to be filled."""
    return TensorWriter(path, tensors, {"format": "pt"})


def config_text(config: ModelConfig, layout: PackedLayout, stored: torch.dtype) -> str:
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
