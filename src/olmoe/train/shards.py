"""The parts that one process holds of shared tensors, and how whole values get in and out.

Everything here also takes plain tensors, which a process holds entirely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from olmoe.model import CausalLM
from olmoe.runtime import no_grad
from olmoe.weights.names import EMBEDDING, EXPERTS, HEAD
from olmoe.weights.source import WeightSource

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Part = tuple[slice, ...]


class Parts(Protocol):
    """A tensor, or what reads parts of one from files."""

    def __getitem__(self, part: Part, /) -> Tensor:
        """A part, with all dimensions of the whole."""
        ...


def _is_shared(value: Tensor) -> TypeGuard[DTensor]:
    if type(value) in (Tensor, nn.Parameter):  # whose process may do without the import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return value.to_local() if _is_shared(value) else value


def owned(value: Tensor) -> Part:
    """Which part of the whole tensor `local` is."""
    if not _is_shared(value):
        return tuple(slice(0, size) for size in value.shape)
    if 0 in value.to_local().shape:
        return tuple(slice(0, size) for size in value.to_local().shape)
    (chunk,) = value.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def whole(value: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them call it together."""
    return value.full_tensor() if _is_shared(value) else value


@no_grad
def assign(parameter: Tensor, values: Tensor) -> None:
    """Copy to a parameter what this process holds of whole values."""
    assert parameter.shape == values.shape
    local(parameter).copy_(values[owned(parameter)])


def load_weights(model: CausalLM, source: WeightSource) -> None:
    """Fill a model from a source, reading of stacked experts only those that this process holds."""
    load_parameters(model.named_parameters(), source)


@no_grad
def load_parameters(named: Iterable[tuple[str, nn.Parameter]], source: WeightSource) -> None:
    """`load_weights` of some parameters, by the names that a model has for them."""
    tied = source.config.tie_word_embeddings
    for name, parameter in named:
        if EXPERTS not in name:
            assign(parameter, source.read(EMBEDDING if name == HEAD and tied else name))
            continue
        experts, *rest = owned(parameter)
        for place, expert in enumerate(range(experts.start, experts.stop)):
            local(parameter)[place] = source.read(name, expert)[tuple(rest)]


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What AdamW, or RMSprop, calls what it remembers of a parameter."""
    return ("square_avg",) if isinstance(optimizer, torch.optim.RMSprop) else ("exp_avg", "exp_avg_sq")


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer remembers of a parameter; zeros before its first step."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {name: torch.zeros_like(parameter) for name in moment_names(optimizer)}
    return state


def whole_moments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as one process alone would have it, on the CPU; all call it together."""
    found = optimizer.state_dict()
    states = {
        number: {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
        for number, state in found["state"].items()
    }
    return found | {"state": states}


@no_grad
def set_moments(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: float, saved: Mapping[str, Parts]
) -> None:
    """Give an optimizer what it remembered of a parameter after `step` steps: of each moment by name, its parts."""
    state = moments(optimizer, parameter)
    state["step"].fill_(step)
    for name in moment_names(optimizer):
        local(state[name]).copy_(saved[name][owned(parameter)])
