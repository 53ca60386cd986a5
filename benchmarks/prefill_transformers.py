"""Prompt processing and decoding on the released shapes in bf16: ours and transformers, sharing random weights.

    python benchmarks/prefill_transformers.py [--isa AVX2] [--tokens 512] [--layers 16]

Speed does not depend on the values of the weights. `--isa AVX2` limits torch's libraries and our kernels to what a
CPU without AVX-512 has. `--torch-only` measures our network without the C++ kernels. `--processor-time` counts the time
that this process had a core, for a machine that is shared; it is only right for one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from machine import alternate, ceilings, limit_isa, machine

from olmoe.config import ModelConfig
from olmoe.engine.running import RunningSequences
from olmoe.model import CausalLM, allocate
from olmoe.ops import cpu
from olmoe.runner import make_runner
from olmoe.runtime import keep_freed_memory


def fill(model: torch.nn.Module) -> None:
    """Cheap pseudo-random values, tiled."""
    generator = torch.Generator().manual_seed(0)
    tile = (0.02 * torch.randn(2**20, generator=generator)).bfloat16()
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:
            flat.fill_(1.0)
            continue
        for start in range(0, flat.numel(), len(tile)):
            piece = flat[start : start + len(tile)]
            piece.copy_(tile[: len(piece)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--isa", help="limit the instruction set, for example AVX2")
    parser.add_argument("--torch-only", action="store_true", help="do not use the C++ kernels")
    parser.add_argument("--processor-time", action="store_true", help="for one thread on a machine that is not idle")
    arguments = parser.parse_args()
    limit_isa(arguments.isa)
    kernels = None if arguments.torch_only or not cpu.available() else cpu.isa()
    if kernels and arguments.isa:
        cpu.set_isa(kernels := arguments.isa.lower())

    from transformers import OlmoeConfig, OlmoeForCausalLM

    keep_freed_memory()  # for both: it is a property of the process
    if arguments.processor_time and torch.get_num_threads() > 1:
        parser.error("--processor-time adds up threads; set OMP_NUM_THREADS=1")
    clock = time.process_time if arguments.processor_time else time.perf_counter
    limits = ceilings(clock)
    config = ModelConfig(num_hidden_layers=arguments.layers)
    active = config.num_active_parameters - config.vocab_size * config.hidden_size * 2  # the head scores one token only
    print(f"ceilings: {limits}")
    for name in ("fp32", "bf16"):
        print(
            f"  prefill of {active / 1e9:.2f}B active weights by {name} products: at most "
            f"{limits[f'{name}_gflops'] / (2 * active / 1e9):.1f} tokens/s"
        )
    read = 2 * (active + config.vocab_size * config.hidden_size) / 1e9
    print(f"  decode reads {read:.2f} GB a token: at most {limits['read_gb_per_s'] / read:.1f} tokens/s", flush=True)

    with torch.device("meta"):
        ours = CausalLM(config)
        theirs = OlmoeForCausalLM(OlmoeConfig(**config.to_dict(), attn_implementation="sdpa"))
    ours = allocate(ours.bfloat16(), "cpu").eval().requires_grad_(False)  # as `checkpoint.load` does
    fill(ours)
    theirs = theirs.bfloat16()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    # Buffers stay on the meta device otherwise.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    theirs.eval()
    runner = make_runner(ours, "cpu" if kernels else "torch")

    ids = torch.randint(0, 50000, (arguments.tokens,), generator=torch.Generator().manual_seed(1))
    state: dict[str, object] = {}

    def prefill_ours() -> None:
        running = RunningSequences(runner, 1, arguments.tokens + arguments.decode)
        running.prefill([ids.tolist()])
        state["ours"] = running

    def prefill_theirs() -> None:
        state["theirs"] = theirs(ids.unsqueeze(0), use_cache=True, logits_to_keep=1).past_key_values

    def decode_ours() -> None:
        running = state["ours"]
        assert isinstance(running, RunningSequences)
        for _ in range(arguments.decode):
            running.step(ids[:1].tolist())
        running.lengths = [arguments.tokens]

    def decode_theirs() -> None:
        cache = state["theirs"]
        for _ in range(arguments.decode):
            theirs(ids[None, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-arguments.decode)  # type: ignore[attr-defined]

    result: dict[str, object] = {
        "benchmark": "prefill_transformers",
        "tokens": arguments.tokens,
        "layers": arguments.layers,
        "kernels": kernels,
        "clock": "processor" if arguments.processor_time else "wall",
    }
    with torch.inference_mode():
        for what, count, ours_run, theirs_run in (
            ("prefill", arguments.tokens, prefill_ours, prefill_theirs),
            ("decode", arguments.decode, decode_ours, decode_theirs),
        ):
            times = alternate({"ours": ours_run, "transformers": theirs_run}, arguments.repeats, clock)
            speed = {name: count / statistics.median(values) for name, values in times.items()}
            ratio = statistics.median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
            shown = ", ".join(f"{name} {value:.2f}" for name, value in speed.items())
            print(f"{what}: {shown} tokens/s, ratio {ratio:.2f}", flush=True)
            result[what] = {name: round(value, 2) for name, value in speed.items()} | {"ratio": round(ratio, 2)}
    print(json.dumps(result | {"ceilings": limits} | machine()))


if __name__ == "__main__":
    main()
