"""The kernels' view of a whole decoder, for steps of decoding: layers, embeddings, final norm and rotary angles.

Shapes legend: N tokens, D hidden, Dh head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from olmoe.fused.prepared_layer import PreparedLayer, kernel_matrix, matrix_shape
from olmoe.fused.watch import Watch, has_hooks
from olmoe.model import Decoder, RMSNorm, RotaryEmbedding
from olmoe.ops.cpu import extension
from olmoe.ops.dispatch import AUTO
from olmoe.quant import PackedEmbedding

_FIRST_POSITIONS = 256
_AROUND = ("embed_tokens", "norm", "rotary")
_SETTINGS = (
    "forward", "backend", "eps", "rope", "head_dim", "max_positions", "max_norm", "formats", "shapes", "compute_dtype",
)  # fmt: skip


class PreparedDecoder:
    """All that a step needs, for one state of a decoder; `layers` is empty where the kernels do not fit."""

    def __init__(self, decoder: Decoder, layers: list[PreparedLayer]) -> None:
        """`layers` are the views of all its layers; none where the kernels fit only some."""
        self.watch = Watch()
        for name in ("layers", *_AROUND):
            self.watch.child(decoder, name)
        for name in _AROUND:
            self.watch.module(getattr(decoder, name), _SETTINGS)
        self.watch.module(decoder.layers)
        for name, layer in decoder.layers.named_children():
            self.watch.child(decoder.layers, name)
            self.watch.module(layer)
            if (prepared := vars(layer).get("_prepared")) is not None:
                self.watch.include(prepared.watch)
        self.watch.complete()
        self.layers = layers if layers and _fits(decoder, layers) else []
        if not self.layers:
            return
        embedding, norm = decoder.embed_tokens, decoder.norm
        self._decoder = decoder
        self._embedding = kernel_matrix(embedding, "weight", torch.float32)
        # Of the weight itself, which may be another than the module's first.
        self.vocab_size: int = self._embedding.rows
        self._norm_weight = norm.weight.detach()
        self.norm = self._norm_weight.data_ptr(), norm.eps  # the final norm, as the kernels take it
        self.kernels = [layer.kernel for layer in layers]
        self._copied = [layer for layer in layers if layer.copied]
        # Cosines and sines of the first positions, and the kernels' views of them: one value, which a thread finds
        # whole while another one makes a longer table.
        self._tables: tuple[tuple[Tensor, ...], list[Any]] = (), []

    def still(self) -> bool:
        """Whether the decoder is what it was."""
        return self.watch.still()

    def refresh(self) -> None:
        """See `PreparedLayer.refresh`."""
        for layer in self._copied:
            layer.refresh()

    def embed(self, ids_N: Tensor) -> Tensor:
        """Contiguous ids (N,), each of them below `vocab_size` -> (N, D)."""
        x = torch.empty(len(ids_N), self.layers[0].hidden)
        extension.kernels().embed(self._embedding, ids_N.data_ptr(), len(ids_N), x.data_ptr())
        return x

    def angles(self, positions_N: Tensor, last: int, length: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos, sin (N, Dh/2) of contiguous positions (N,), none beyond `last`. `length` as in `RotaryEmbedding`.

        Where angles depend on the position alone they are computed once, by the network's own module, and looked up.
        """
        rotary = self._decoder.rotary
        if rotary.rope.rope_type == "dynamic":
            cos, sin = rotary(positions_N, length)
            return cos.contiguous(), sin.contiguous()
        angles, tables = self._tables
        if not angles or last >= len(angles[0]):
            count = _FIRST_POSITIONS
            while count <= last:
                count *= 2
            angles = tuple(t.contiguous() for t in rotary(torch.arange(count)))
            tables = list(map(extension.float_matrix, angles))
            self._tables = angles, tables
        n, half, call = len(positions_N), angles[0].shape[1], extension.kernels()
        cos, sin = torch.empty(n, half), torch.empty(n, half)
        call.embed(tables[0], positions_N.data_ptr(), n, cos.data_ptr())
        call.embed(tables[1], positions_N.data_ptr(), n, sin.data_ptr())
        return cos, sin


def _fits(decoder: Decoder, layers: list[PreparedLayer]) -> bool:
    """Whether all layers are alike, and what is around them is the network's own, in fp32, and for the kernels."""
    embedding, norm, rotary = (getattr(decoder, name) for name in _AROUND)
    types: tuple[tuple[nn.Module, tuple[type, ...]], ...] = (
        (embedding, (nn.Embedding, PackedEmbedding)), (norm, (RMSNorm,)), (rotary, (RotaryEmbedding,)),
    )  # fmt: skip
    for module, allowed in types:
        if type(module) not in allowed or "forward" in vars(module) or has_hooks(module):
            return False
        if getattr(module, "backend", AUTO) not in (AUTO, "cpu"):
            return False
    formats: dict[str, Any] = getattr(embedding, "formats", {})
    if any(format.name not in extension.PACKED_TYPES for format in formats.values()):
        return False
    if embedding.max_norm is not None or getattr(embedding, "compute_dtype", None) not in (None, torch.float32):
        return False
    plain = [norm.weight] if formats else [norm.weight, embedding.weight]
    if any(type(p) is not nn.Parameter or p.dtype != torch.float32 for p in plain):
        return False
    if any(not p.is_contiguous() or p.device.type != "cpu" for p in (norm.weight, embedding.weight)):
        return False
    hidden = layers[0].hidden
    shapes = norm.weight.shape == (hidden,) and matrix_shape(embedding, "weight")[1:] == (hidden,)
    return shapes and all(layer.kernel is not None and layer.form() == layers[0].form() for layer in layers)
