"""What a model's experts do on calibration text: how often each is chosen, what it adds, and which are similar.

The model is read one layer at a time, in fp32, so that any checkpoint can be measured on any machine: memory holds the
hidden states of all tokens, one layer's attention and one expert, and for similarity the outputs of a layer's experts
on a sample of the tokens.

Shapes legend: B windows, T tokens of a window, N = B*T tokens, S sampled tokens, D hidden, L layers, E experts,
K experts per token, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from olmoe.model import RotaryEmbedding, activation, causal_attend
from olmoe.runtime import inference_mode
from olmoe.weights.calibrate import layer_without_experts
from olmoe.weights.names import DOWN, EMBEDDING, EXPERTS, GATE_UP, parameter_shapes
from olmoe.weights.source import WeightSource, read_finite

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

# Tokens that attention or an expert computes at a time.
BATCH_TOKENS = 4096
# Tokens on which the outputs of all experts are compared; those of OLMoE-1B-7B then take 0.3 GB.
SAMPLED_TOKENS = 512


@dataclass(frozen=True)
class Contributions:
    """Measurements on `tokens` tokens, by layer and expert.

    - `load` (L, E): the share of tokens that choose the expert; rows sum to k.
    - `reap` (L, E): the mean, over the tokens that choose the expert, of its weight times the norm of its output, the
      criterion of REAP (arXiv 2510.13999). 0 if no token does.
    - `similarity` (L, E, E), if requested: the cosine between the outputs of two experts, over sampled tokens.
    """

    tokens: int
    load: Floats
    reap: Floats
    similarity: Floats | None = None


@inference_mode
def measure_contributions(
    source: WeightSource, ids_BT: Tensor, *, similarity: bool = False, progress: Progress | None = None
) -> Contributions:
    """Run a model over windows of token ids (B, T). `progress(done, total)` is called after each expert.

    Raises `CheckpointError` for weights that are not finite.
    """
    config = source.config
    layers, experts, tokens = config.num_hidden_layers, config.num_experts, ids_BT.numel()
    chosen, added = np.zeros((2, layers, experts))
    alike = np.zeros((layers, experts, experts)) if similarity else None
    sample = torch.linspace(0, tokens - 1, min(tokens, SAMPLED_TOKENS)).long()
    x_BTD = read_finite(source, EMBEDDING)[ids_BT].float()
    rotary = RotaryEmbedding(config.rope, config.head_dim, config.max_position_embeddings)
    for i in range(layers):
        layer = layer_without_experts(source, i, f"model.layers.{i}.")
        for part_BTD in x_BTD.split(max(1, BATCH_TOKENS // ids_BT.shape[1])):
            rope = rotary(torch.arange(ids_BT.shape[1]).expand(len(part_BTD), -1))
            part_BTD += layer.self_attn(layer.input_layernorm(part_BTD), rope, causal_attend)
        normed_ND = layer.post_attention_layernorm(x_BTD).flatten(0, 1)
        _, weights_NK, expert_ids_NK = layer.mlp.gate(normed_ND)
        x_ND = x_BTD.view(-1, config.hidden_size)
        outputs = []
        for e in range(experts):
            compute = _expert(source, i, e)
            at, ranks = (expert_ids_NK == e).nonzero(as_tuple=True)
            for rows, weights in zip(at.split(BATCH_TOKENS), weights_NK[at, ranks].split(BATCH_TOKENS), strict=True):
                out_MD = compute(normed_ND[rows])
                added[i, e] += float((weights * out_MD.norm(dim=1)).sum())
                x_ND.index_add_(0, rows, out_MD * weights.unsqueeze(1))
            chosen[i, e] = len(at)
            if alike is not None:
                outputs.append(compute(normed_ND[sample]).flatten())
            if progress is not None:
                progress(i * experts + e + 1, layers * experts)
        if alike is not None:
            alike[i] = _cosines(torch.stack(outputs))
    return Contributions(tokens, chosen / tokens, added / np.maximum(chosen, 1), alike)


def weight_similarity(source: WeightSource, progress: Progress | None = None) -> Floats:
    """The cosine between the weights of two experts, all their matrices as one vector: (L, E, E).

    Needs no text, but is less meaningful: two experts that compute the same with their hidden units in another order
    look different.
    """
    config = source.config
    shapes = parameter_shapes(config)
    found = np.zeros((config.num_hidden_layers, config.num_experts, config.num_experts))
    for i in range(config.num_hidden_layers):
        products = torch.zeros(config.num_experts, config.num_experts)
        for leaf in (GATE_UP, DOWN):
            name = f"model.layers.{i}.{EXPERTS}.{leaf}"
            stack_EP = torch.empty(config.num_experts, math.prod(shapes[name][1:]))
            for e in range(config.num_experts):
                stack_EP[e] = read_finite(source, name, e).flatten()
            products += stack_EP @ stack_EP.T
        found[i] = _normalized(products)
        if progress is not None:
            progress(i + 1, config.num_hidden_layers)
    return found


def _expert(source: WeightSource, layer: int, expert: int) -> Callable[[Tensor], Tensor]:
    """What an expert computes: x (N, D) -> (N, D)."""
    prefix = f"model.layers.{layer}.{EXPERTS}."
    gate_up, down = (read_finite(source, prefix + leaf, expert).float() for leaf in (GATE_UP, DOWN))
    act = activation(source.config.hidden_act)

    def compute(x_ND: Tensor) -> Tensor:
        gate, up = (x_ND @ gate_up.T).chunk(2, dim=-1)
        return (act(gate) * up) @ down.T

    return compute


def _cosines(vectors_EP: Tensor) -> Floats:
    return _normalized(vectors_EP @ vectors_EP.T)


def _normalized(products_EE: Tensor) -> Floats:
    """Scalar products to cosines; 0 with a vector of length 0."""
    products = products_EE.double().numpy()
    lengths = np.sqrt(np.diag(products))
    lengths = np.where(lengths > 0, lengths, np.inf)
    found: Floats = products / np.outer(lengths, lengths)
    return found
