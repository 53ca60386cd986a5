"""One decoder layer by the C++ kernels: two calls, with attention between them, in place of thirty operations.

The kernels' view of a layer is compiled like a runner's (`olmoe.runner.compile`), but modules of the transformers face
may be hooked, adapted and edited between two calls: a snapshot tells at each call whether the view is up to date.

Shapes legend: N tokens, D hidden, Dh head dim, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from olmoe.hf.router_policy import router_policy_of
from olmoe.hf.snapshot import Snapshot
from olmoe.model import Attend, DecoderLayer, RouterOutput
from olmoe.ops.cpu import extension
from olmoe.ops.cpu.functional import FEW_ROWS, many_rows
from olmoe.ops.dispatch import AUTO
from olmoe.ops.types import RoutePolicy
from olmoe.quant import PackedModule
from olmoe.runner.base import Unfit
from olmoe.runner.compile import PROJECTIONS, CompiledLayer
from olmoe.runtime import log_once

_NORMS = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")  # of the layer, then of attention
_SETTINGS = (
    "forward", "backend", "eps", "top_k", "norm_topk_prob", "head_dim", "clip_qkv", "act_fn", "formats", "shapes",
)  # fmt: skip


class LayerView:
    """The kernels' view of one state of a layer; `compiled` is None if they do not fit."""

    def __init__(self, layer: DecoderLayer) -> None:
        """Record everything that the view depends on, and make it."""
        self.snapshot = Snapshot()
        attention, moe = layer._modules["self_attn"], layer._modules["mlp"]
        owners = (
            (layer, ("self_attn", "mlp", *_NORMS[:2])),
            (attention, (*PROJECTIONS, *_NORMS[2:])),
            (moe, ("gate", "experts")),
            (None if moe is None else moe._modules.get("experts"), ("act_fn",)),  # where it is a module
        )
        for owner, names in owners:
            for name in names:
                module = None if owner is None else owner._modules.get(name)
                if owner is not None and module is not None:
                    self.snapshot.child(owner, name)
                    self.snapshot.module(module, _SETTINGS)
        self.snapshot.complete()
        self.compiled: CompiledLayer | None = None
        try:
            self.compiled = CompiledLayer(layer)
        except Unfit as reason:
            log_once(f"layers run on torch: {reason}")
        self._packed = any(isinstance(module, PackedModule) for module in layer.modules())
        self._named = any(vars(module).get("backend", AUTO) == "cpu" for module in layer.modules())

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels can compute inputs like `x` (..., D), without gradients and at least as fast as torch."""
        if self.compiled is None or x.shape[-1] != self.compiled.hidden or x.dtype != self.compiled.dtype:
            return False
        rows = x.numel() // self.compiled.hidden
        if not (self._packed or self._named or rows <= FEW_ROWS or many_rows(self.compiled.dtype)):
            return False
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in self.snapshot.parameters))


class KernelDecoderLayer(DecoderLayer):
    """`DecoderLayer` by the C++ kernels if they fit: inference on CPU tensors, plain or block-packed matrices,
    no hooks, adapters or replaced modules inside. Otherwise, and for training, it is an ordinary layer.
    """  # fmt: skip

    _view: LayerView | None = None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend, policy: RoutePolicy | None = None
    ) -> tuple[Tensor, RouterOutput]:
        """See `DecoderLayer.forward`."""
        done = self.through_kernels(x, rope, attend) if policy is None else None
        return super().forward(x, rope, attend, policy) if done is None else done

    def through_kernels(
        self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend
    ) -> tuple[Tensor, RouterOutput] | None:
        """`forward` by the kernels; None, with nothing done, if they do not fit."""
        compiled = self._fitting(x, rope)
        if compiled is None:
            return None
        lead, d, head_dim = x.shape[:-1], x.shape[-1], compiled.head_dim
        width, e, policy = compiled.kv_heads * head_dim, compiled.experts, router_policy_of(self)
        top_k = compiled.top_k if policy is None else policy.kernel.largest
        rows_ND = extension.wide(x).view(-1, d)
        n = len(rows_ND)
        shape = (*lead, head_dim // 2)
        cos, sin = (extension.wide(t if t.shape == shape else t.expand(shape)) for t in rope)
        y, logits = torch.empty(n, d), torch.empty(n, e)
        weights, ids = torch.empty(n, top_k), torch.empty(n, top_k, dtype=torch.long)
        outputs = y.data_ptr(), logits.data_ptr(), weights.data_ptr(), ids.data_ptr()
        routed = RouterOutput(logits, weights, ids)
        q, k, v = torch.empty(n, d), torch.empty(n, width), torch.empty(n, width)
        compiled.kernel.attention_inputs(
            rows_ND.data_ptr(), cos.data_ptr(), sin.data_ptr(), n, q.data_ptr(), k.data_ptr(), v.data_ptr()
        )
        q, k, v = (t.to(x.dtype).view(*lead, -1, head_dim) for t in (q, k, v))
        attended = attend(q, k, v, self.self_attn.layer)
        assert attended.numel() == n * d
        if attended.requires_grad:  # through cached keys and values, as for trained prefixes
            return self.after_attention(x + self.self_attn.o_proj(attended.reshape(x.shape)))
        attended = extension.wide(attended)
        changes = (None, 0) if policy is None else (policy.kernel.kernel, policy.layer)
        compiled.kernel.attention_output(rows_ND.data_ptr(), attended.data_ptr(), n, *outputs, *changes)
        return y.to(x.dtype).view(x.shape), routed

    def _fitting(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> CompiledLayer | None:
        """The kernels' view of this layer, with its current weights; None if they do not fit."""
        compiled = self.current(x) if inputs_fit(x, rope) else None
        if compiled is not None:
            compiled.refresh()
        return compiled

    def current(self, x: Tensor) -> CompiledLayer | None:
        """The kernels' view of this layer as it is now; None if the kernels do not fit it, or inputs like `x`."""
        view = self._view
        if view is None or not view.snapshot.unchanged():
            view = LayerView(self)
            object.__setattr__(self, "_view", view)  # not a module, parameter or buffer
        return view.compiled if view.fits(x) else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which prepare their own kernels."""
        return {name: value for name, value in self.__dict__.items() if name != "_view"}


def inputs_fit(x: Tensor, rope: tuple[Tensor, Tensor]) -> bool:
    """Whether the kernels may run at all, on such inputs; they then have as many threads as torch."""
    if extension.unsupported(x, *rope) is not None or x.numel() == 0 or _has_any_global_hook():
        return False
    extension.kernels()
    return True
