"""Tensor names of GGUF's OLMoE to and from the parameters of `model.CausalLM`."""

from __future__ import annotations

from olmoe.config import ModelConfig
from olmoe.weights import names as parameters

_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate.weight": "ffn_gate_inp",
}
GATE_UP, DOWN = f"{parameters.EXPERTS}.{parameters.GATE_UP}", f"{parameters.EXPERTS}.{parameters.DOWN}"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Parameter -> the tensors that hold it, in llama.cpp's order within a file.

    Each parameter is one tensor, except the stacked gate and up projections of the experts, which are two:
    `ffn_gate_exps` and `ffn_up_exps` (E, F, D) hold the first and the second half of `gate_up_proj` (E, 2F, D).
    With tied embeddings there is no parameter `lm_head.weight`; files still hold `output.weight`, which
    llama.cpp requires of OLMoE.
    """
    names: dict[str, tuple[str, ...]] = {parameters.EMBEDDING: (EMBEDDING,)}
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        names |= {ours + parameter: (f"{theirs}{name}.weight",) for parameter, name in _LAYER.items()}
        names[ours + GATE_UP] = (f"{theirs}ffn_gate_exps.weight", f"{theirs}ffn_up_exps.weight")
        names[ours + DOWN] = (f"{theirs}ffn_down_exps.weight",)
    names["model.norm.weight"] = ("output_norm.weight",)
    if not config.tie_word_embeddings:
        names[parameters.HEAD] = (HEAD,)
    return names


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Row-major shapes of all tensors that a file of this configuration holds."""
    shapes_of = parameters.parameter_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, tensors in tensor_names(config).items():
        shape = shapes_of[parameter]
        if len(tensors) > 1:  # the halves of a stack
            shape = (shape[0], shape[1] // len(tensors), shape[2])
        shapes |= dict.fromkeys(tensors, shape)
    return shapes
