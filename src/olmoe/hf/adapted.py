"""Packed modules under PEFT's adapters.

Most of PEFT's methods read `base_layer.weight`, and its LoRA on experts `base_layer.gate_up_proj`: of a packed module
they would see codes. So a packed module that PEFT wraps changes its class, and for as long as it is wrapped these
attributes are what the codes stand for (`olmoe.quant.decoded`), which cannot be written. Its parameters, their names
and the state dict stay those of a packed module.

PEFT tells nobody what it wraps, and some of its methods read weights as soon as they did. torch does tell: its hook for
modules that become children of others is asked, from the first packed model on.
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
from olmoe.hf.lora import route_wrapper
from olmoe.model import Linear
from olmoe.quant import PackedEmbedding, PackedExperts, PackedLinear, PackedModule
from olmoe.quant.decoded import DecodedWeight, decoded, refusal


class Adapted(PackedModule):
    """Mixed into packed modules while they are wrapped: the names of packed matrices give decoded ones."""

    head = False  # whether it is a language model's, whose weight training libraries read without any adapter
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


_ADAPTED: dict[type, type] = {
    PackedLinear: AdaptedLinear,
    PackedEmbedding: AdaptedEmbedding,
    PackedExperts: AdaptedExperts,
}
_PACKED = {adapted: packed for packed, adapted in _ADAPTED.items()}


# Methods that give their own modules the dtype of whatever parameter comes first.
_READING_A_DTYPE = ("ShadowModel", "XLoraModel")
# Packed modules of models that a method of PEFT's is looking at, which may read weights before it wraps anything.
_shown: weakref.WeakSet[PackedModule] = weakref.WeakSet()


@functools.cache
def notice_adapters() -> None:
    """Let packed modules notice, from now on, that PEFT wraps or unwraps them."""
    register_module_module_registration_hook(_noticed)


def show_head(head: Any) -> None:
    """Let an output head be read decoded for good: losses that are fused with it read its weight themselves."""
    if type(head) is PackedLinear and not _offloaded(head):
        shown: Any = head
        shown.__class__, shown.head = AdaptedLinear, True


def settle(root: nn.Module) -> None:
    """Make packed modules under `root` that PEFT looked at and did not wrap, or not to the end, ordinary ones again."""
    if not _shown:
        return
    modules = list(root.modules())
    wrapped = {id(child) for module in modules if _is_pefts(module) for child in module.children()}
    for module in modules:
        if isinstance(module, PackedModule) and module in _shown:
            _shown.discard(module)
            if id(module) not in wrapped:
                _restore(module)


def _noticed(owner: nn.Module, name: str, module: Any) -> None:
    """torch's hook: `module` becomes the child `name` of `owner`."""
    if "peft" not in sys.modules or module is None:
        return
    if isinstance(module, PackedModule):
        if name in ("base_layer", "original_module", "word_embeddings") and _is_pefts(owner):
            _adapt(owner, module)
        elif isinstance(module, Adapted):
            former = owner._modules.get(name)
            if former is not None and _is_pefts(former) and any(m is module for m in former.modules()):
                _restore(module)
    elif name == "base_layer":
        if isinstance(unwrapped(module), Adapted):
            route_wrapper(owner)
    elif name in ("model", "lora_model") and _is_pefts(owner):  # a method starts
        _check_method(owner, module)
        for packed in module.modules():
            if type(packed) in _ADAPTED and not _offloaded(packed):
                packed.__class__ = _ADAPTED[type(packed)]
                _shown.add(packed)
    elif name == "base_model":  # and it is done
        settle(module)


def _check_method(tuner: nn.Module, model: nn.Module) -> None:
    first, method = next(model.parameters(), None), type(tuner).__name__
    if method in _READING_A_DTYPE and first is not None and not first.is_floating_point():
        raise UserError(
            f"PEFT's {method} takes its dtype from the model's first weight, which is packed as {first.dtype} here; "
            "call dequantize() on the model first, or load it with BitsAndBytesConfig, which leaves embeddings plain."
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


def _adapt(owner: nn.Module, module: PackedModule) -> None:
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if _offloaded(module):
        # accelerate brings the codes in for a call, and looks for them under their names.
        if isinstance(owner, LoraLayer) and not isinstance(module, PackedExperts):
            return
        raise UserError(
            "Of a quantized model that is partly offloaded only linear layers and embeddings take adapters, and only "
            "LoRA's; load it without a device_map that offloads."
        )
    if type(module) in _ADAPTED:
        module.__class__ = _ADAPTED[type(module)]
    module.trained = isinstance(owner, ModulesToSaveWrapper)  # type: ignore[assignment]
    route_wrapper(owner)


def _restore(module: PackedModule) -> None:
    module.__dict__.pop("trained", None)
    if "head" not in vars(module):
        module.__class__ = _PACKED.get(type(module), type(module))


def plain_module(module: PackedModule, dtype: torch.dtype) -> nn.Module:
    """The ordinary module with the decoded weights of a packed one."""
    if isinstance(module, PackedExperts):
        with torch.device("meta"):
            experts = OlmoeExperts(module.config)  # type: ignore[arg-type]  # see `olmoe.hf.switching.describe`
        experts.act_fn = module.act_fn  # type: ignore[assignment]
        return _filled(experts, module, dtype, "gate_up_proj", "down_proj")
    with torch.device("meta"):
        if isinstance(module, PackedEmbedding):
            embedding = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
            return _filled(embedding, module, dtype, "weight")
        assert isinstance(module, PackedLinear)
        linear = Linear(module.in_features, module.out_features, bias=False)
    linear.bias = module.bias
    return _filled(linear, module, dtype, "weight")


def _filled(plain: Any, module: PackedModule, dtype: torch.dtype, *names: str) -> nn.Module:
    """`plain` with the weights of `module`, which are its own where they are not packed."""
    if hasattr(plain, "backend"):
        plain.backend = module.backend
    for name in names:
        stored = module.get_parameter(name) if name not in module.shapes else None
        setattr(plain, name, stored if stored is not None else nn.Parameter(decoded(module, name, dtype)))
    return plain.train(module.training)


class Trained(nn.Module):
    """Mixed into the fp32 copy of a packed module that is trained whole: outputs have the dtype that they had."""

    given: torch.dtype | None  # of outputs for ids; None: fp32

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Of the class it is mixed into."""
        if not x.is_floating_point():
            return super().forward(x, *args).to(self.given or torch.float32)
        return super().forward(x.float(), *args).to(x.dtype)


class TrainedLinear(Trained, Linear):
    """A linear layer in `modules_to_save` of a quantized model."""


class TrainedEmbedding(Trained, nn.Embedding):
    """An embedding in `modules_to_save` of a quantized model."""


class TrainedExperts(Trained, OlmoeExperts):
    """Experts in `modules_to_save` of a quantized model."""


_TRAINED: dict[type, type] = {Linear: TrainedLinear, nn.Embedding: TrainedEmbedding, OlmoeExperts: TrainedExperts}


def _trained_copy(module: PackedModule) -> nn.Module:
    plain: Any = plain_module(module, torch.float32)
    if isinstance(plain, OlmoeExperts):
        plain.act_fn = copy.deepcopy(plain.act_fn)
    for name, parameter in list(plain.named_parameters(recurse=False)):
        setattr(plain, name, nn.Parameter(parameter.detach().float().clone()))  # also what was plain, or a bias
    plain.__class__ = _TRAINED[type(plain)]
    plain.given = module.compute_dtype
    return plain
