"""Bytes of a model after 4-bit and 8-bit loading, against bf16: ours, and transformers with bitsandbytes.

    python benchmarks/quantized_footprint.py

The released configuration with widths and vocabulary divided by 8, all 16 layers and 64 experts: the same
proportions in 108M parameters. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile

import torch
import transformers
from machine import machine
from transformers import BitsAndBytesConfig

from olmoe import OlmoeConfig, OlmoeForCausalLM

FORMATS = {
    "nf4_double_quant": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config = OlmoeConfig(
        vocab_size=6288, hidden_size=256, intermediate_size=128, num_hidden_layers=16, num_attention_heads=16,
        num_experts=64, num_experts_per_tok=8, eos_token_id=6279, dtype="bfloat16",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = OlmoeForCausalLM(config).bfloat16()
        full = model.get_memory_footprint()
        model.save_pretrained(folder)
        print(f"ceiling: 4 bits a weight would be {0.25:.3f} of bf16's {full / 1e6:.1f} MB", flush=True)
        ratios: dict[str, dict[str, float]] = {"olmoe": {}, "transformers": {}}
        for name, options in FORMATS.items():
            for who, loader in (("olmoe", OlmoeForCausalLM), ("transformers", transformers.OlmoeForCausalLM)):
                loaded = loader.from_pretrained(
                    folder, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**options)
                )
                ratios[who][name] = round(loaded.get_memory_footprint() / full, 4)
                print(f"{name}, {who}: {ratios[who][name]:.3f}", flush=True)
    print(json.dumps({"benchmark": "quantized_footprint", "bf16_mb": round(full / 1e6, 1)} | ratios | machine()))


if __name__ == "__main__":
    main()
