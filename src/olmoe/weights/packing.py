"""A model whose matrices are packed as they are read, so that it is never in memory unpacked as a whole.

For training adapters on top (QLoRA): with the formats that need no calibration, and only in memory.
"""

from __future__ import annotations

import torch
from torch import nn

from olmoe.model import CausalLM
from olmoe.model.init import without_values
from olmoe.quant import PackedModule
from olmoe.quant.formats import make_format
from olmoe.quant.layout import SavedLayout
from olmoe.quant.swap import pack_modules
from olmoe.weights.names import parameter_shapes
from olmoe.weights.source import WeightSource


@torch.no_grad()
def load_packed(source: WeightSource, format: str, device: torch.device | str = "cpu") -> CausalLM:
    """The model with the matrices of attention and experts in `format`, one of `quant.FORMATS`, the rest in fp32.

    A matrix that does not fit the format stays in fp32 too. Raises `ConfigError` for an unknown format.
    """
    config, shapes, kind = source.config, parameter_shapes(source.config), make_format(format)
    matrices = {name: shape for name, shape in shapes.items() if ".self_attn." in name or ".experts." in name}
    names = frozenset(name for name, shape in matrices.items() if len(shape) > 1 and kind.fits(*shape[-2:]))
    model = without_values(config)
    pack_modules(model, SavedLayout(format, False, None, names))
    for name, shape in shapes.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        stacked = len(shape) == 3
        weight = torch.stack([source.read(name, e) for e in range(shape[0])]) if stacked else source.read(name)
        if isinstance(owner, PackedModule) and leaf in owner.formats:
            owner.pack(leaf, weight)
        else:
            setattr(owner, leaf, nn.Parameter(weight.float(), requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device).eval().requires_grad_(False)
