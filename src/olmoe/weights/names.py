"""The names of the tensors in an OLMoE checkpoint, and which part of which parameter each of them is. No torch.

The network stacks the experts of a layer: `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F). In the per-expert
layout, which the hub holds and `export.save` writes, every expert has three matrices of its own.

Shapes legend: D hidden, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from olmoe.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one matrix if they are tied
GATE_UP, DOWN = "gate_up_proj", "down_proj"
EXPERTS = "mlp.experts"  # in a layer
# One spelling per number, so that no two names mean the same tensor.
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_LAYER_NAME = re.compile(rf"model\.layers\.({_NUMBER})\.")
_EXPERT_NAME = re.compile(
    rf"(?P<stacks>model\.layers\.{_NUMBER}\.mlp\.experts)\.(?P<expert>{_NUMBER})\.(?P<part>gate|up|down)_proj\.weight"
)


@dataclass(frozen=True)
class Part:
    """A tensor of the per-expert layout: a whole parameter, or the rows of one `expert` from `first_row` on."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    first_row: int = 0

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Its index within the parameter."""
        if self.expert is None:
            return ()
        return (self.expert, slice(self.first_row, self.first_row + self.shape[0]))


def expert_names(prefix: str, expert: int) -> tuple[str, str, str]:
    """The names of one expert's gate, up and down matrix; `prefix` leads to its layer's experts and ends in a dot."""
    gate, up, down = (f"{prefix}{expert}.{part}_proj.weight" for part in ("gate", "up", "down"))
    return gate, up, down


def parts_of(parameter: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """The tensors of the per-expert layout that hold a parameter of this shape."""
    stacks, _, leaf = parameter.rpartition(".")
    if not stacks.endswith(EXPERTS) or leaf not in (GATE_UP, DOWN):
        yield Part(parameter, shape, parameter)
        return
    experts, rows, columns = shape
    for e in range(experts):
        gate, up, down = expert_names(f"{stacks}.", e)
        if leaf == DOWN:
            yield Part(down, (rows, columns), parameter, e)
        else:
            yield Part(gate, (rows // 2, columns), parameter, e)
            yield Part(up, (rows // 2, columns), parameter, e, rows // 2)


def expert_part(name: str, config: ModelConfig) -> Part | None:
    """The part that a tensor of this name is, if the name is that of a matrix of one expert."""
    match = _EXPERT_NAME.fullmatch(name)
    if match is None or int(match["expert"]) >= config.num_experts:
        return None
    f, d, e = config.intermediate_size, config.hidden_size, int(match["expert"])
    if match["part"] == "down":
        return Part(name, (d, f), f"{match['stacks']}.{DOWN}", e)
    return Part(name, (f, d), f"{match['stacks']}.{GATE_UP}", e, 0 if match["part"] == "gate" else f)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor of this name belongs to; None outside of layers."""
    match = _LAYER_NAME.match(name)
    return None if match is None else int(match[1])


def count_layers(names: Iterable[str]) -> int:
    """How many layers the tensors of these names belong to."""
    return len({layer_of(name) for name in names} - {None})


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of `CausalLM(config)`, without building it."""
    d, kv, e, f = config.hidden_size, config.kv_heads * config.head_dim, config.num_experts, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (d, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, d),
        "self_attn.q_norm.weight": (d,),
        "self_attn.k_norm.weight": (kv,),
        "mlp.gate.weight": (e, d),
        f"{EXPERTS}.{GATE_UP}": (e, 2 * f, d),
        f"{EXPERTS}.{DOWN}": (e, d, f),
    }
    if config.attention_bias:
        layer |= {f"self_attn.{p}_proj.bias": (d if p in "qo" else kv,) for p in "qkvo"}
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, d)
    return shapes
