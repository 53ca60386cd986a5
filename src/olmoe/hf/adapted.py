"""Packed modules under PEFT's adapters.

Most of PEFT's methods read `base_layer.weight`, and its LoRA on experts reads `base_layer.gate_up_proj`: in a packed
module they would see codes. So PEFT wraps a view of a packed module under another class, and while it does these
attributes are decoded values (`olmoe.quant.decoded`), which cannot be written. Its parameters, their names and the
state dict stay those of a packed module.

PEFT does not announce what it wraps, and some of its methods read weights immediately. torch does announce it: its hook
for modules that become children of others is registered with the first packed model.
"""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from olmoe.errors import UserError
from olmoe.hf.experts import OlmoeExperts
from olmoe.hf.lora import routed_wrapper
from olmoe.hf.view import view_as
from olmoe.model import Linear
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from olmoe.quant.decoded import DecodedWeight, decoded, refusal


class Adapted(PackedModule):
    """Mixed into packed modules while they are wrapped: the names of packed matrices give decoded ones."""

    head = False  # whether it is an output head, whose weight training libraries read even without an adapter
    trained = False  # whether a direct copy is made to be trained, as for `modules_to_save`

    def __getattr__(self, name: str) -> Any:
        """A decoded matrix for its name."""
        if name in self.__dict__.get("shapes", ()):
            return DecodedWeight(self, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Everything but packed matrices can be set."""
        if name in self.__dict__.get("shapes", ()):
            raise refusal(self, name)
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Packed again; but what is trained and saved whole is copied as an ordinary module."""
        if self.trained and not memo:
            return _trained_copy(self)
        new: Any = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class AdaptedLinear(Adapted, PackedLinear):
    """`PackedLinear` while it is wrapped."""


class AdaptedEmbedding(Adapted, PackedEmbedding):
    """`PackedEmbedding` while it is wrapped."""


class AdaptedExperts(Adapted, PackedExperts):
    """`PackedExperts` while they are wrapped."""


_ADAPTED: dict[Any, type[Any]] = {
    PackedLinear: AdaptedLinear,
    PackedEmbedding: AdaptedEmbedding,
    PackedExperts: AdaptedExperts,
}
_PACKED = {adapted: packed for packed, adapted in _ADAPTED.items()}


# Methods that give their own modules the dtype of the first parameter they find.
_READING_A_DTYPE = ("ShadowModel", "XLoraModel")
# Packed modules of models that a PEFT method is examining; it may read weights before it wraps anything.
_shown: weakref.WeakSet[PackedModule] = weakref.WeakSet()


@functools.cache
def notice_adapters() -> None:
    """Let packed modules notice, from now on, that PEFT wraps or unwraps them."""
    register_module_module_registration_hook(_noticed)


def shown_head(head: Any) -> Any:
    """An output head that always reads as decoded: losses that are fused with it read its weight themselves."""
    if type(head) is PackedLinear and not _offloaded(head):
        head = view_as(AdaptedLinear, head)
        head.head = True
    return head


def settle(root: nn.Module) -> None:
    """Make packed modules under `root` ordinary again that PEFT examined but did not wrap, or not to the end."""
    if not _shown:
        return
    for owner in list(root.modules()):
        for name, module in list(owner.named_children()):
            if isinstance(module, PackedModule) and module in _shown:
                _shown.discard(module)
                if not _is_pefts(owner):
                    owner._modules[name] = _restored(module)


def _noticed(owner: nn.Module, name: str, module: Any) -> Any:
    """torch's hook: `module`, or what is returned, becomes the child `name` of `owner`."""
    if "peft" not in sys.modules or module is None:
        return None
    if isinstance(module, PackedModule):
        return _placed(owner, name, module)
    if name == "original_module" and _is_pefts(owner):
        _check_whole(module)
    elif name in ("model", "lora_model") and _is_pefts(owner):  # a method starts
        _check_method(owner, module)
        _show(module)
    elif name == "base_model":  # and it is done
        settle(module)
    elif _is_pefts(module) and isinstance(unwrapped(module), Adapted):
        return routed_wrapper(module)
    return None


def _placed(owner: nn.Module, name: str, module: PackedModule) -> PackedModule | None:
    """The replacement of a packed module that PEFT wraps or unwraps; None for others."""
    if name in ("base_layer", "original_module", "word_embeddings") and _is_pefts(owner):
        return _adapted(owner, module)
    if not isinstance(module, Adapted):
        return None
    former = owner._modules.get(name)
    unwraps = former is not None and _is_pefts(former) and any(m is module for m in former.modules())
    return _restored(module) if unwraps else None


def _show(root: nn.Module) -> None:
    """Make all packed modules under `root` read as decoded until `settle`."""
    for owner in list(root.modules()):
        for name, module in list(owner.named_children()):
            if type(module) in _ADAPTED and not _offloaded(module):
                shown: Any = view_as(_ADAPTED[type(module)], module)
                owner._modules[name] = shown
                _shown.add(shown)


def _check_method(tuner: nn.Module, model: nn.Module) -> None:
    first, method = next(model.parameters(), None), type(tuner).__name__
    if method in _READING_A_DTYPE and first is not None and not first.is_floating_point():
        raise UserError(
            f"PEFT's {method} takes its dtype from the model's first weight, which is packed as {first.dtype} here; "
            "call dequantize() on the model first, or load it with BitsAndBytesConfig, which leaves embeddings plain."
        )


def _check_whole(container: nn.Module) -> None:
    packed = next((name for name, child in container.named_modules() if isinstance(child, PackedModule)), None)
    if packed is not None:
        raise UserError(
            f"modules_to_save names a {type(container).__name__}, whose {packed} is packed, and codes cannot be "
            f"trained; name the modules inside it, such as {packed.rpartition('.')[2]!r}, or call dequantize() on the "
            "model first."
        )


def _is_pefts(owner: nn.Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(owner).__mro__)


def _offloaded(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def unwrapped(module: Any) -> Any:
    """The module inside all of PEFT's wrappers."""
    while (inner := module._modules.get("base_layer", module._modules.get("original_module"))) is not None:
        module = inner
    return module


def _adapted(owner: nn.Module, module: PackedModule) -> PackedModule:
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if _offloaded(module):
        # accelerate loads the codes for a call, and looks for them under their names.
        if isinstance(owner, LoraLayer) and not isinstance(module, PackedExperts):
            return module
        raise UserError(
            "Of a quantized model that is partly offloaded only linear layers and embeddings take adapters, and only "
            "LoRA's; load it without a device_map that offloads."
        )
    if type(module) in _ADAPTED:
        module = view_as(_ADAPTED[type(module)], module)
    module.trained = isinstance(owner, ModulesToSaveWrapper)  # type: ignore[assignment]
    return module


def _restored(module: PackedModule) -> PackedModule:
    """A packed module as it is without PEFT."""
    module.__dict__.pop("trained", None)
    if "head" in vars(module) or type(module) not in _PACKED:
        return module
    return view_as(_PACKED[type(module)], module)


def plain_module(module: PackedModule, dtype: torch.dtype, trained: bool = False) -> nn.Module:
    """An ordinary module with the decoded weights of a packed one; if `trained`, one of the `Trained` classes."""
    if isinstance(module, PackedExperts):
        with torch.device("meta"):
            kind = TrainedExperts if trained else OlmoeExperts
            experts = kind(module.config)  # type: ignore[arg-type]  # see `olmoe.hf.switching.describe`
        experts.act_fn = module.act_fn  # type: ignore[assignment]
        return _filled(experts, module, dtype, "gate_up_proj", "down_proj")
    with torch.device("meta"):
        if isinstance(module, PackedEmbedding):
            embedding = (TrainedEmbedding if trained else nn.Embedding)(
                module.num_embeddings, module.embedding_dim, module.padding_idx
            )
            return _filled(embedding, module, dtype, "weight")
        assert isinstance(module, PackedLinear)
        linear = (TrainedLinear if trained else Linear)(module.in_features, module.out_features, bias=False)
    linear.bias = module.bias
    return _filled(linear, module, dtype, "weight")


def _filled(plain: Any, module: PackedModule, dtype: torch.dtype, *names: str) -> nn.Module:
    """`plain` with the weights of `module`, shared if they are not packed."""
    if hasattr(plain, "backend"):
        plain.backend = module.backend
    for name in names:
        stored = module.get_parameter(name) if name not in module.shapes else None
        setattr(plain, name, stored if stored is not None else nn.Parameter(decoded(module, name, dtype)))
    return plain.train(module.training)


class Trained(nn.Module):
    """Mixed into the fp32 copy of a packed module that is trained as a whole: outputs keep their former dtype."""

    given: torch.dtype | None  # dtype of outputs for ids; None: fp32

    def forward(self, x: Tensor, *args: Any) -> Any:
        """`forward` of the class it is mixed into."""
        if not x.is_floating_point():
            return super().forward(x, *args).to(self.given or torch.float32)
        return super().forward(x.float(), *args).to(x.dtype)


class TrainedLinear(Trained, Linear):
    """A linear layer in `modules_to_save` of a quantized model."""


class TrainedEmbedding(Trained, nn.Embedding):
    """An embedding in `modules_to_save` of a quantized model."""


class TrainedExperts(Trained, OlmoeExperts):
    """Experts in `modules_to_save` of a quantized model."""


def _trained_copy(module: PackedModule) -> nn.Module:
    plain: Any = plain_module(module, torch.float32, trained=True)
    if isinstance(plain, OlmoeExperts):
        plain.act_fn = copy.deepcopy(plain.act_fn)
    for name, parameter in list(plain.named_parameters(recurse=False)):
        setattr(plain, name, nn.Parameter(parameter.detach().float().clone()))  # including what was plain, or a bias
    plain.given = module.compute_dtype
    return plain
