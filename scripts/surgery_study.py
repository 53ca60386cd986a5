"""What olmoe-tiny loses as experts go, by each criterion; which go for some domains alone; and k from 1 to 16.

    python scripts/surgery_study.py ../shared/corpus/valid

Of the text of every domain the first half chooses experts (calibration), the second half measures the loss. Every
edited model is written by the same functions as `olmoe edit` writes it and loaded again; bans of single experts and
other k are router policies. Writes benchmarks/results/surgery_study.json and the figures docs/images/surgery-*.png;
`--parts` measures some of them again, `--figures` only draws.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from olmoe.analysis.contributions import Contributions, measure_contributions
from olmoe.analysis.surgery import Edits, apply
from olmoe.bench.machine import machine_facts
from olmoe.io import hub
from olmoe.runner import Batch, CacheView, Runner, Want, make_runner
from olmoe.runner.policy import ResolvedPolicy, RouterPolicy
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint, sample_text
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.edited import EditedSource, write
from olmoe.weights.hf_folder import HFFolder

ROOT = Path(__file__).parent.parent
RESULTS, IMAGES = ROOT / "benchmarks/results/surgery_study.json", ROOT / "docs/images"
WINDOW = 512
REMOVED = (0, 8, 16, 24, 32, 40, 48, 56)
SEEDS = (0, 1)
PAIR = ("stories_tinystories", "code")  # the domains whose need of each single expert is compared
FROM_DOMAINS = 24  # experts that a model of one domain does without
KS = range(1, 17)
PARTS = ("removed", "k", "specialists", "without")

Windows = list[list[int]]
# Okabe and Ito's colours.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a5195", "#8c8c00", "#444444")


def main() -> None:
    """Measure, or read what was measured; and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder of texts, a domain each")
    parser.add_argument("--tokens", type=int, default=2048, help="of each half of each domain (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--figures", action="store_true", help="draw the figures of the results that are there")
    arguments = parser.parse_args()
    if not arguments.figures:
        Study(arguments.corpus, arguments.tokens).run(arguments.parts)
    draw(json.loads(RESULTS.read_text(encoding="utf-8")))


