"""A checkpoint folder, Hugging Face's or packed, to a GGUF file that llama.cpp loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from olmoe.io import targets
from olmoe.io.text_file import read_text
from olmoe.tokenizer import Tokenizer
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf import metadata as keys
from olmoe.weights.gguf import tokenizer as vocabulary
from olmoe.weights.gguf.block_types import BY_NAME, BlockType, Bytes
from olmoe.weights.gguf.encode import BLOCKS, encode, fitting
from olmoe.weights.gguf.names import DOWN, EMBEDDING, GATE_UP, HEAD, tensor_names, tensor_shapes
from olmoe.weights.gguf.reader import Value
from olmoe.weights.gguf.writer import PlannedTensor, write
from olmoe.weights.source import BlockSource, WeightSource

# Types of matrices that can be requested -> general.file_type, llama.cpp's number for "mostly this".
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
QUANTIZATION_VERSION = 2  # of ggml's block layouts

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Output:
    """One tensor of the file: from which parameter, and which part of an expert's rows of it."""

    tensor: PlannedTensor
    parameter: str
    experts: int | None = None
    first_row: int = 0  # of the parameter's rows, if one parameter holds two tensors


def to_gguf(
    folder: Path,
    target: str | Path,
    type_name: str | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write the checkpoint in `folder` to the GGUF file `target`, atomically.

    Matrices become `type_name`, one of `FILE_TYPES`; None keeps the blocks of a packed checkpoint value for value, and
    converts others to bf16. Norms and routers are fp32. A matrix whose rows are not whole blocks is written as bf16.
    `progress(done, total)` counts bytes of the file. At most one tensor is in memory.

    Raises `CheckpointError`, `ConfigError` or `TokenizerError` for what cannot be read or what GGUF cannot express,
    `UserError` if the disk is full, or if `target` exists and is not a file to `overwrite`.
    """
    targets.check_file(target, overwrite=overwrite, source=folder)
    source = open_source(folder)
    config = source.config
    tokenizer = Tokenizer.from_folder(folder, eos_ids=config.eos_token_ids, pad_id=config.pad_token_id)
    outputs = _plan(source, type_name)
    metadata: dict[str, Value] = {
        "general.architecture": keys.ARCHITECTURE,
        "general.type": "model",
        "general.name": folder.resolve().name,
        "general.file_type": _file_type(outputs),
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    metadata |= keys.to_metadata(config)
    text = read_text(folder / "tokenizer.json")
    metadata |= vocabulary.to_metadata(text, config.vocab_size, tokenizer.chat_template)
    total, done = sum(output.tensor.num_bytes for output in outputs), 0

    def counted() -> Iterator[Bytes]:
        nonlocal done
        for output in outputs:
            for data in _data(source, output):
                yield data
                done += data.nbytes
                if progress is not None:
                    progress(done, total)
        targets.check_file(target, overwrite=overwrite)  # again, since something may have appeared there

    write(target, metadata, [output.tensor for output in outputs], counted())


def _plan(source: WeightSource, type_name: str | None) -> list[_Output]:
    """Which tensors the file holds, each with its type and where its values come from."""
    config = source.config
    shapes = tensor_shapes(config)
    names = tensor_names(config)
    if config.tie_word_embeddings:
        # llama.cpp's OLMoE needs a separate head, so the shared matrix is written twice.
        shapes[HEAD] = shapes[EMBEDDING]
    outputs: list[_Output] = []
    for parameter, tensors in names.items():
        kind = _kind_of(source, parameter, shapes[tensors[0]], type_name)
        for number, name in enumerate(tensors):
            shape = shapes[name]
            planned = PlannedTensor(name, shape, fitting(kind, shape[-1]))
            first_row = number * shape[-2] if number else 0
            outputs.append(_Output(planned, parameter, shape[0] if len(shape) == 3 else None, first_row))
    if config.tie_word_embeddings:
        first = outputs[0]
        outputs.append(_Output(PlannedTensor(HEAD, first.tensor.shape, first.tensor.kind), first.parameter))
    return outputs


def _kind_of(source: WeightSource, parameter: str, shape: tuple[int, ...], type_name: str | None) -> BlockType:
    if len(shape) == 1 or parameter.endswith("mlp.gate.weight"):
        return BY_NAME["F32"]
    if type_name is not None:
        return BY_NAME[type_name.upper()]
    stored = source.stored_as(parameter) if isinstance(source, BlockSource) else ()
    return BY_NAME[stored[0] if stored and stored[0] in BLOCKS else "BF16"]


def _data(source: WeightSource, output: _Output) -> Iterator[Bytes]:
    """The tensor's bytes, expert by expert where it is a stack."""
    kind, shape = output.tensor.kind, output.tensor.shape
    rows = slice(output.first_row, output.first_row + shape[-2]) if len(shape) > 1 else slice(None)
    stored = source if isinstance(source, BlockSource) and kind.name in BLOCKS else None
    for expert in [None] if output.experts is None else range(output.experts):
        if stored is not None and stored.stored_as(output.parameter) == (kind.name,):
            yield stored.blocks(output.parameter, expert)[rows]
        else:
            yield encode(output.tensor.name, source.read(output.parameter, expert)[rows], kind)


def _file_type(outputs: list[_Output]) -> int:
    """llama.cpp's number for the type that most matrices have."""
    sizes: dict[str, int] = {}
    for output in outputs:
        if output.parameter.endswith((GATE_UP, DOWN)):
            name = output.tensor.kind.name.lower()
            sizes[name] = sizes.get(name, 0) + output.tensor.num_bytes
    return FILE_TYPES[max(sizes, key=sizes.__getitem__)]
