"""The page of a training run, even one in progress: the figures of `training_figures`, each with a sentence."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping

import numpy as np

from olmoe.analysis.html_page import document, section
from olmoe.analysis.training import TrainingCurves
from olmoe.analysis.training_figures import draw_training, max_over_mean

_TITLES = {
    "loss": "Loss",
    "bits": "Held-out bits per byte",
    "preferences": "Preferences",
    "schedule": "Learning rate and gradients",
    "load": "Load of every expert",
    "balance": "Load balance",
    "margins": "Router confidence",
    "speed": "Speed and memory",
}


def training_page(name: str, curves: TrainingCurves, reload: float | None = None) -> str:
    """The page of the run called `name`; a browser reloads it every `reload` seconds."""
    sentences = training_findings(curves)
    figures = draw_training(curves)
    sections = "".join(section(key, _TITLES[key], figure, sentences[key]) for key, figure in figures.items())
    many = "" if curves.stride == 1 else f" Each point is the mean of {curves.stride} steps, each band their range."
    return document(
        f"Training of {name}",
        f"<p>{html.escape(_summary(curves) + many)}</p>\n{_table(curves)}{sections}"
        "<p><small>All numbers are in metrics.jsonl of the run.</small></p>\n",
        reload,
    )


def training_findings(curves: TrainingCurves) -> dict[str, str]:
    """What each figure shows, in one sentence."""
    say: Mapping[str, Callable[[TrainingCurves], str]] = {
        "loss": _say_loss,
        "bits": _say_bits,
        "preferences": _say_preferences,
        "schedule": _say_schedule,
        "load": _say_load,
        "balance": _say_balance,
        "margins": _say_margins,
        "speed": _say_speed,
    }
    return {name: sentence(curves) for name, sentence in say.items()}


def _summary(curves: TrainingCurves) -> str:
    skipped = f"; {len(curves.skipped):,} of the steps changed no weight" if curves.skipped else ""
    return f"{curves.steps[-1]:,} steps, {curves.tokens[-1]:,} tokens so far{skipped}."


def _table(curves: TrainingCurves) -> str:
    """Each held-out file's first, best and last evaluation."""
    if not curves.held_out:
        return ""
    rows = ""
    for name, points in curves.held_out.items():
        best = min(points, key=lambda point: point[1])
        bits = "" if math.isnan(points[-1][2]) else f"{points[-1][2]:.3f}"
        cells = (f"{points[0][1]:.3f}", f"{best[1]:.3f}", f"{best[0]:,}", f"{points[-1][1]:.3f}", bits)
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows += f"<tr><td>{html.escape(name)}</td>{numbers}</tr>\n"
    heads = ("first loss", "best loss", "at tokens", "last loss", "last bits per byte")
    return (
        '<div class="table"><table>\n<tr><th>held-out file</th>'
        + "".join(f'<th class="number">{head}</th>' for head in heads)
        + f"</tr>\n{rows}</table></div>\n"
    )


def _say_loss(curves: TrainingCurves) -> str:
    values = curves.mean.get(curves.loss, np.array([math.nan]))
    unit = f" {curves.loss_unit}" if curves.loss_unit else ""
    text = f"The training loss went from {values[0]:.3f} to {values[-1]:.3f}{unit}"
    if curves.held_out:
        last = {name: points[-1][1] for name, points in curves.held_out.items()}
        worst, best = max(last, key=last.__getitem__), min(last, key=last.__getitem__)
        if len(last) == 1:
            text += f"; on the held-out file {best} it is {last[best]:.3f}"
        else:
            text += f"; of the held-out files, {best} is the easiest ({last[best]:.3f})"
            text += f" and {worst} the hardest ({last[worst]:.3f})"
    return text + "."


def _say_bits(curves: TrainingCurves) -> str:
    known = [points for points in curves.held_out.values() if math.isfinite(points[-1][2])]
    if not known:
        return "The sizes of the held-out files in bytes are not known."
    sums = [sum(each) / len(known) for each in zip(*([p[2] for p in points] for points in known), strict=False)]
    at = min(range(len(sums)), key=sums.__getitem__)
    return (
        f"The mean over files, by which the best checkpoint is chosen, was lowest at {known[0][at][0]:,} tokens "
        f"({sums[at]:.4f}) and is now {sums[-1]:.4f}."
    )


