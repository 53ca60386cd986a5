"""A packed matrix seen as the tensor that it represents, for code that knows nothing about packing.

Adapter methods read the weight of the layer that they adapt: its shape, its dtype, its norm, products with it. Through
`DecodedWeight` they see numbers instead of codes. Nothing is decoded before it is needed, and nothing can be written,
because a change to decoded values would be silently lost.

Shapes legend: E experts, R rows, C columns.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from olmoe.errors import UserError
from olmoe.quant.modules import PackedModule

# Functions that would change the weight, or the storage that it lacks, before an operation is dispatched.
_WRITES = (Tensor.data.__set__, Tensor.__setitem__, Tensor.set_)  # type: ignore[attr-defined]
_GRADIENTS = (Tensor.requires_grad.__set__, Tensor.requires_grad_)  # type: ignore[attr-defined]
# Functions that access that storage.
_COPIES = (Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.numpy, Tensor.tolist)


def refusal(module: PackedModule, name: str) -> UserError:
    """The error to raise for an attempt to change a packed weight."""
    return UserError(
        f"{name} is packed as {module.formats[name].name} and cannot be changed, which merging adapters would do, or "
        "starting them from another weight; call dequantize() on the model first."
    )


def decoded(module: PackedModule, name: str, dtype: torch.dtype) -> Tensor:
    """The packed matrix `name`, decoded: (R, C), or (E, R, C) for a stack."""
    if not module.stack:
        return module.decode(name, dtype)
    return torch.stack([module.decode(name, dtype, e) for e in range(module.stack[0])])


class DecodedWeight(Tensor):
    """The matrix `name` of a packed module, (R, C), or (E, R, C) for a stack, decoded again for each operation on it.

    Views of it are just as lazy.
    """

    _is_param = True  # so that it passes for the parameter that it replaces

    packed: tuple[PackedModule, str]
    views: tuple[Callable[[Any], Any], ...]  # applied to the decoded matrix, they give this tensor

    @staticmethod
    def __new__(cls, module: PackedModule, name: str) -> DecodedWeight:
        """Costs nothing; `module` keeps its codes."""
        shape = (*module.stack, *module.shapes[name])
        dtype = module.plain[0].dtype if module.plain else torch.float32
        return cls._make(torch.empty(shape, dtype=dtype, device="meta"), module.get_stored(name).device, (module, name))

    @classmethod
    def _make(
        cls,
        like: Tensor,
        device: torch.device,
        packed: tuple[PackedModule, str],
        views: tuple[Callable[[Any], Any], ...] = (),
    ) -> DecodedWeight:
        made: DecodedWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made.packed, made.views = packed, views
        return made

    def decoded(self) -> Tensor:
        """An ordinary tensor with the values."""
        values: Any = decoded(*self.packed, self.dtype)
        for view in self.views:
            values = view(values)
        assert isinstance(values, Tensor)
        return values

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        """Without decoding."""
        module, name = self.packed
        return f"DecodedWeight({module.formats[name].name}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's protocol: functions called with a tensor of this class, before autograd."""
        wants_gradient = func in _GRADIENTS and (*args, *(kwargs or {}).values(), True)[1]
        if args and isinstance(args[0], DecodedWeight):
            if func in _WRITES or wants_gradient:
                raise refusal(*args[0].packed)
            if func in _COPIES:
                return func(args[0].decoded(), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """torch's protocol: operations on a tensor of this class, after autograd."""
        kwargs, arguments = kwargs or {}, func._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for target in written:
            if isinstance(target, DecodedWeight):
                raise refusal(*target.packed)
        if func.is_view and isinstance(args[0], DecodedWeight):
            return args[0]._viewed(functools.partial(_call, func, args[1:], kwargs))
        args, kwargs = tree_map_only(DecodedWeight, lambda weight: weight.decoded(), (args, kwargs))
        return func(*args, **kwargs)

    def _viewed(self, view: Callable[[Any], Any]) -> Any:
        """The result of a view, or of an operation that makes several views, on this tensor."""
        source = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        found = view(source)
        if isinstance(found, Tensor):
            return self._make(found, self.device, self.packed, (*self.views, view))
        return [
            self._make(part, self.device, self.packed, (*self.views, view, operator.itemgetter(i)))
            for i, part in enumerate(found)
        ]


def _call(func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor) -> Any:
    return func(source, *rest, **kwargs)