class Study:
    """The measurements, on olmoe-tiny."""

    def __init__(self, corpus: Path, tokens: int) -> None:
        self.source = cast(HFFolder, checkpoint.open_source(hub.SHIPPED))
        self.start = Blueprint.unchanged(self.source.config)
        self.runner = make_runner(checkpoint.load(hub.SHIPPED))
        self.tokens = tokens
        tokenizer = Tokenizer.from_folder(hub.SHIPPED, eos_ids=self.source.config.eos_token_ids)
        self.calibration: dict[str, Windows] = {}
        self.held_out: dict[str, Windows] = {}
        for path in sorted(corpus.glob("*.txt")):
            name = path.stem.removesuffix("_evalonly")
            ids = sample_text.read_ids(path, tokenizer)
            middle = len(ids) // 2
            self.calibration[name] = sample_text.windows(ids[:middle], WINDOW, tokens // WINDOW)
            self.held_out[name] = sample_text.windows(ids[middle:], WINDOW, tokens // WINDOW)

    def run(self, parts: Sequence[str]) -> None:
        """Measure `parts` of `PARTS`, written after each; what was measured of the others before stays."""
        kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        found: dict[str, Any] = {
            "model": "olmoe-tiny",
            "machine": machine_facts(),
            "domains": list(self.held_out),
            "tokens": {name: sum(len(w) - 1 for w in windows) for name, windows in self.held_out.items()},
            "loss": self.losses(self.runner),
        } | {name: kept[name] for name in PARTS if name in kept}
        for name in parts:
            found[name] = getattr(self, name)()
            RESULTS.write_text(json.dumps(found) + "\n", encoding="utf-8")

    def contributions(self, windows: dict[str, Windows]) -> Contributions:
        """What experts do on the calibration half of these domains."""
        ids = torch.tensor([each for of_domain in windows.values() for each in of_domain])
        return measure_contributions(self.source, ids, similarity=True)

    def losses(self, runner: Runner, policy: ResolvedPolicy | None = None, *names: str) -> dict[str, float]:
        """Nats a token of the held-out half of these domains, by default of all."""
        return {name: round(loss(runner, self.held_out[name], policy), 6) for name in names or self.held_out}

    def edited(self, blueprint: Blueprint) -> dict[str, float]:
        """The losses of an edited model, written and loaded."""
        with tempfile.TemporaryDirectory() as folder:
            write(EditedSource(self.source, blueprint), Path(folder) / "model")
            return self.losses(make_runner(checkpoint.load(Path(folder) / "model")))

    def removed(self) -> list[dict[str, Any]]:
        """Losses by the number of experts that each criterion removes from each layer, chosen on all domains."""
        found = self.contributions(self.calibration)
        kinds = [("reap", 0), ("load", 0), ("merge", 0), *(("random", seed) for seed in SEEDS)]
        rows = []
        for kind, seed in tqdm(kinds, desc="criteria"):
            for count in REMOVED[1:]:
                edits = Edits(merge=count) if kind == "merge" else Edits(prune=count, by=kind, seed=seed)
                blueprint = apply(self.start, edits, found)
                rows.append({"by": kind, "seed": seed, "removed": count, "loss": self.edited(blueprint)})
        return rows

    def specialists(self) -> dict[str, dict[str, Any]]:
        """Losses of every domain in models that were pruned by REAP on one, and which experts of each layer went."""
        found = {}
        for name, windows in tqdm(self.calibration.items(), desc="domains"):
            blueprint = apply(self.start, Edits(prune=FROM_DOMAINS), self.contributions({name: windows}))
            kept = [{mix.experts[0] for mix in layer.experts} for layer in blueprint.layers]
            gone = [[e for e in range(self.start.num_experts) if e not in each] for each in kept]
            found[name] = {"loss": self.edited(blueprint), "removed": gone}
        return found

    def without(self) -> dict[str, list[list[float]]]:
        """How much each domain of `PAIR` loses without each single expert, (L, E)."""
        config = self.source.config
        shape = config.num_hidden_layers, config.num_experts
        base = self.losses(self.runner, None, *PAIR)
        lost = {name: np.zeros(shape) for name in base}
        for layer, expert in tqdm(list(np.ndindex(*shape)), desc="each expert"):
            banned = np.zeros(shape, dtype=bool)
            banned[layer, expert] = True
            policy = RouterPolicy(banned=banned).resolve(config)
            for name, value in self.losses(self.runner, policy, *PAIR).items():
                lost[name][layer, expert] = value - base[name]
        return {name: each.round(5).tolist() for name, each in lost.items()}

    def k(self) -> list[dict[str, Any]]:
        """Losses by experts a token, with their probabilities as they are and divided by their sum."""
        rows = []
        for k in tqdm(KS, desc="k"):
            for normalize in (False, True):
                policy = RouterPolicy(top_k=k, renormalize=normalize).resolve(self.source.config)
                rows.append({"k": k, "normalize": normalize, "loss": self.losses(self.runner, policy)})
        return rows


def loss(runner: Runner, windows: Windows, policy: ResolvedPolicy | None = None) -> float:
    """Nats a token of windows, each with nothing before it."""
    total, count = 0.0, 0
    for window in windows:
        blocks = runner.new_cache(1, len(window) - 1)
        view = CacheView(blocks, np.arange(blocks.blocks, dtype=np.int32)[None])
        batch = Batch(window[:-1], [len(window) - 1], [0], None, [policy])
        logits = runner.forward(batch, view, Want(range(len(window) - 1))).logits
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        count += len(window) - 1
    return total / count


# ---- figures ----


def mean(losses: dict[str, float]) -> float:
    """Of all domains alike."""
    return sum(losses.values()) / len(losses)


def draw(found: dict[str, Any]) -> None:
    """All figures."""
    style = {"font.size": 8.5, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style | {"legend.frameon": False, "figure.facecolor": "white"}):
        for name, figure in (
            ("removed", draw_removed(found)),
            ("specialists", draw_specialists(found)),
            ("without", draw_without(found)),
            ("k", draw_k(found)),
        ):
            figure.savefig(IMAGES / f"surgery-{name}.png", dpi=130, metadata={"Software": None})
            plt.close(figure)


def draw_removed(found: dict[str, Any]) -> Any:
    """Loss over the number of experts removed, by criterion; of random choices the range as well."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained", sharey=True)
    base = found["loss"]
    stories = [name for name in base if name.startswith("stories")]
    for ax, names, title in ((axes[0], list(base), "all domains"), (axes[1], stories, "stories, by the same choice")):
        for colour, kind, label in zip(
            COLOURS, ("reap", "load", "merge", "random"), ("REAP", "load", "merged", "random"), strict=False
        ):
            counts, low, middle, high = [0], [mean_of(base, names)], [mean_of(base, names)], [mean_of(base, names)]
            for count in REMOVED[1:]:
                rows = [r for r in found["removed"] if (r["by"], r["removed"]) == (kind, count)]
                values = [mean_of(row["loss"], names) for row in rows]
                counts.append(count)
                low.append(min(values))
                middle.append(sum(values) / len(values))
                high.append(max(values))
            ax.plot(counts, middle, color=colour, marker="o", markersize=3, label=label)
            if kind == "random":
                ax.fill_between(counts, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set(xlabel="experts removed from each layer of 64", title=title)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("held-out loss, nats a token")
    axes[0].legend()
    return figure


def mean_of(losses: dict[str, float], names: Sequence[str]) -> float:
    """Of some domains alike."""
    return sum(losses[name] for name in names) / len(names)


def draw_specialists(found: dict[str, Any]) -> Any:
    """What every domain (columns) loses in a model that was pruned on one (rows)."""
    names = found["domains"]
    lost = np.array([[found["specialists"][a]["loss"][b] - found["loss"][b] for b in names] for a in names])
    figure, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    image = ax.imshow(lost, cmap="cividis_r", vmin=0)
    for (row, column), value in np.ndenumerate(lost):
        dark = value > 0.55 * lost.max()
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    labels = [short(name) for name in names]
    ax.set_xticks(range(len(names)), labels, rotation=45, ha="right")
    ax.set_yticks(range(len(names)), labels)
    ax.set(xlabel="text that is read", ylabel=f"text that chose the {FROM_DOMAINS} experts to remove")
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, label="loss added, nats a token", shrink=0.85)
    return figure


def draw_without(found: dict[str, Any]) -> Any:
    """Each expert: what stories lose without it, and what code loses."""
    figure, ax = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    stories, code = (np.array(found["without"][name]) for name in PAIR)
    for layer in range(len(code)):
        ax.scatter(1000 * stories[layer], 1000 * code[layer], s=14, color=COLOURS[layer], label=f"layer {layer}")
    ax.set_xscale("symlog", linthresh=1)
    ax.set_yscale("symlog", linthresh=1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.axhline(0, color="#999999", linewidth=0.6)
    ax.axvline(0, color="#999999", linewidth=0.6)
    ax.set(xlabel="stories lose without it, thousandths of a nat a token", ylabel="code loses without it")
    figure.legend(loc="outside upper center", ncols=len(code))
    return figure


def draw_k(found: dict[str, Any]) -> Any:
    """Loss over experts a token, by domain, beside the mean with and without renormalisation."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
    rows = [row for row in found["k"] if not row["normalize"]]
    for colour, name in zip(COLOURS, found["domains"], strict=True):
        lost = [row["loss"][name] - found["loss"][name] for row in rows]
        axes[0].plot([row["k"] for row in rows], lost, color=colour, marker="o", markersize=2.5, label=short(name))
    for normalize, colour, label in ((False, COLOURS[0], "as they are"), (True, COLOURS[5], "divided by their sum")):
        chosen = [row for row in found["k"] if row["normalize"] == normalize]
        losses = [mean(row["loss"]) for row in chosen]
        axes[1].plot([row["k"] for row in chosen], losses, color=colour, marker="o", markersize=3, label=label)
    axes[0].set(ylabel="loss added, nats a token", title="by domain, probabilities as they are")
    axes[1].set(ylabel="held-out loss, nats a token", title="all domains")
    for ax in axes:
        ax.set(xlabel="experts a token (trained with 8)", xticks=(1, 2, 4, 6, 8, 10, 12, 14, 16))
        ax.axvline(8, color="#999999", linewidth=0.8, linestyle="--")
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.legend(fontsize=7)
    return figure


def short(name: str) -> str:
    """The name of a domain for a figure."""
    return name.replace("stories_", "").replace("_", " ")


if __name__ == "__main__":
    main()
