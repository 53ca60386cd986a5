"""Results as a figure: loss against tokens with a band over seeds, and differences to the first arm, seed by seed.

matplotlib is imported when it is drawn, and used without its global state. Colours can be told apart by colour-blind
readers, and lines by their dashes in grey.
"""

from __future__ import annotations

import importlib.util
import io
from typing import Any

import numpy as np

from olmoe.errors import UserError
from olmoe.train.experiment.statistics import estimate

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#e69f00", "#444444")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def require_matplotlib() -> None:
    """Raise `UserError` if the figure cannot be drawn, before hours of training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "The figure of an experiment needs matplotlib, which is not installed; install olmoe[analysis], or do "
            "without it: --no-figure."
        )


def png(results: dict[str, Any]) -> bytes:
    """The figure as a file."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        buffer = io.BytesIO()
        _draw(results).savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _draw(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    arms = results["arms"]
    looks = {name: (_COLOURS[i % 7], _DASHES[i % 7]) for i, name in enumerate(arms)}
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    curves, differences = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, arm in arms.items():
        _curve(curves, arm, *looks[name])
    curves.set(xlabel="tokens (millions)", ylabel="held-out loss (nats a token)")
    curves.set_ylim(*_visible(arms))
    curves.legend()
    _differences(differences, results, looks)
    count = max(arm["loss"]["n"] for arm in arms.values())
    figure.suptitle(f"{results['title']} ({count} seed{'s' if count > 1 else ''})".replace("$", r"\$"), fontsize=10)
    return figure


def _curve(ax: Any, arm: dict[str, Any], colour: str, dashes: Any) -> None:
    """The mean over seeds, and the interval of 95 % of that mean as a band."""
    runs = [dict(map(tuple, run["curve"])) for run in arm["runs"].values()]
    tokens = sorted(set.intersection(*(set(run) for run in runs)))
    if not tokens:
        return
    found = [estimate([run[at] for run in runs]) for at in tokens]
    x = np.asarray(tokens) / 1e6
    ax.plot(x, [e.mean for e in found], color=colour, linestyle=dashes, label=_label(arm["label"]), linewidth=1.4)
    if len(runs) > 1:
        ax.fill_between(x, [e.low for e in found], [e.high for e in found], color=colour, alpha=0.18, linewidth=0)


def _visible(arms: dict[str, Any]) -> tuple[float, float]:
    """Limits of the loss that leave out the first steps, where all arms fall from the same height."""
    points = [point for arm in arms.values() for run in arm["runs"].values() for point in run["curve"]]
    last = max(tokens for tokens, _ in points)
    late = [loss for tokens, loss in points if tokens >= 0.15 * last] or [loss for _, loss in points]
    margin = 0.05 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin


def _differences(ax: Any, results: dict[str, Any], looks: dict[str, Any]) -> None:
    """For each arm, the differences to the first one that is compared: seeds as points, the interval as a bar."""
    first = next((name for name, arm in results["arms"].items() if arm["compared"]), None)
    rows = [row for row in results["comparisons"] if row["from"] == first]
    ax.axvline(0, color="#555555", linewidth=0.9, linestyle="--")
    for y, row in enumerate(rows):
        colour = looks[row["to"]][0]
        seeds = list(row["differences"].values())
        ax.plot(seeds, [y + 0.18] * len(seeds), "o", color=colour, markersize=3, alpha=0.7)
        if row["low"] is not None:
            ax.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2.2)
        ax.plot([row["mean"]], [y], "D", color=colour, markersize=5)
    labels = [_label(results["arms"][row["to"]]["label"]) for row in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    ax.locator_params(axis="x", nbins=4)  # the panel is narrow
    reference = _label(results["arms"][first]["label"]) if first else ""
    ax.set(xlabel="difference of the final loss", title=f"against {reference}")


def _label(text: str) -> str:
    """A text with its dollar signs escaped, which matplotlib reads as mathematics."""
    return text.replace("$", r"\$")
