"""Calibration: runs the unquantized model over text to learn what its matrices are multiplied with.

Only the hidden states of all windows, one layer's attention and one expert are in memory. So statistics come one matrix
at a time, in the order in which the forward pass reaches them, and each must be used before the next is requested:
those of all experts together would be larger than the model.

Shapes legend: B windows, T tokens of a window, N tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from olmoe.model import DecoderLayer, RMSNorm, RotaryEmbedding, activation, causal_attend
from olmoe.quant.search import Inputs
from olmoe.runtime import inference_mode
from olmoe.weights.names import DOWN, EMBEDDING, EXPERTS, GATE_UP, HEAD
from olmoe.weights.source import WeightSource, read_finite


class Calibrated(NamedTuple):
    """A matrix (of one `expert` if it belongs to a stack), and statistics of its inputs."""

    name: str
    expert: int | None
    weight: Tensor
    inputs: Inputs | None  # None: no token of the text reached it


@inference_mode
def calibrate(source: WeightSource, ids_BT: Tensor) -> Iterator[Calibrated]:
    """Every matrix of a model except its routers, with statistics of its inputs on windows of token ids (B, T).

    Raises `CheckpointError` for weights that are not finite.
    """
    config = source.config
    embedding = read_finite(source, EMBEDDING)
    x_BTD = embedding[ids_BT].float()
    yield Calibrated(EMBEDDING, None, embedding, None)
    del embedding
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    rope = RotaryEmbedding(config.rope, config.head_dim, config.max_position_embeddings)(positions)
    attended: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        attended.append(causal_attend(q, k, v, layer))
        return attended[-1]

    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = layer_without_experts(source, i, prefix)
        normed_BTD = layer.input_layernorm(x_BTD)
        x_BTD = x_BTD + layer.self_attn(normed_BTD, rope, attend)
        into, out_of = _inputs(normed_BTD.flatten(0, 1)), _inputs(attended.pop().flatten(-2).flatten(0, 1))
        x_ND = layer.post_attention_layernorm(x_BTD).flatten(0, 1)
        _, weights_NK, expert_ids_NK = layer.mlp.gate(x_ND)
        y_ND = torch.zeros_like(x_ND)
        yield from _experts(source, f"{prefix}{EXPERTS}.", x_ND, expert_ids_NK, weights_NK, y_ND)
        x_BTD = x_BTD + y_ND.view(x_BTD.shape)
        for which, inputs in (("q", into), ("k", into), ("v", into), ("o", out_of)):
            name = f"{prefix}self_attn.{which}_proj.weight"
            yield Calibrated(name, None, read_finite(source, name), inputs)
    if not config.tie_word_embeddings:
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight = nn.Parameter(read_finite(source, "model.norm.weight").float())
        yield Calibrated(HEAD, None, read_finite(source, HEAD), _inputs(norm(x_BTD).flatten(0, 1)))


def layer_without_experts(source: WeightSource, i: int, prefix: str) -> DecoderLayer:
    """A layer with its weights in fp32, except the experts, which stay on the meta device."""
    with torch.device("meta"):
        layer = DecoderLayer(source.config, i)
    for name, _ in list(layer.named_parameters()):
        if not name.startswith(EXPERTS):
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(read_finite(source, prefix + name).float(), requires_grad=False)
            setattr(layer.get_submodule(owner), leaf, value)
    return layer


def _experts(
    source: WeightSource, prefix: str, x_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, y_ND: Tensor
) -> Iterator[Calibrated]:
    """The matrices of one expert after another; their outputs for x (N, D) are added to y (N, D)."""
    config = source.config
    act = activation(config.hidden_act)
    # Of all tokens: an expert's own inputs are few, and hardly differ from them.
    inputs = _inputs(x_ND)
    for e in range(config.num_experts):
        gate_up, down = read_finite(source, prefix + GATE_UP, e), read_finite(source, prefix + DOWN, e)
        tokens, ranks = (expert_ids_NK == e).nonzero(as_tuple=True)
        gate, up = (x_ND[tokens] @ gate_up.float().T).chunk(2, dim=-1)
        hidden = act(gate).mul_(up)
        y_ND.index_add_(0, tokens, (hidden @ down.float().T).mul_(weights_NK[tokens, ranks].unsqueeze(1)))
        yield Calibrated(prefix + GATE_UP, e, gate_up, inputs)
        yield Calibrated(prefix + DOWN, e, down, _inputs(hidden) if len(tokens) else None)


def _inputs(x: Tensor) -> Inputs:
    """The statistics of inputs (N, C): E[x x^T]."""
    return Inputs(x.T @ x / len(x))
