"""Models with random weights, which stand in for checkpoints: speed does not depend on the values of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from olmoe.config import ModelConfig
from olmoe.errors import UserError, shown
from olmoe.model import CausalLM, allocate
from olmoe.quant import PackedLayout, PackedModule
from olmoe.quant.formats.blocks import BLOCK, GROUP, SCALE_BYTES
from olmoe.quant.swap import set_compute_dtype
from olmoe.runtime import available_memory_bytes
from olmoe.weights.packed_file import build
from olmoe.weights.recipes import RECIPES

PLAIN_FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = ("int4", "int8", *PLAIN_FORMATS)  # named by the command line; all of `RECIPES` work too
_NOISE = 2**22 - 3  # odd, so that matrices, whose sizes are powers of two, start at different offsets of the block
_SCALE = 0x1000  # 2^-11 as fp16: products of random codes stay small
# Embeddings are this much larger, so that tokens stay different through all layers and choose different experts.
_EMBEDDING_SCALE, _EMBEDDING_FACTOR = 0x2C00, 2**7


def skeleton(config: ModelConfig, format: str, overrides: dict[str, str] | None = None) -> CausalLM:
    """A model of the given shapes in `format`, on the meta device. Arguments and errors as for `random_model`."""
    if format in RECIPES:
        recipe = RECIPES[format]
        model = build(config, PackedLayout(recipe.weight_format, {**recipe.overrides, **(overrides or {})}))
        return model.float()
    if format not in PLAIN_FORMATS:
        raise UserError(f"Unknown format {shown(format)}; choose one of {', '.join((*RECIPES, *PLAIN_FORMATS))}.")
    with torch.device("meta"):
        return CausalLM(config).to(PLAIN_FORMATS[format])


def random_model(config: ModelConfig, format: str, overrides: dict[str, str] | None = None) -> CausalLM:
    """A model of the given shapes with random weights, packed or plain, ready for inference.

    `format` is a recipe of `olmoe.weights.recipes`, "bf16" or "fp32"; `overrides` are further ones for `PackedLayout`.
    Each matrix is allocated once and filled with copies of a block of noise. Raises `UserError` for an unknown format,
    and if memory does not suffice.
    """
    model = skeleton(config, format, overrides)
    require_memory(sum(p.numel() * p.element_size() for p in model.parameters()), format)
    model = allocate(model, "cpu").requires_grad_(False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NOISE, generator=generator) * config.initializer_range
    # Codes are spread evenly around that of zero: weights with a nonzero mean would make all tokens alike.
    low, high = torch.randint(1, 16, (2, _NOISE), generator=generator, dtype=torch.uint8)
    nibbles, whole = low | high << 4, torch.randint(1, 256, (_NOISE,), generator=generator, dtype=torch.uint8)
    start = 0
    for path, module in model.named_modules():
        embedding = path == "model.embed_tokens"
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif parameter.dtype != torch.uint8:
                start = _fill(parameter, (noise * (_EMBEDDING_FACTOR if embedding else 1)).to(parameter.dtype), start)
            else:
                assert isinstance(module, PackedModule)
                start = _fill(parameter, whole if module.formats[name].bits == 8 else nibbles, start)
                scale_bytes = module.shapes[name][1] // BLOCK * GROUP * SCALE_BYTES  # at the end of a group of rows
                parameter[..., -scale_bytes:].view(torch.int16).fill_(_EMBEDDING_SCALE if embedding else _SCALE)
    set_compute_dtype(model, torch.float32)
    return model.eval()


def _fill(out: Tensor, values: Tensor, start: int) -> int:
    """Fill `out` with `values`, repeated from `start` on; returns where the next tensor should start."""
    flat, done = out.view(-1), 0
    while done < flat.numel():
        part = values[start : start + flat.numel() - done]
        flat[done : done + len(part)].copy_(part)
        done, start = done + len(part), (start + len(part)) % len(values)
    return start


def require_memory(size: int, format: str) -> None:
    """Raise `UserError` if `size` bytes of weights do not fit into free memory, as far as the system reports it.

    Otherwise it would kill a process, not always this one. `format` names the weights in the message.
    """
    free = available_memory_bytes()
    if free is not None and size > free:
        raise UserError(
            f"Weights in {format} would take {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB of memory are free; "
            "choose a format of fewer bits or a smaller model."
        )
