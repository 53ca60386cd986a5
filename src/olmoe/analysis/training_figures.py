"""The figures of a training run, drawn from its `TrainingCurves`.

Shapes legend: C columns of steps, L layers, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from olmoe.analysis.drawing import COLOUR_MAP, COLOURS, GREY, STYLE, new_figure, short
from olmoe.analysis.training import Floats, TrainingCurves

_LINES = ("-", "--", ":", "-.")
# Loads above this many times the uniform load all have the brightest colour.
_BRIGHTEST = 3.0


def draw_training(curves: TrainingCurves) -> dict[str, Any]:
    """Every figure that the records allow, by name: matplotlib `Figure` objects."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = {
            "loss": _loss(curves),
            "bits": _bits(curves),
            "preferences": _preferences(curves),
            "schedule": _schedule(curves),
            "load": _load(curves),
            "balance": _balance(curves),
            "margins": _margins(curves),
            "speed": _speed(curves),
        }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def max_over_mean(curves: TrainingCurves) -> Floats:
    """The load of the busiest expert over the mean, by column and layer (C, L)."""
    assert curves.load is not None
    found: Floats = curves.load.max(axis=2) / np.maximum(curves.load.mean(axis=2), 1e-9)
    return found


def _loss(curves: TrainingCurves) -> Any:
    """Training and held-out loss over tokens."""
    figure, axes = new_figure(1, 1, 3.2)
    ax = axes[0, 0]
    if curves.loss in curves.mean:
        _band(ax, curves, curves.loss, COLOURS[-1])
        ax.plot(_millions(curves), curves.mean[curves.loss], color=COLOURS[-1], linewidth=1.2, label="training")
    _by_file(ax, curves, 1)
    ax.set(xlabel=_TOKENS, ylabel=curves.loss_unit or "loss")
    _legend(ax, 1 + len(curves.held_out))
    return figure


def _bits(curves: TrainingCurves) -> Any | None:
    """Held-out bits per byte over tokens."""
    if not any(math.isfinite(bits) for points in curves.held_out.values() for _, _, bits in points):
        return None
    figure, axes = new_figure(1, 1, 2.6)
    _by_file(axes[0, 0], curves, 2)
    axes[0, 0].set(xlabel=_TOKENS, ylabel="bits per byte")
    _legend(axes[0, 0], len(curves.held_out))
    return figure


def _preferences(curves: TrainingCurves) -> Any | None:
    """How often, and by how much more than the reference, the model prefers the chosen answers."""
    titles = {"accuracy": "share of pairs on the right side", "margin": "margin"}
    known = [name for name in titles if name in curves.mean]
    if not known:
        return None
    figure, axes = new_figure(1, len(known), 2.4)
    for ax, name in zip(axes[0], known, strict=True):
        _band(ax, curves, name, COLOURS[1])
        ax.plot(_millions(curves), curves.mean[name], color=COLOURS[1], linewidth=1.2)
        ax.set(xlabel=_TOKENS, title=titles[name])
    return figure


def _schedule(curves: TrainingCurves) -> Any:
    """Learning rate, and the norm of gradients before they were clipped."""
    figure, axes = new_figure(1, 2, 2.4)
    for ax, name, label in zip(
        axes[0], ("learning_rate", "grad_norm"), ("learning rate", "gradient norm"), strict=True
    ):
        if name in curves.mean:
            _band(ax, curves, name, COLOURS[0])
            ax.plot(_millions(curves), curves.mean[name], color=COLOURS[0], linewidth=1.2)
        ax.set(xlabel=_TOKENS, title=label)
    axes[0, 0].set_ylim(0, None)
    if "grad_norm" in curves.mean:
        axes[0, 1].set_yscale("log")
    return figure


def _load(curves: TrainingCurves) -> Any | None:
    """The load of every expert of every layer over training, relative to the uniform load."""
    if curves.load is None:
        return None
    _, layers, experts = curves.load.shape
    relative = curves.load / np.maximum(curves.load.mean(axis=2, keepdims=True), 1e-9)
    figure, axes = new_figure(1, 1, min(9.0, 1.0 + layers * max(0.35, min(1.0, experts / 64))))
    ax = axes[0, 0]
    image = ax.imshow(
        relative.reshape(len(relative), -1).T, aspect="auto", cmap=COLOUR_MAP, vmin=0, vmax=_BRIGHTEST,
        interpolation="nearest", extent=(0, curves.tokens[-1] / 1e6, layers, 0),
    )  # fmt: skip
    for layer in range(1, layers):
        ax.axhline(layer, color="white", linewidth=1.5)
    ax.set_yticks(np.arange(layers) + 0.5, [str(layer) for layer in range(layers)])
    ax.set(xlabel=_TOKENS, ylabel="layer, and within it its experts")
    figure.colorbar(image, ax=ax, label="load / uniform load", pad=0.01, extend="max")
    return figure


