"""QLoRA tokens/s: `olmoe sft` against TRL's SFTTrainer with PEFT and bitsandbytes' nf4, over the same few layers.

    python benchmarks/qlora_peft.py [--layers 2] [--targets attention|all] [--precision fp32|bf16] [--rank 16]

Layers of the released shapes with random weights, each trainer in a process of its own, in turn, with the same adapter
to begin with, the same row of 512 tokens at every step, AdamW and recomputation by layers. transformers keeps the
experts in one parameter, which bitsandbytes leaves as it is: theirs has nf4 in attention alone. The weights of experts
are chosen such that nf4 represents them, so that both compute the same losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import ceilings, machine
from qlora import RandomWeights, peaks, write_run
from torch import Tensor

from olmoe import adapters
from olmoe.quant import make_format
from olmoe.train.finetune.config import SFTConfig, load_config
from olmoe.train.finetune.masks import IGNORE
from olmoe.train.finetune.sft import ChatTask, sft
from olmoe.train.finetune.start import open_start
from olmoe.weights.quantize import quantize
from olmoe.weights.to_folder import to_folder

SEED = 42


class OnTheGrid(RandomWeights):
    """Weights of experts that nf4 represents, but for the rounding to bf16."""

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        weight = super().read(parameter, expert)
        if expert is None:
            return weight
        format = make_format("nf4")
        return format.decode(format.encode(weight), *weight.shape, torch.bfloat16)


def ours(config: SFTConfig) -> list[dict[str, float]]:
    """Loss and seconds of every step."""
    sft(config, overwrite=True, show_progress=False)
    lines = (config.resolve(config.run.output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return [{"loss": r["loss"], "seconds": r["step_tokens"] / r["tokens_per_second"]} for r in records]


def theirs(config: SFTConfig, plain: Path) -> list[dict[str, float]]:
    """The same of TRL's trainer, which starts from the checkpoint `plain`."""
    import datasets
    import peft
    import transformers
    import trl

    assert config.adapter is not None
    start = open_start(config)
    task = ChatTask(config, start, torch.device("cpu"))
    example = task.examples[0]
    ids = [*example.inputs.tolist(), int(example.labels[-1])]
    mask = [0, *(int(label != IGNORE) for label in example.labels.tolist())]
    dtype = torch.bfloat16 if config.adapter.precision == "bf16" else torch.float32
    model = transformers.OlmoeForCausalLM.from_pretrained(
        plain,
        dtype=dtype,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    )
    times: list[dict[str, float]] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *rest: Any, **more: Any) -> None:
            times.append({"started": time.perf_counter()})

        def on_step_end(self, *rest: Any, **more: Any) -> None:
            times[-1]["seconds"] = time.perf_counter() - times[-1].pop("started")

        def on_log(self, *rest: Any, logs: dict[str, float], **more: Any) -> None:
            if "loss" in logs:
                times[-1]["loss"] = logs["loss"]

    with tempfile.TemporaryDirectory() as place:
        adapter = adapters.new_adapter(
            start.model_config, config.adapter.rank, config.adapter.alpha, config.adapter.targets, config.run.seed
        )
        adapters.write_adapter(adapter, Path(place) / "adapter", str(plain))
        trainer = trl.SFTTrainer(
            model=peft.PeftModel.from_pretrained(model, f"{place}/adapter", is_trainable=True),
            args=trl.SFTConfig(
                output_dir=f"{place}/out",
                per_device_train_batch_size=1,
                max_steps=task.steps,
                learning_rate=config.optimizer.learning_rate,
                lr_scheduler_type="constant",
                warmup_steps=0,
                max_grad_norm=config.optimizer.max_grad_norm,
                gradient_checkpointing=True,
                completion_only_loss=True,
                max_length=None,
                bf16=False,
                logging_steps=1,
                logging_first_step=True,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict(
                {"input_ids": [ids] * task.steps, "completion_mask": [mask] * task.steps}
            ),
            processing_class=transformers.AutoTokenizer.from_pretrained(plain),
            callbacks=[Clock()],
        )
        trainer.train()
    return times


def work(who: str, config_path: str, plain: str) -> None:
    """Train in this process, and print what it took."""
    config = load_config(config_path, SFTConfig)
    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    steps = ours(config) if who == "ours" else theirs(config, Path(plain))
    print(json.dumps({"steps": steps, "peak_gb": round(peaks()["VmHWM"] / 1e9, 2)}))


def run(who: str, config: Path, plain: Path) -> dict[str, Any]:
    """What a process that trains measured, or the end of what it said when it failed."""
    worker = [sys.executable, __file__, "--worker", who, str(config), str(plain)]
    done = subprocess.run(worker, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Medians over all steps but the first of each run."""
    failed = [each["error"] for each in runs if "error" in each]
    if failed:
        return {"error": failed[0]}
    seconds = statistics.median(step["seconds"] for each in runs for step in each["steps"][1:])
    losses = [round(step["loss"], 4) for step in runs[0]["steps"]]
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_gb": max(each["peak_gb"] for each in runs),
        "losses": losses,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--targets", choices=["all", "attention"], default="attention")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where both checkpoints are, or are written to")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder: Path = arguments.folder or Path(place)
        plain, packed = folder / f"plain-{arguments.layers}", folder / f"nf4-{arguments.layers}"
        if not packed.is_dir():
            to_folder(OnTheGrid(arguments.layers), plain, torch.bfloat16)
            quantize(plain, packed, "nf4")
        (Path(place) / "run").mkdir()
        config = write_run(Path(place) / "run", packed, arguments, arguments.rank, arguments.precision, same=True)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
        for _ in range(arguments.rounds):
            for who, found in runs.items():
                found.append(run(who, config, plain))
                print(who, json.dumps(found[-1]), flush=True)
    sides = {who: summary(found, arguments.tokens) for who, found in runs.items()}
    named = ("layers", "targets", "precision", "rank", "tokens")
    result = {"benchmark": "qlora_peft"} | {name: getattr(arguments, name) for name in named} | sides
    if all("error" not in side for side in sides.values()):
        result["ratio"] = round(sides["ours"]["tokens_per_s"] / sides["trl"]["tokens_per_s"], 2)
    print(json.dumps(result | {"ceilings": limits} | machine()))


if __name__ == "__main__":
    main()
