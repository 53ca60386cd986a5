"""Training with products in bf16 against fp32 on the olmoe-tiny shape: speed in turn, and what the losses become.

python benchmarks/train_precision.py [--steps 200 --seeds 5 --train TEXT... --valid TEXT...]

With texts it also trains that many steps in each precision from each of several seeds; `--nudged` once more in fp32
with an output head that begins a millionth larger: what the least rounding does to a run, whose routers decide near
ties otherwise. Differences from fp32 are those of runs from the same seed: their mean, and its standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import alternate, ceilings, machine

from olmoe.config import ModelConfig
from olmoe.io.hub import SHIPPED
from olmoe.model import CausalLM, initialize, set_products
from olmoe.runtime import keep_freed_memory, set_threads
from olmoe.train import loop
from olmoe.train.config import (
    BatchConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SkipConfig,
    Source,
    TokenizerConfig,
    TrainConfig,
)
from olmoe.train.losses import objective
from olmoe.train.optim import build_optimizer, clip_gradients

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=512, eos_token_id=4095,
)  # fmt: skip
SEQUENCES, LENGTH = 16, 256
LAST = 20  # steps whose mean cross-entropy is compared


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=6198, help="the first one")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other")
    parser.add_argument(
        "--sequences", type=int, default=SEQUENCES, help="windows of a step that is trained for its loss"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--nudged", action="store_true", help="one more run in fp32, a millionth apart")
    parser.add_argument("--train", nargs="*", default=[])
    parser.add_argument("--valid", nargs="*", default=[])
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    keep_freed_memory()
    result: dict[str, Any] = {"benchmark": "train_precision", "sequences": SEQUENCES, "length": LENGTH}
    if arguments.rounds:
        result |= speed(arguments.rounds)
    if arguments.steps:
        result |= losses(arguments)
    print(json.dumps(result | machine()))


def speed(rounds: int) -> dict[str, Any]:
    """Tokens a second of whole steps, in turn."""
    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    ids = torch.randint(0, 4000, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))

    def trainer(products: torch.dtype | None) -> Any:
        model = CausalLM(MODEL)
        initialize(model, 0)
        set_products(model, products)
        optimizer = build_optimizer(model, OptimizerConfig())

        def step() -> None:
            objective(model, ids, LossConfig(), positions_in_step=ids.numel(), microbatches=1).objective.backward()
            clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    times = alternate({"fp32": trainer(None), "bf16-products": trainer(torch.bfloat16)}, rounds)
    rates = {name: round(ids.numel() / statistics.median(values), 1) for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    print(f"training: {rates} tokens/s, ratio {ratio:.2f}", flush=True)
    return rates | {"ratio": round(ratio, 2), "ceilings": limits}


def losses(arguments: argparse.Namespace) -> dict[str, Any]:
    """The mean cross-entropy of the last steps, and the held-out loss of the weights at the end, of each run."""
    names = ("fp32", "bf16-products", *(["fp32_nudged"] if arguments.nudged else []))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                config = _config(arguments, Path(folder), name, seed)
                found[name].append(_loss(config, nudged=name == "fp32_nudged"))
            print(f"seed {seed}, {name}: {found[name][-1]}", flush=True)
    differences = {f"{name}_minus_fp32": _differences(found[name], found["fp32"]) for name in names[1:]}
    print(f"differences: {differences}")
    return {
        "steps": arguments.steps,
        "tokens_per_step": arguments.sequences * LENGTH,
        "seed": arguments.seed,
        "seeds": arguments.seeds,
        "learning_rate": arguments.learning_rate,
        "losses": found,
    } | differences


def _differences(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of each loss, the mean difference of runs from the same seeds, and its standard error."""
    summary = {}
    for key in theirs[0]:
        values = [a[key] - b[key] for a, b in zip(ours, theirs, strict=True)]
        summary[key] = {"mean": round(statistics.fmean(values), 5)}
        if len(values) > 1:
            summary[key]["standard_error"] = round(statistics.stdev(values) / len(values) ** 0.5, 5)
    return summary


def _config(arguments: argparse.Namespace, folder: Path, name: str, seed: int) -> TrainConfig:
    tokens = arguments.steps * arguments.sequences * LENGTH
    return TrainConfig(
        run=RunConfig(output=str(folder / name), seed=seed, threads=arguments.threads, device="cpu"),
        model=MODEL,
        tokenizer=TokenizerConfig(path=str(SHIPPED / "tokenizer.json")),
        data=DataConfig(
            train=tuple(Source(path=str(Path(p).resolve())) for p in arguments.train),
            valid=tuple(Source(path=str(Path(p).resolve())) for p in arguments.valid),
            sequence_length=LENGTH,
            tokens_folder=str(folder / "tokens"),
        ),
        batch=BatchConfig(sequences=arguments.sequences),
        schedule=ScheduleConfig(total_tokens=tokens, warmup_tokens=tokens // 10),
        optimizer=OptimizerConfig(learning_rate=arguments.learning_rate),
        compute=ComputeConfig(precision=name.removesuffix("_nudged")),
        skip=SkipConfig(sigmas=0.0),  # a step that one run leaves out and another takes would part them at once
        evaluation=EvaluationConfig(every_steps=arguments.steps, windows=16),
    )


def _loss(config: TrainConfig, nudged: bool) -> dict[str, float]:
    """Train and read what was measured. `evaluation.json` is of all held-out texts, in fp32."""
    first_weights = loop.initialize
    if nudged:

        def nudge(model: CausalLM, seed: int, place: Any = None) -> None:
            first_weights(model, seed, place)
            with torch.no_grad():
                model.lm_head.weight.mul_(1 + 1e-6)

        loop.initialize = nudge
    try:
        best = loop.train(config, show_progress=False)
    finally:
        loop.initialize = first_weights
    records = [json.loads(line) for line in (best.parent / "metrics.jsonl").read_text().splitlines()]
    trained = [record["cross_entropy"] for record in records if "cross_entropy" in record]
    held_out = json.loads((best.parent / "evaluation.json").read_text())["held_out_loss"]
    return {
        f"last_{LAST}_steps": round(statistics.fmean(trained[-LAST:]), 5),
        "held_out": round(statistics.fmean(held_out.values()), 5),
    }


if __name__ == "__main__":
    main()
