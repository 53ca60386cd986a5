"""What vLLM's OLMoE reads of a checkpoint folder, in our words.

From vllm/model_executor/models/olmoe.py at commit 048a32c: which parameters its class has, and what fills each.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open


def vllm_parameters(config: dict) -> dict[str, tuple[int, ...]]:
    """What vLLM takes from a checkpoint with this config.json: names and shapes.

    Attention's q, k and v go into one matrix, an expert's gate and up into another; both are filled from the separate
    ones. Names that match nothing raise a KeyError there, and parameters that nothing fills are an error as well.
    """
    d, f, e, v = (config[k] for k in ("hidden_size", "intermediate_size", "num_experts", "vocab_size"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv = d // heads * kv_heads
    names: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        names |= {
            f"{layer}input_layernorm.weight": (d,),
            f"{layer}post_attention_layernorm.weight": (d,),
            f"{layer}self_attn.q_proj.weight": (d, d),
            f"{layer}self_attn.k_proj.weight": (kv, d),
            f"{layer}self_attn.v_proj.weight": (kv, d),
            f"{layer}self_attn.o_proj.weight": (d, d),
            f"{layer}self_attn.q_norm.weight": (d,),
            f"{layer}self_attn.k_norm.weight": (kv,),
            f"{layer}mlp.gate.weight": (e, d),
        }
        for i in range(e):
            expert = f"{layer}mlp.experts.{i}."
            names |= {f"{expert}gate_proj.weight": (f, d), f"{expert}up_proj.weight": (f, d)}
            names |= {f"{expert}down_proj.weight": (d, f)}
    return names


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files that vLLM would open: those of the index, or the single one."""
    index = folder / "model.safetensors.index.json"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert sorted(set(weight_map.values())) == files
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(folder / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in handle.keys():  # noqa: SIM118
                assert name not in tensors
                assert not index.exists() or weight_map[name] == file
                tensors[name] = handle.get_tensor(name)
    assert not index.exists() or weight_map.keys() == tensors.keys()
    return tensors


def check_for_vllm(folder: Path) -> dict[str, torch.Tensor]:
    """All that vLLM needs of a folder."""
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert config["model_type"] == "olmoe"
    assert "quantization_config" not in config
    for key in ("num_experts_per_tok", "max_position_embeddings", "eos_token_id", "dtype"):
        assert config[key] is not None
    assert {"rope_type", "rope_theta"} <= config["rope_parameters"].keys()
    assert config["num_key_value_heads"] is not None  # read without a default
    tensors = _stored(folder)
    expected = vllm_parameters(config)
    biases = {name for name in tensors if name.endswith(".bias")}  # passed over
    assert not biases or config["attention_bias"]
    assert {name: tuple(t.shape) for name, t in tensors.items() if name not in biases} == expected
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{config['dtype']}"}
    assert not [name for name in tensors if re.search(r"gate_up_proj|experts\.(down_proj|gate)|rotary", name)]
    assert "eos_token_id" in json.loads((folder / "generation_config.json").read_text())
    return tensors
