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

from olmoe.errors import BackendUnavailableError, UserError
from olmoe.fused.causal_lm import FusedCausalLM
from olmoe.fused.decoder import STEP_ROWS, FusedDecoder, all_layers
from olmoe.fused.decoder_layer import FusedDecoderLayer
from olmoe.fused.prepared_layer import kernel_matrix
from olmoe.model import CausalLM, Decoder, DecoderLayer
from olmoe.ops.cpu import extension
from olmoe.ops.dispatch import AUTO, PRIORITY

__all__ = [
    "STEP_ROWS",
    "FusedCausalLM",
    "FusedDecoder",
    "FusedDecoderLayer",
    "all_layers",
    "fuse",
    "kernel_matrix",
    "require",
    "unfuse",
]


def fuse(root: nn.Module) -> None:
    """Let decoder layers, decoders as a whole and language models under `root` use the C++ kernels where these fit."""
    for module in root.modules():
        if type(module) is DecoderLayer:
            module.__class__ = FusedDecoderLayer
        elif type(module) is Decoder:
            module.__class__ = FusedDecoder
        elif type(module) is CausalLM:
            module.__class__ = FusedCausalLM


def unfuse(root: nn.Module) -> None:
    """Make fused layers, decoders and language models plain ones again."""
    for module in root.modules():
        if type(module) is FusedCausalLM:
            module.__dict__.pop("_head", None)
            module.__class__ = CausalLM  # type: ignore[assignment]
        if type(module) is FusedDecoder:
            module.__dict__.pop("_whole", None)
            module.__class__ = Decoder  # type: ignore[assignment]
        if type(module) is FusedDecoderLayer:
            module.__dict__.pop("_prepared", None)
            module.__class__ = DecoderLayer  # type: ignore[assignment]


def require(backend: str) -> None:
    """Raise unless `backend` is auto or a name of `olmoe.ops.dispatch.PRIORITY`, and can run here."""
    if backend not in (AUTO, *PRIORITY):
        raise UserError(f"Unknown backend {backend!r}; choose one of {', '.join((AUTO, *PRIORITY))}.")
    if backend == "cpu" and (reason := extension.unavailable()) is not None:
        raise BackendUnavailableError(f"Backend 'cpu' cannot run here: {reason}; use the backend torch.")
