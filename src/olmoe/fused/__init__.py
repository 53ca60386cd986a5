"""Decoder layers computed by the C++ kernels in one or two calls, in place of some thirty operations.

One where `attend` says that attention is over a KV cache of ours (it has a method `cached`, see `CachedTokens`), else
one before and one after attention, which is then the caller's. `all_layers` computes all of a decoder in one call, and
a step of decoding in the engine (where `attend` has `all_cached`), output head included, is little more than that call.

`fuse` changes the classes of a network, whose modules, parameters and results stay what they are. A fused layer
decides at every call whether the kernels fit: inference on CPU tensors, plain or block-packed matrices, no hooks,
adapters or replaced modules inside. Otherwise, and for training, it is the layer that it was.

Shapes legend: N tokens, D hidden, H heads, G KV heads, Dh head dim, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from torch import nn

from olmoe.fused.decoder import STEP_ROWS, all_layers
from olmoe.fused.decoder_layer import FusedDecoderLayer
from olmoe.fused.prepared_layer import kernel_matrix
from olmoe.model import DecoderLayer

__all__ = [
    "STEP_ROWS",
    "FusedDecoderLayer",
    "all_layers",
    "fuse",
    "kernel_matrix",
    "unfuse",
]


def fuse(root: nn.Module) -> None:
    """Let decoder layers, decoders as a whole and language models under `root` use the C++ kernels where these fit."""
    for module in root.modules():
        if type(module) is DecoderLayer:
            module.__class__ = FusedDecoderLayer


def unfuse(root: nn.Module) -> None:
    """Make fused layers, decoders and language models plain ones again."""
    for module in root.modules():
        if type(module) is FusedDecoderLayer:
            module.__dict__.pop("_prepared", None)
            module.__class__ = DecoderLayer  # type: ignore[assignment]
