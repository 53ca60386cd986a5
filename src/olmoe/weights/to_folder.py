"""Any checkpoint to a folder in Hugging Face's per-expert layout, which other software loads: export, part by part.

Packed folders and GGUF files are decoded, fused experts are split. Transformers, vLLM and SGLang read the result on
their own, without this package.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError, shown
from olmoe.io import targets
from olmoe.io.atomic import atomic_folder
from olmoe.io.tensor_file import SINGLE_NAME, TensorWriter
from olmoe.weights import generation
from olmoe.weights.gguf.encode import all_finite
from olmoe.weights.names import EMBEDDING, HEAD, Part, parameter_shapes, parts_of
from olmoe.weights.shards import MAX_SHARD_BYTES, cut, write_index
from olmoe.weights.source import WeightSource, tokenizer_of

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# The epsilon of every norm of vLLM's OLMoE, whatever config.json says.
_VLLM_EPSILON = 1e-5

Progress = Callable[[int, int], None]
log = logging.getLogger(__name__)


def to_folder(
    source: WeightSource,
    folder: str | Path,
    dtype: torch.dtype | Mapping[str, torch.dtype] = torch.bfloat16,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    overwrite: bool = False,
) -> None:
    """Write `config.json`, safetensors of at most `max_shard_bytes` and the tokenizer's files, atomically.

    Quantized weights are decoded and rounded once to `dtype`, one for all or by parameter. Tied embeddings are written
    twice, since vLLM needs an `lm_head.weight`. `progress(done, total)` counts bytes. At most one tensor is in memory.
    Raises `CheckpointError` for values that `dtype` cannot hold, `TokenizerError` if a GGUF file's tokenizer is broken,
    `UserError` if the disk is full, or if `folder` holds anything; with `overwrite`, anything but the files of a
    checkpoint that was written like this.
    """
    files = written_files(source)
    names = {*files, "config.json", SINGLE_NAME}
    targets.check_folder(folder, names, overwrite=overwrite, shards=True, source=source.path)
    with atomic_folder(folder) as temporary:
        write_weights(source, temporary, dtype, progress, max_shard_bytes)
        for name, text in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        # Again, since something may have appeared there.
        targets.check_folder(folder, names, overwrite=overwrite, shards=True, source=source.path)
    if ignored := ignored_by_vllm(source.config):
        log.warning("vLLM computes OLMoE without %s, so its texts would differ from ours", ", ".join(ignored))


def write_weights(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors and `config.json` into a folder that the caller makes atomic.

    Parameters are read in the order of `parameter_shapes`, each once, or expert by expert.
    """
    parts = _parts(source.config)
    dtypes = {n: dtype if isinstance(dtype, torch.dtype) else dtype[part.parameter] for n, part in parts.items()}
    sizes = {name: math.prod(part.shape) * dtypes[name].itemsize for name, part in parts.items()}
    shards, total, done = cut(sizes, max_shard_bytes), sum(sizes.values()), 0
    for file, names in shards.items():
        declared = {name: (parts[name].shape, dtypes[name]) for name in names}
        with TensorWriter(folder / file, declared, {"format": "pt"}) as out:
            read: tuple[str, int | None] | None = None
            for part in map(parts.__getitem__, names):
                if read != (part.parameter, part.expert):  # an expert's gate and up are read together
                    value, read = source.read(part.parameter, part.expert), (part.parameter, part.expert)
                out.write(part.name, _converted(part, value, dtypes[part.name]))
                done += sizes[part.name]
                if progress is not None:
                    progress(done, total)
    write_index(folder, shards, total)
    most = max(sizes, key=sizes.__getitem__)  # config.json has one dtype: the largest tensor's
    config = source.config.to_json(str(dtypes[most]).removeprefix("torch."))
    (folder / "config.json").write_text(config, encoding="utf-8")


def ignored_by_vllm(config: ModelConfig) -> list[str]:
    """Settings that vLLM's OLMoE ignores, with their values: it would load the model but compute another one.

    The released models have none of them.
    """
    settings = {
        "clip_qkv": config.clip_qkv is not None,
        "norm_topk_prob": config.norm_topk_prob,
        "attention_bias": config.attention_bias,
        "hidden_act": config.hidden_act not in ("silu", "swish"),
        "rms_norm_eps": config.rms_norm_eps != _VLLM_EPSILON,
    }
    return [f"{name} = {shown(getattr(config, name))}" for name, ignored in settings.items() if ignored]


def _parts(config: ModelConfig) -> dict[str, Part]:
    """The tensors to write by name."""
    shapes = parameter_shapes(config)
    parts = {part.name: part for name, shape in shapes.items() for part in parts_of(name, shape)}
    if config.tie_word_embeddings:
        parts[HEAD] = Part(HEAD, shapes[EMBEDDING], EMBEDDING)
    return parts


def written_files(source: WeightSource) -> dict[str, str]:
    """The text files of the source, and others that other software needs and that can be derived."""
    files = {generation.FILE_NAME: generation.generation_text(source.config)} | source.files()
    if "tokenizer.json" in files and "tokenizer_config.json" not in files:
        length = source.config.max_position_embeddings
        files["tokenizer_config.json"] = tokenizer_of(source).transformers_config(length)
    return files


def _converted(part: Part, value: Tensor, dtype: torch.dtype) -> Tensor:
    rows = value[part.first_row : part.first_row + part.shape[0]].to(dtype)
    if not all_finite(rows):
        raise CheckpointError(
            f"Tensor {shown(part.name)} has values that are not finite or too large for "
            f"{str(dtype).removeprefix('torch.')}; convert with --type bf16, or fetch the file again."
        )
    return rows
