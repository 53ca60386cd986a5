"""Weights that are read one matrix at a time, so that packing and export need no more memory than that.

`hf_folder`, `packed_file` and `gguf.source` implement `WeightSource`; `checkpoint.open_source` finds the right one.

Shapes legend: D hidden, F expert width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError, TokenizerError
from olmoe.io.text_file import read_text
from olmoe.model import CausalLM, allocate, without_values
from olmoe.tokenizer import TEMPLATES_FOLDER, Tokenizer
from olmoe.weights import blueprint, generation

# Bytes read before mapped files are closed, so that their pages no longer count as this process's memory.
RELEASE_BYTES = 256 * 2**20
# Text files of a checkpoint folder that are copied with its weights.
TRAVELLING = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    generation.FILE_NAME,
)


class WeightSource(Protocol):
    """Weights of one model by parameter name."""

    config: ModelConfig

    @property
    def path(self) -> Path:
        """The file or folder being read."""
        ...

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """A parameter of `model.CausalLM` by its name; of a stack of experts, the matrix of one `expert`, (2F, D) or

        (D, F).
        Returns a floating CPU tensor in the precision that it is stored in (fp32 if it is quantized).
        """
        ...

    def files(self) -> dict[str, str]:
        """Texts that travel with the weights, by file name: tokenizer.json, generation_config.json and the like."""
        ...


@runtime_checkable
class BlockSource(WeightSource, Protocol):
    """A source whose matrices may already be stored in GGUF's blocks, which are then copied without rounding again."""

    def stored_as(self, parameter: str, expert: int | None = None) -> tuple[str, ...]:
        """GGUF's names for the types of a parameter's tensors: ("Q4_0",), or two for a fused matrix.

        Experts of one stack are stored alike, unless the source computes some of them.
        """
        ...

    def blocks(self, parameter: str, expert: int | None = None) -> Any:
        """The bytes of a matrix row by row, (R, bytes) uint8, as a numpy array; all its tensors have the same type."""
        ...


def read_finite(source: WeightSource, parameter: str, expert: int | None = None) -> Tensor:
    """`source.read`. Raises `CheckpointError` for a weight that is not finite."""
    weight = source.read(parameter, expert)
    if not all(map(torch.isfinite, torch.aminmax(weight))):
        raise CheckpointError(f"{parameter} holds values that are not finite; check the checkpoint.")
    return weight


def texts_of(folder: Path) -> dict[str, str]:
    """`WeightSource.files` of a checkpoint folder."""
    found = {name: folder / name for name in (*TRAVELLING, blueprint.FILE_NAME)}
    for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        found[f"{TEMPLATES_FOLDER}/{path.name}"] = path
    return {name: read_text(path) for name, path in found.items() if path.is_file()}


def tokenizer_of(source: WeightSource) -> Tokenizer:
    """The tokenizer that travels with the weights. Raises `TokenizerError` if there is none."""
    files = source.files()
    if "tokenizer.json" not in files:
        raise TokenizerError(
            "The model has no tokenizer.json, which is needed to read text; put one beside it, or do without "
            "calibration text (--calibration none) and reports."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():  # chat templates included, for calibration on chats
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return Tokenizer.from_folder(folder, eos_ids=source.config.eos_token_ids, pad_id=source.config.pad_token_id)


def load_model(
    source: WeightSource, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None
) -> CausalLM:
    """An ordinary model with all weights of a source, in evaluation mode without gradients.

    `progress(done, total)` is called after each parameter.
    """
    model = allocate(without_values(source.config).to(dtype), "cpu").eval().requires_grad_(False)
    if source.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    for done, (name, parameter) in enumerate(parameters.items(), start=1):
        if ".mlp.experts." in name:
            for e in range(source.config.num_experts):
                parameter.data[e] = source.read(name, e)
        else:
            parameter.data.copy_(source.read(name))
        if progress is not None:
            progress(done, len(parameters))
    return model
