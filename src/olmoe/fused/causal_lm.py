"""A step of decoding with the output head in the one call of the C++ kernels.

Shapes legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from olmoe.fused.decoder import FusedDecoder
from olmoe.fused.prepared_layer import kernel_matrix, matrix_shape
from olmoe.fused.watch import Watch, has_hooks
from olmoe.model import Attend, CausalLM, Linear
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import FEW_ROWS, many_rows
from olmoe.ops.dispatch import AUTO
from olmoe.quant import PackedLinear

_SETTINGS = ("forward", "backend", "formats", "shapes")


class FusedCausalLM(CausalLM):
    """`CausalLM` whose steps of decoding are one call of the C++ kernels, where its decoder's are and the head fits."""

    _head: _PreparedHead | None = None

    def step(self, input_ids: Tensor, positions: Tensor, attend: Attend, length: Tensor | None = None) -> Tensor:
        """See `CausalLM.step`."""
        caches, decoder = getattr(attend, "all_cached", None), cast(Any, self.model)
        # Who changed what calling these modules means gets the calls.
        alone = type(decoder) is FusedDecoder and not any("forward" in vars(m) or has_hooks(m) for m in (self, decoder))
        if caches is not None and alone and (head := self._fitting(input_ids.numel())) is not None:
            done = decoder.step(input_ids, positions, caches, length, head)
            if done is not None:
                return done[2]
        return super().step(input_ids, positions, attend, length)

    def _fitting(self, rows: int) -> Any:
        """The kernels' matrix of the head as it is now; None where they do not fit it, or so many rows."""
        prepared = self._head
        if prepared is None or not prepared.watch.still():
            prepared = _PreparedHead(self)
            object.__setattr__(self, "_head", prepared)  # not a module, parameter or buffer
        fast = prepared.packed or rows <= FEW_ROWS or many_rows(torch.float32)
        return prepared.matrix if fast else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own kernels."""
        return {name: value for name, value in self.__dict__.items() if name != "_head"}


class _PreparedHead:
    """The kernels' view of an output head for hidden states in fp32; `matrix` is None where they do not fit."""

    matrix: Any = None

    def __init__(self, model: CausalLM) -> None:
        head: Any = model.lm_head
        self.watch = Watch()
        self.watch.child(model, "lm_head")
        self.watch.module(head, _SETTINGS)
        self.watch.complete()
        formats = getattr(head, "formats", {})
        self.packed = bool(formats)
        if type(head) not in (Linear, PackedLinear) or "forward" in vars(head) or has_hooks(head):
            return
        if head.backend not in (AUTO, "cpu") or head.bias is not None:
            return
        if any(format.name not in extension.PACKED_TYPES for format in formats.values()):
            return
        weight = head.weight
        if type(weight) is not nn.Parameter or weight.device.type != "cpu" or not weight.is_contiguous():
            return
        if not formats and weight.dtype != torch.float32:
            return
        if len(matrix_shape(head, "weight")) == 2:
            self.matrix = kernel_matrix(head, "weight", torch.float32)
