"""lm-evaluation-harness with our model and with its `hf` backend on transformers' own classes, in turn, one process.

    python benchmarks/evaluate.py [--layers 4] [--questions 24] [--rounds 3] [--threads 2]

All run the same random weights of the released shapes: int4 codes, and the bf16 numbers that these stand for, whose
memory our bf16 model and transformers' share. Tasks, from text that comes with the package:

- `shared`: which of four sentences comes next (examples/eval); the choices of a question have its context in common.
- `single`: how probable the last word of a passage is, as in LAMBADA; nothing is shared, few tokens are scored.
- `rolling`: the perplexity of pages; nothing is shared, and every token is scored.

Sequences of the `hf` backend are batched by the fastest of `--batch-sizes`, which is tried out for each task first.
Times are those of the harness' `evaluate`: requests are built, answered and rated.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from machine import alternate, ceilings, machine

ROOT = Path(__file__).parents[1]


def plain_of(packed: Any) -> Any:
    """The bf16 model of what a packed one's codes stand for."""
    from olmoe.model import CausalLM, allocate
    from olmoe.quant import PackedModule
    from olmoe.quant.decoded import decoded

    with torch.device("meta"):
        plain = CausalLM(packed.config).bfloat16()
    plain = allocate(plain, "cpu").eval().requires_grad_(False)
    modules = dict(packed.named_modules())
    for name, parameter in plain.named_parameters():
        path, _, last = name.rpartition(".")
        module = modules[path]
        source = decoded(module, last, torch.bfloat16) if isinstance(module, PackedModule) else getattr(module, last)
        parameter.data.copy_(source)
    return plain


def transformers_of(plain: Any) -> Any:
    """transformers' own model over the same memory."""
    from transformers.models.olmoe import OlmoeConfig, OlmoeForCausalLM

    with torch.device("meta"):
        model = OlmoeForCausalLM(OlmoeConfig(**plain.config.to_dict(), attn_implementation="sdpa")).bfloat16()
    model.load_state_dict(plain.state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # buffers stay on the meta device otherwise
    return model.eval()


def tasks(folder: Path, questions: int) -> dict[str, dict[str, Any]]:
    """Configurations of the tasks, by name, with their data in a folder."""
    rows = [json.loads(line) for line in (ROOT / "examples/eval/next_sentence.jsonl").read_text("utf-8").splitlines()]
    passages = [f"{row['context']} {row['choices'][row['answer']]}".rsplit(" ", 1) for row in rows]
    data = {
        "shared": rows,
        "single": [{"context": context, "word": word} for context, word in passages],
        "rolling": [{"text": f"{context} {word}"} for context, word in passages],
    }
    common = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0}
    kinds: dict[str, dict[str, Any]] = {
        "shared": {
            "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices",
            "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
        },
        "single": {
            "output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "{{' ' + word}}",
            "target_delimiter": "", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    for name, lines in data.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines[:questions]), encoding="utf-8")
        source = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        kinds[name] |= {"task": name, "dataset_kwargs": source, **common}
    return kinds


def build(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The models of the harness by name."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from olmoe.bench.random_models import random_model
    from olmoe.config import ModelConfig
    from olmoe.engine.llm import LLM
    from olmoe.evaluate import OlmoeLM
    from olmoe.runtime import keep_freed_memory
    from olmoe.tokenizer import Tokenizer

    keep_freed_memory()  # for all: it is a property of the process
    config = ModelConfig(num_hidden_layers=arguments.layers)
    packed = random_model(config, "int4")
    plain = plain_of(packed)
    file = folder / "tokenizer.json"
    file.write_bytes(gzip.decompress((ROOT / "tests/data/olmoe-tokenizer.json.gz").read_bytes()))
    tokenizer = Tokenizer.from_file(file, eos_ids=(50279,), pad_id=1)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|padding|>", bos_token="<|endoftext|>"
    )
    return {
        "bf16": OlmoeLM(LLM.from_parts(plain, tokenizer), show_progress=False),
        "int4": OlmoeLM(LLM.from_parts(packed, tokenizer), show_progress=False),
        "transformers": HFLM(pretrained=transformers_of(plain), tokenizer=theirs, batch_size=1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--questions", type=int, default=24, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="to choose from for hf")
    parser.add_argument("--tasks", nargs="+", default=["shared", "single", "rolling"])
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name in ("lm_eval", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.tasks import TaskManager

    limits = ceilings()
    print(f"ceilings: {limits}", flush=True)
    manager = TaskManager(include_defaults=False)
    with tempfile.TemporaryDirectory() as scratch:
        models = build(arguments, Path(scratch))
        configurations = tasks(Path(scratch), arguments.questions)
        loaded = {task: manager.load([configurations[task]]) for task in arguments.tasks}
        answers: dict[str, list[float]] = {}

        def evaluate(name: str, task: str) -> None:
            with contextlib.redirect_stderr(io.StringIO()):  # bars
                found = lm_eval.evaluate(lm=models[name], task_dict=loaded[task], bootstrap_iters=0)
            samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
            answers[name] = [
                float(response[0][0] if isinstance(response[0], tuple | list) else response[0])
                for sample in samples
                for response in sample["resps"]
            ]

        result: dict[str, Any] = {"benchmark": "evaluate", "layers": arguments.layers, "questions": arguments.questions}
        for task in arguments.tasks:
            evaluate("transformers", task)
            tried = {}
            for size in arguments.batch_sizes:
                models["transformers"].batch_size_per_gpu = size
                started = time.perf_counter()
                evaluate("transformers", task)
                tried[size] = time.perf_counter() - started
            models["transformers"].batch_size_per_gpu = best = min(tried, key=tried.__getitem__)
            runs = {name: partial(evaluate, name, task) for name in models}
            times = alternate(runs, arguments.rounds)
            seconds = {name: round(statistics.median(values), 2) for name, values in times.items()}
            ratios = {
                name: round(
                    statistics.median(b / a for a, b in zip(times[name], times["transformers"], strict=True)), 2
                )
                for name in ("bf16", "int4")
            }
            off = {
                name: round(
                    statistics.fmean(abs(a - b) for a, b in zip(answers[name], answers["transformers"], strict=True)), 4
                )
                for name in ("bf16", "int4")
            }
            print(f"{task}: {seconds} s, hf in batches of {best}; times as fast: {ratios}", flush=True)
            result[task] = {
                "seconds": seconds,
                "ratio": ratios,
                "hf_batch_size": best,
                "hf_seconds_by_batch_size": {size: round(value, 2) for size, value in tried.items()},
                "mean_difference_of_logprobs": off,
            }
    print(json.dumps(result | {"ceilings": limits} | machine()))


if __name__ == "__main__":
    main()
