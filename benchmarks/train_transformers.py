"""Training speed of the olmoe-tiny shape: ours and transformers in turn, each with fused AdamW and auxiliary loss.

python benchmarks/train_transformers.py [--sequences 16] [--length 256]
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from machine import alternate, ceilings, limit_isa, machine

from olmoe.config import ModelConfig
from olmoe.model import CausalLM, initialize
from olmoe.runtime import keep_freed_memory
from olmoe.train.config import LossConfig, OptimizerConfig
from olmoe.train.losses import objective
from olmoe.train.optim import build_optimizer, clip_gradients


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--isa", help="limit the instruction set, for example AVX2")
    arguments = parser.parse_args()
    limit_isa(arguments.isa)

    from transformers import OlmoeConfig, OlmoeForCausalLM

    limits = ceilings()
    config = ModelConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=4095,
    )  # fmt: skip
    tokens = arguments.sequences * arguments.length
    operations = 6 * (config.num_active_parameters - config.vocab_size * config.hidden_size) / 1e9
    print(f"ceilings: {limits}")
    print(
        f"  {operations * 1e3:.1f} MFLOP a token: at most {limits['fp32_gflops'] / operations:.0f} tokens/s", flush=True
    )

    keep_freed_memory()  # for both: it is a property of the process
    ids = torch.randint(0, 4000, (arguments.sequences, arguments.length))
    ours = CausalLM(config)
    initialize(ours, 0)
    our_optimizer = build_optimizer(ours, OptimizerConfig())
    theirs = OlmoeForCausalLM(OlmoeConfig(**config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    theirs.train().set_experts_implementation("grouped_mm")
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=4e-4, fused=True)

    def step_ours() -> None:
        objective(ours, ids, LossConfig(), positions_in_step=tokens, microbatches=1).objective.backward()
        clip_gradients(ours.parameters(), 1.0)
        our_optimizer.step()
        our_optimizer.zero_grad(set_to_none=True)

    def step_theirs() -> None:
        theirs(ids, labels=ids, output_router_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad(set_to_none=True)

    times = alternate({"ours": step_ours, "transformers": step_theirs}, arguments.repeats)
    speed = {name: round(tokens / statistics.median(values), 1) for name, values in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
    result = {"benchmark": "train_transformers", "sequences": arguments.sequences, "length": arguments.length}
    print(f"training: ours {speed['ours']}, transformers {speed['transformers']} tokens/s, ratio {ratio:.2f}")
    print(json.dumps(result | speed | {"ratio": round(ratio, 2), "ceilings": limits} | machine()))


if __name__ == "__main__":
    main()
