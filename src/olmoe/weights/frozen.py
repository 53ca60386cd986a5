"""Loads a model with frozen weights for training adapters, in little memory.

Matrices stored in half precision stay in it, since products with fp32 inputs widen a few rows at a time
(`ops.widened`); routers, norms and biases are fp32. Attention and experts may be packed as they are read, one matrix at
a time (QLoRA), in any format that needs no calibration; those of a packed folder are views of the mapped file.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from olmoe.model import CausalLM
from olmoe.model.init import without_values
from olmoe.quant import PackedModule
from olmoe.quant.swap import pack_modules
from olmoe.runtime import no_grad
from olmoe.weights.names import EMBEDDING, HEAD, parameter_shapes
from olmoe.weights.packed_file import PackedFile
from olmoe.weights.recipes import BaseRecipe
from olmoe.weights.source import WeightSource, read_finite


class WidenedEmbedding(nn.Embedding):
    """An embedding in half precision that returns fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) of ids -> (..., D)."""
        return super().forward(input).float()


@no_grad
def load_frozen(source: WeightSource, format: str | None = None, device: torch.device | str = "cpu") -> CausalLM:
    """The model, which computes in fp32, with the matrices of attention and experts in `format`, if that is given.

    `format` is one of `quant.FORMATS`, for a source that is not packed; a matrix that it does not fit stays as it is.
    Raises `ConfigError` for a format that is unknown, and `CheckpointError` for weights that are not finite.
    """
    if isinstance(source, PackedFile):
        assert format is None, f"{source.path} is packed already"
        model = source.load(device=device, frozen=True)
    else:
        model = _read(source, format)
    embedding = model.model.embed_tokens
    if not isinstance(embedding, PackedModule) and embedding.weight.dtype != torch.float32:
        widened = WidenedEmbedding.from_pretrained(embedding.weight, padding_idx=embedding.padding_idx)
        widened.weight = embedding.weight
        model.model.embed_tokens = widened
    return model.to(device).eval().requires_grad_(False)


def _read(source: WeightSource, format: str | None) -> CausalLM:
    config = source.config
    model = without_values(config)
    if format is not None:
        pack_modules(model, BaseRecipe(format, format).layout(config))
    for name, shape in parameter_shapes(config).items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(owner, PackedModule) and leaf in owner.formats:
            owner.pack(leaf, _matrices(source, name, shape) if len(shape) == 3 else read_finite(source, name))
        else:
            setattr(owner, leaf, nn.Parameter(_plain(source, name, shape), requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _matrices(source: WeightSource, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The matrices of a stack of experts, one after the other."""
    return (read_finite(source, name, expert) for expert in range(shape[0]))


def _plain(source: WeightSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """A parameter as it is kept: matrices in the dtype they are stored in, everything else in fp32."""
    if len(shape) == 3:
        stack: Tensor | None = None
        for expert, matrix in enumerate(_matrices(source, name, shape)):
            stack = matrix.new_empty(shape) if stack is None else stack
            stack[expert] = matrix
        assert stack is not None
        return stack
    value = read_finite(source, name)
    kept = name in (EMBEDDING, HEAD) or (".self_attn." in name and len(shape) == 2)
    return value if kept else value.float()