def _balance(curves: TrainingCurves) -> Any | None:
    """How evenly each layer uses its experts."""
    panels: dict[str, Floats] = {}
    if curves.load is not None:
        panels["busiest expert: load / uniform load"] = max_over_mean(curves)
    if "expert_entropy" in curves.by_layer:
        panels["entropy of load, 1 is even"] = curves.by_layer["expert_entropy"]
    if "dead_experts" in curves.by_layer:
        panels["experts without a token in a step"] = curves.by_layer["dead_experts"]
    return _layered(curves, panels)


def _margins(curves: TrainingCurves) -> Any | None:
    """How close routers are to other choices."""
    titles = {"router_margin": "first expert above the second", "router_cutoff_margin": "last chosen above the next"}
    panels = {title: curves.by_layer[name] for name, title in titles.items() if name in curves.by_layer}
    figure = _layered(curves, panels)
    if figure is not None:
        figure.axes[0].set_ylabel("difference of probabilities")
    return figure


def _layered(curves: TrainingCurves, panels: dict[str, Floats]) -> Any | None:
    """A panel for each of these (C, L), with a line for each layer."""
    import matplotlib

    if not panels:
        return None
    figure, axes = new_figure(1, len(panels), 2.6)
    for ax, (title, values) in zip(axes[0], panels.items(), strict=True):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, values.shape[1]))
        for layer, colour in enumerate(colours):
            ax.plot(_millions(curves), values[:, layer], color=colour, linewidth=1, label=str(layer))
        ax.set_title(title, fontsize=8)
        ax.set_xlabel(_TOKENS)
    axes[0, -1].legend(title="layer", fontsize=6.5, ncols=math.ceil(values.shape[1] / 6))
    return figure


def _speed(curves: TrainingCurves) -> Any | None:
    """Tokens per second, utilisation of the device, and memory."""
    panels = {
        "tokens_per_second": ("tokens/s", 1.0),
        "mfu": ("MFU, %", 100.0),
        "peak_memory_bytes": ("peak memory, GB", 1e-9),
        "peak_device_memory_bytes": ("peak memory of the device, GB", 1e-9),
    }
    known = [name for name in panels if name in curves.mean]
    if not known:
        return None
    figure, axes = new_figure(1, len(known), 2.4)
    for ax, name in zip(axes[0], known, strict=True):
        title, scale = panels[name]
        _band(ax, curves, name, COLOURS[2], scale)
        ax.plot(_millions(curves), scale * curves.mean[name], color=COLOURS[2], linewidth=1.2)
        ax.set(xlabel=_TOKENS, title=title, ylim=(0, None))
    return figure


_TOKENS = "million tokens"


def _millions(curves: TrainingCurves) -> Floats:
    return curves.tokens / 1e6


def _band(ax: Any, curves: TrainingCurves, name: str, colour: str, scale: float = 1.0) -> None:
    """A band from the least to the greatest of the steps that a point averages."""
    if curves.stride > 1:
        low, high = scale * curves.low[name], scale * curves.high[name]
        ax.fill_between(_millions(curves), low, high, color=colour, alpha=0.2, linewidth=0)


def _by_file(ax: Any, curves: TrainingCurves, which: int) -> None:
    """A line for each held-out file, of its losses (1) or bits per byte (2)."""
    for at, (name, points) in enumerate(curves.held_out.items()):
        places = [point[0] / 1e6 for point in points]
        ax.plot(
            places, [point[which] for point in points], _LINES[at // (len(COLOURS) - 1) % len(_LINES)], marker="o",
            markersize=2.5, linewidth=1, color=COLOURS[at % (len(COLOURS) - 1)], label=short(name, 30),
        )  # fmt: skip


def _legend(ax: Any, entries: int) -> None:
    ax.grid(axis="y", color=GREY, alpha=0.15, linewidth=0.6)
    ax.legend(fontsize=7, ncols=max(1, math.ceil(entries / 6)))