def _say_preferences(curves: TrainingCurves) -> str:
    if "accuracy" not in curves.mean:
        return "This run learns no preferences."
    text = f"In the last {_steps(curves)}, {curves.mean['accuracy'][-1]:.0%} of pairs or answers were on the right side"
    if "margin" in curves.mean:
        text += f" of the reference, and the mean margin was {curves.mean['margin'][-1]:.3f}"
    return text + "."


def _say_schedule(curves: TrainingCurves) -> str:
    rate, norm = curves.mean["learning_rate"], curves.high.get("grad_norm")
    text = f"The learning rate is {rate[-1]:.2e} after a peak of {np.nanmax(rate):.2e}"
    if norm is not None:
        peak = int(np.nanargmax(norm))
        where = f"step {curves.steps[peak]:,}" if curves.stride == 1 else f"steps up to {curves.steps[peak]:,}"
        text += f"; the largest gradient norm before clipping was {norm[peak]:.3g} ({where})"
    return text + "."


def _say_load(curves: TrainingCurves) -> str:
    if curves.load is None:
        return "Expert load was not recorded."
    load = curves.load[-1]
    layer, expert = np.unravel_index(int((load / load.mean(axis=1, keepdims=True)).argmax()), load.shape)
    least = np.unravel_index(int((load / load.mean(axis=1, keepdims=True)).argmin()), load.shape)
    times = [load[at] / load[at[0]].mean() for at in ((layer, expert), least)]
    return (
        f"In the last {_steps(curves)}, expert {expert} of layer {layer} had the highest load, {times[0]:.2f} times "
        f"the uniform one, and expert {least[1]} of layer {least[0]} the lowest ({times[1]:.2f})."
    )


def _say_balance(curves: TrainingCurves) -> str:
    parts = []
    if curves.load is not None:
        parts.append(f"the busiest expert of a layer has {max_over_mean(curves)[-1].mean():.2f} times the uniform load")
    if "expert_entropy" in curves.by_layer:
        parts.append(
            f"the entropy of a layer's load is {curves.by_layer['expert_entropy'][-1].mean():.3f} of the maximum"
        )
    if "dead_experts" in curves.by_layer:
        parts.append(f"{curves.by_layer['dead_experts'][-1].sum():.1f} experts over all layers get no token in a step")
    if not parts:
        return "Load balance was not recorded."
    return f"In the last {_steps(curves)}, on average: {', '.join(parts)}."


def _say_margins(curves: TrainingCurves) -> str:
    if "router_margin" not in curves.by_layer:
        return "Router margins were not recorded."
    first, now = (curves.by_layer["router_margin"][at].mean() for at in (0, -1))
    text = (
        f"On average over layers, the first expert's probability is {now:.3f} above the second's ({first:.3f} at the "
        "start of the run)"
    )
    if "router_cutoff_margin" in curves.by_layer:
        cutoff = curves.by_layer["router_cutoff_margin"][-1]
        text += (
            f", and the last chosen expert's is {cutoff.mean():.4f} above the next one's, with the smallest margin in "
            f"layer {int(cutoff.argmin())} ({cutoff.min():.4f})"
        )
    return text + "."


def _say_speed(curves: TrainingCurves) -> str:
    if "tokens_per_second" not in curves.mean:
        return "Speed was not recorded."
    text = f"The median throughput is {np.nanmedian(curves.mean['tokens_per_second']):,.0f} tokens per second"
    if "mfu" in curves.mean:
        text += f", {np.nanmedian(curves.mean['mfu']):.1%} of the devices' peak (MFU, by active parameters)"
    if "peak_memory_bytes" in curves.mean:
        text += f"; the process used at most {np.nanmax(curves.high['peak_memory_bytes']) / 1e9:.2f} GB"
    return text + "."


def _steps(curves: TrainingCurves) -> str:
    return "step" if curves.stride == 1 else f"{curves.stride} steps"
