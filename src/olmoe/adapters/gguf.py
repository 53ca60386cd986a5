"""An adapter as a GGUF file, which llama.cpp applies to a model's file (`--lora FILE`).

Every adapted tensor has two tensors: its name with `.lora_a` (r, in) and with `.lora_b` (out, r), for stacks with the
experts in front. `gate_up_proj` is two tensors there, which share A.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from olmoe.adapters.adapter import Adapter
from olmoe.config import ModelConfig
from olmoe.weights.gguf import metadata as keys
from olmoe.weights.gguf.block_types import BY_NAME, Bytes
from olmoe.weights.gguf.names import tensor_names
from olmoe.weights.gguf.reader import Value
from olmoe.weights.gguf.writer import PlannedTensor, write


def write_gguf_adapter(adapter: Adapter, config: ModelConfig, target: Path, name: str) -> None:
    """Write an `adapter` for a model of this configuration, in fp32. Raises `UserError` if it cannot be written."""
    metadata: dict[str, Value] = {
        "general.architecture": keys.ARCHITECTURE,
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.alpha),
    }
    tensors = dict(_tensors(adapter, config))
    planned = [PlannedTensor(name, tuple(value.shape), BY_NAME["F32"]) for name, value in tensors.items()]
    write(target, metadata, planned, (_bytes(value) for value in tensors.values()))


def _tensors(adapter: Adapter, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    theirs = tensor_names(config)
    for parameter, (a, b) in adapter.factors.items():
        names = theirs[parameter]
        # llama.cpp multiplies with alpha / r by the r of the tensors, which other software may have made larger.
        b = b.float() * (a.shape[-2] / adapter.rank)
        for name, part in zip(names, b.chunk(len(names), dim=-2), strict=True):
            yield f"{name}.lora_a", a
            yield f"{name}.lora_b", part


def _bytes(value: Tensor) -> Bytes:
    return np.ascontiguousarray(value.detach().float().cpu().numpy()).reshape(-1).view(np.uint8)
