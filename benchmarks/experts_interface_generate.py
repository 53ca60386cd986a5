"""Whole models of transformers with our experts and with its own default, in turn: a prompt, and generated tokens.

python benchmarks/experts_interface_generate.py [--shape olmoe|mixtral|qwen3] [--layers 3] [--dtype bfloat16]

transformers' own OlmoeForCausalLM, MixtralForCausalLM or Qwen3MoeForCausalLM with the released widths, random weights,
few layers and a vocabulary of 32768. Attention, norms, router and output head are transformers' in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
from machine import alternate, ceilings, limit_isa, machine

VOCABULARY = 32768
TOLERANCE = {"float32": 1e-3, "bfloat16": 8e-2}


def build(shape: str, layers: int, dtype: torch.dtype) -> Any:
    """The model, whose matrices repeat one random tile: filling gigabytes would take longer than measuring."""
    import transformers
    from transformers.initialization import no_init_weights

    common = {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": 0}
    config = {
        "olmoe": lambda: transformers.OlmoeConfig(**common),
        "mixtral": lambda: transformers.MixtralConfig(**common),
        "qwen3": lambda: transformers.Qwen3MoeConfig(
            hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_attention_heads=32, head_dim=128,
            num_key_value_heads=4, **common,
        ),
    }[shape]()  # fmt: skip
    kind = {
        "olmoe": transformers.OlmoeForCausalLM,
        "mixtral": transformers.MixtralForCausalLM,
        "qwen3": transformers.Qwen3MoeForCausalLM,
    }[shape]
    config.dtype = dtype
    with no_init_weights():
        model = kind._from_config(config).eval()
    tile = (torch.randn(2**20 + 1) * 0.02).to(dtype)  # an odd length, so that rows differ
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1.0)
            continue
        for start in range(0, len(flat), len(tile)):
            flat[start : start + len(tile)] = tile[: len(flat) - start]
    return model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("olmoe", "mixtral", "qwen3"), default="olmoe")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--isa", help="limit the instruction set, for example AVX2")
    arguments = parser.parse_args()
    limit_isa(arguments.isa)

    import olmoe.hf

    olmoe.hf.register()
    torch.manual_seed(0)
    model = build(arguments.shape, arguments.layers, getattr(torch, arguments.dtype))
    default = model.config._experts_implementation
    limits = ceilings()
    print(f"ceilings: {limits}; transformers' default is {default}", flush=True)
    prompt = torch.randint(1, VOCABULARY, (1, arguments.prompt))

    def prefill(name: str) -> torch.Tensor:
        model.set_experts_implementation(name)
        with torch.inference_mode():
            return model(prompt, logits_to_keep=1).logits

    def decode(name: str) -> None:
        model.set_experts_implementation(name)
        model.generate(prompt[:, :8], max_new_tokens=arguments.new, min_new_tokens=arguments.new, do_sample=False)

    names = ("olmoe", default)
    ours, theirs = (prefill(name).float() for name in names)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error < TOLERANCE[arguments.dtype], f"the logits are {error:.1e} apart: no speed is reported"
    result: dict[str, Any] = {
        "benchmark": "experts_interface_generate", "shape": arguments.shape, "layers": arguments.layers,
        "dtype": arguments.dtype, "prompt": arguments.prompt, "new": arguments.new,
    }  # fmt: skip
    for what, function in (("prefill", prefill), ("generate", decode)):
        times = alternate({name: partial(function, name) for name in names}, arguments.repeats)
        result[f"{what}_ms"] = {name: round(statistics.median(values) * 1e3, 1) for name, values in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["olmoe"], times[default], strict=True))
        result[f"{what}_{default}_over_olmoe"] = round(ratio, 2)
    print(json.dumps(result | {"ceilings": limits} | machine()), flush=True)


if __name__ == "__main__":
    main()
