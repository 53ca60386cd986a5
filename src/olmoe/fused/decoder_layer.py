"""One decoder layer through the C++ kernels.

Shapes legend: N tokens, D hidden, Dh head dim, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from olmoe.fused.prepared_layer import PreparedLayer, prepare
from olmoe.model import Attend, DecoderLayer, RouterOutput
from olmoe.ops.cpu import extension
from olmoe.ops.types import RoutePolicy


class FusedDecoderLayer(DecoderLayer):
    """`DecoderLayer` through the C++ kernels where they fit; see the package's docstring."""

    _prepared: PreparedLayer | None = None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, policy: RoutePolicy | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """See `DecoderLayer.forward`."""
        done = self.through_kernels(x, rope, attend) if policy is None else None
        return super().forward(x, rope, attend, policy) if done is None else done

    def through_kernels(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend
    ) -> tuple[Tensor, RouterOutput] | None:
        """`forward` by the kernels; None, and nothing done, where they do not fit."""
        prepared = self._fitting(x, rope)
        if prepared is None:
            return None
        lead, d, head_dim = x.shape[:-1], x.shape[-1], prepared.head_dim
        width, e, top_k = prepared.kv_width, prepared.experts, prepared.top_k
        rows_ND = extension.wide(x).view(-1, d)
        n = len(rows_ND)
        shape = (*lead, head_dim // 2)
        cos, sin = (extension.wide(t if t.shape == shape else t.expand(shape)) for t in rope)
        y, logits = torch.empty(n, d), torch.empty(n, e)
        weights, ids = torch.empty(n, top_k), torch.empty(n, top_k, dtype=torch.long)
        outputs = y.data_ptr(), logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        routed = RouterOutput(logits, weights, ids)
        q, k, v = torch.empty(n, d), torch.empty(n, width), torch.empty(n, width)
        prepared.kernel.attention_inputs(
            rows_ND.data_ptr(), cos.data_ptr(), sin.data_ptr(), n, q.data_ptr(), k.data_ptr(), v.data_ptr()
        )
        q, k, v = (t.to(x.dtype).view(*lead, -1, head_dim) for t in (q, k, v))
        attended = attend(q, k, v, self.self_attn.layer)
        assert attended.numel() == n * d
        if attended.requires_grad:  # through cached keys and values: prefixes that are trained
            return self.after_attention(x + self.self_attn.o_proj(attended.reshape(x.shape)))
        attended = extension.wide(attended)
        prepared.kernel.attention_output(rows_ND.data_ptr(), attended.data_ptr(), n, *outputs)
        return y.to(x.dtype).view(x.shape), routed

    def _fitting(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> PreparedLayer | None:
        """The kernels' view of this layer, made anew if something in it changed; None where they do not fit."""
        if not inputs_fit(x, rope):
            return None
        prepared = self.current(x)
        if prepared is not None:
            prepared.refresh()
        return prepared

    def current(self, x: Tensor) -> PreparedLayer | None:
        """The kernels' view of this layer as it is now; None where the kernels do not fit it, or inputs like `x`."""
        prepared = self._prepared
        if prepared is None or not prepared.watch.still():
            prepared = prepare(self)
            object.__setattr__(self, "_prepared", prepared)  # not a module, parameter or buffer
        if prepared.kernel is None or x.shape[-1] != prepared.hidden or x.dtype != prepared.dtype:
            return None
        if not prepared.fits_rows(x.numel() // prepared.hidden):
            return None  # torch's products are faster
        return None if torch.is_grad_enabled() and prepared.needs_gradients() else prepared

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own kernels."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}


def inputs_fit(x: Tensor, rope: tuple[Tensor, Tensor]) -> bool:
    """Whether the kernels may run at all, on such inputs; they then have as many threads as torch."""
    if extension.unsupported(x, *rope) is not None or x.numel() == 0 or _has_any_global_hook():
        return False
    extension.kernels()
    return True
