"""Replacing the network's modules with packed ones, as a layout says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from olmoe.model import Experts, Linear
from olmoe.quant.layout import Layout
from olmoe.quant.modules import PackedEmbedding, PackedExperts, PackedLinear


def pack_modules(root: nn.Module, layout: Layout, prefix: str = "", compute_dtype: torch.dtype | None = None) -> None:
    """Replace the modules that `layout` packs with packed ones on the meta device.

    Products are computed in `compute_dtype` (None: the dtype of hidden states), and hidden states start in the dtype of
    the embeddings. `prefix` is what the names of `root`'s modules lack: "model." for a decoder without its head. Tied
    embeddings have the format of `model.embed_tokens`; the caller ties the parameters again. A head other than
    `lm_head` is left alone.
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
    """The replacement of `module`; None if `layout` leaves all its matrices plain."""
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
    """Make the embedding return hidden states in `dtype`; every other module follows its input."""
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.compute_dtype = dtype
