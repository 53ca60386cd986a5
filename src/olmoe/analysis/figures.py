"""The figures of an analysis, drawn from metrics.json: those of the paper (section 5), for any OLMoE model.

Shapes legend: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoe.analysis.drawing import COLOUR_MAP, COLOURS, GREY, STYLE, new_figure, short

Metrics = Mapping[str, Any]


def shown_layers(metrics: Metrics) -> list[int]:
    """The first, a middle and the last layer, which the paper shows."""
    last = metrics["layers_count"] - 1
    return sorted({0, last // 2, last})


def middle_layer(metrics: Metrics) -> int:
    """The layer whose experts are shown one by one, as the paper does for layer 7 of 16."""
    return (int(metrics["layers_count"]) - 1) // 2


def apart_experts(metrics: Metrics) -> list[int]:
    """The experts of the last layer whose use differs most between domains, strongest first: three for a figure."""
    found = metrics.get("token_shares", {"experts": {}})
    layer = str(metrics["layers_count"] - 1)
    shares = np.asarray([numbers["layers"][layer]["top_k"] for numbers in metrics["domains"].values()])
    order = np.argsort(-np.ptp(shares, axis=0), kind="stable").tolist()
    return [expert for expert in order if str(expert) in found["experts"]][:3]


def draw(metrics: Metrics) -> dict[str, Any]:
    """Every figure that the numbers allow, by name: matplotlib `Figure` objects."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        drawn = {
            "domains-top-k": _domains(metrics, "top_k"),
            "domains-top-1": _domains(metrics, "top_1"),
            "load": _load(metrics),
            "coactivation": _coactivation(metrics),
            "vocabulary": _vocabulary(metrics),
            "vocabulary-experts": _vocabulary_experts(metrics),
            "token-shares": _token_shares(metrics),
            "flow": _flow(metrics),
            "confidence": _confidence(metrics),
            "neighbours": _neighbours(metrics),
        }
        if "against" in metrics:
            drawn["agreement"] = _agreement(metrics)
        if "shares" in metrics.get("against", {}):
            drawn["before-after"] = _domains(metrics, "top_k", metrics["against"]["shares"])
        if metrics.get("revisions"):
            drawn["revisions"] = _revisions(metrics)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _domains(metrics: Metrics, which: str, other: Mapping[str, Any] | None = None) -> Any:
    """Bars of each domain's shares by expert, with the uniform share (Fig. 22, 34); another model's as a line (33)."""
    names, layers = list(metrics["domains"]), shown_layers(metrics)
    uniform = metrics["top_k"] / metrics["experts"] if which == "top_k" else 1 / metrics["experts"]
    figure, axes = new_figure(len(names), len(layers), 0.7 + 1.05 * len(names), sharex=True, sharey="col")
    for row, name in enumerate(names):
        for column, layer in enumerate(layers):
            ax = axes[row, column]
            shares = np.asarray(metrics["domains"][name]["layers"][str(layer)][which])
            # One shape, not one for each expert: thousands of them would make the page several times as large.
            edges = np.arange(len(shares) + 1) - 0.5
            ax.stairs(100 * shares, edges, fill=True, color=COLOURS[row % len(COLOURS)])
            ax.axhline(100 * uniform, color=GREY, linewidth=0.9, linestyle="--")
            if other is not None:
                outline = 100 * np.asarray(other[name][str(layer)][which])
                ax.stairs(outline, edges, color="black", linewidth=0.7)
            if row == 0:
                ax.set_title(f"layer {layer}")
            if row == len(names) - 1:
                ax.set_xlabel("expert")
                ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            if column == 0:
                ax.set_ylabel(f"{short(name)}\n% of tokens")
    if other is not None:
        names = [short(metrics["model"], 40), short(metrics["against"]["model"], 40)]
        figure.legend(axes[0, 0].patches, names, loc="outside upper center", ncols=2)
    return figure


def _load(metrics: Metrics) -> Any:
    """How often each expert of each layer is chosen, relative to the uniform share."""
    loads = np.asarray([metrics["layers"][str(layer)]["top_k"] for layer in range(metrics["layers_count"])])
    relative = loads * metrics["experts"] / metrics["top_k"]
    figure, axes = new_figure(1, 1, 1.2 + 0.16 * len(loads))
    ax = axes[0, 0]
    image = ax.imshow(relative, aspect="auto", cmap=COLOUR_MAP, vmin=0, interpolation="nearest")
    ax.set(xlabel="expert", ylabel="layer")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.colorbar(image, ax=ax, label="load / uniform load", pad=0.01)
    return figure


def _coactivation(metrics: Metrics) -> Any:
    """For the experts most often chosen together: the share of i's tokens that choose j (Fig. 21)."""
    layers = shown_layers(metrics)
    figure, axes = new_figure(1, len(layers), 2.9)
    image = None
    for ax, layer in zip(axes[0], layers, strict=True):
        together = metrics["layers"][str(layer)]["together"]
        experts, matrix = together["experts"], 100 * np.asarray(together["shares"], dtype=float)
        ax.set_title(f"layer {layer}")
        if not experts:
            ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes)
            continue
        image = ax.imshow(matrix, cmap=COLOUR_MAP, vmin=0, vmax=100, interpolation="nearest")
        ax.set_xticks(range(len(experts)), experts, rotation=90, fontsize=6.5)
        ax.set_yticks(range(len(experts)), experts, fontsize=6.5)
        ax.set_xlabel("expert j")
    axes[0, 0].set_ylabel("expert i")
    if image is not None:
        figure.colorbar(image, ax=axes[0].tolist(), label="% of i's tokens", pad=0.01, shrink=0.8)
    return figure


def _vocabulary(metrics: Metrics) -> Any:
    """How far ids determine experts, over depth (Fig. 30)."""
    figure, axes = new_figure(1, 2, 2.6)
    depth = range(metrics["layers_count"])
    for ax, which, title in ((axes[0, 0], "top_k", f"top {metrics['top_k']}"), (axes[0, 1], "top_1", "top 1")):
        for (name, label), style in zip(_SEEN.items(), ("-o", "--s", ":^"), strict=True):
            values = [metrics["layers"][str(layer)]["vocabulary"].get(name) for layer in depth]
            if all(value is not None for value in values):
                ax.plot(
                    depth, [100 * value[which] for value in values], style, label=label, markersize=3.5,
                    color=COLOURS[list(_SEEN).index(name)],
                )  # fmt: skip
        ax.set(title=title, xlabel="layer")
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[0, 0].set_ylabel("vocabulary specialisation, %")
    axes[0, 1].legend()
    return figure


def _vocabulary_experts(metrics: Metrics) -> Any | None:
    """How exclusively each expert of a middle layer takes the ids whose favourite it is (Fig. 23)."""
    vocabulary = metrics["layers"][str(middle_layer(metrics))]["vocabulary"]
    keys = {"experts": ("input", "input id"), "experts_predicted": ("predicted", "predicted id")}
    shown = {key: names for key, names in keys.items() if key in vocabulary}
    if not shown:
        return None
    figure, axes = new_figure(len(shown), 1, 0.6 + 1.4 * len(shown), sharex=True)
    for ax, (key, (name, label)) in zip(axes[:, 0], shown.items(), strict=True):
        values = [math.nan if value is None else 100 * value for value in vocabulary[key]]
        ax.bar(range(len(values)), values, width=0.85, color=COLOURS[list(_SEEN).index(name)])
        ax.axhline(100 * vocabulary[name]["top_1"], color=GREY, linewidth=0.9, linestyle="--")
        ax.set(title=label, ylabel="%", ylim=(0, 100))
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[-1, 0].set_xlabel(f"expert of layer {middle_layer(metrics)}")
    return figure


def _token_shares(metrics: Metrics) -> Any | None:
    """For three experts, how much of its tokens' occurrences each takes in each domain (Fig. 32)."""
    experts, names = apart_experts(metrics), list(metrics["domains"])
    if not experts:
        return None
    found = metrics["token_shares"]
    figure, axes = new_figure(1, len(experts), 1.1 + 0.24 * len(names), sharey=True)
    image = None
    for ax, expert in zip(axes[0], experts, strict=True):
        bins = len(next(iter(found["experts"][str(expert)].values())))
        counts = np.asarray([found["experts"][str(expert)].get(name, [0] * bins) for name in names], dtype=float)
        total = counts.sum(axis=1, keepdims=True)
        image = ax.imshow(
            100 * counts / np.maximum(total, 1), aspect="auto", cmap=COLOUR_MAP, vmin=0, vmax=100,
            interpolation="nearest", extent=(0, 100, len(names) - 0.5, -0.5),
        )  # fmt: skip
        ax.set(title=f"expert {expert}", xlabel="% of occurrences")
        for row, number in enumerate(total[:, 0]):
            ax.text(102, row, f"{number:.0f}", fontsize=6.5, va="center", color=GREY)
    axes[0, 0].set_yticks(range(len(names)), [short(name) for name in names])
    figure.colorbar(image, ax=axes[0].tolist(), label="% of its ids", pad=0.03)
    return figure


_SEEN = {"input": "input id", "predicted": "predicted id", "next": "next id"}


def _flow(metrics: Metrics) -> Any | None:
    """Which first choices lead to which, between shown layers: bands by their part of the tokens drawn (Fig. 35)."""
    flows = [(*map(int, name.split("-")), triples) for name, triples in metrics["flow"].items() if triples]
    if not flows:
        return None
    sizes: dict[int, dict[int, float]] = {}
    for a, b, triples in flows:
        for i, j, _tokens in triples:
            for layer, expert in ((a, i), (b, j)):
                sizes.setdefault(layer, {}).setdefault(expert, 0)
        for layer, at in ((a, 0), (b, 1)):
            for expert in sizes[layer]:
                through = sum(t[2] for t in triples if t[at] == expert)
                sizes[layer][expert] = max(sizes[layer][expert], through)
    layers = sorted(sizes)
    figure, axes = new_figure(1, 1, 4.4)
    ax = axes[0, 0]
    heights = {layer: _stack(sizes[layer]) for layer in layers}
    places = {layer: x for x, layer in enumerate(layers)}
    for layer in layers:
        for expert, (bottom, size) in heights[layer].items():
            ax.add_patch(_rectangle(places[layer] - 0.02, bottom, 0.04, size))
            ax.text(places[layer] + 0.03, bottom + size / 2, str(expert), fontsize=6.5, va="center", zorder=3)
    for a, b, triples in flows:
        _bands(ax, places[a], places[b], heights[a], heights[b], triples)
    ax.set_xlim(-0.06, len(layers) - 0.9)
    ax.set_ylim(-0.01, 1.01)
    ax.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    return figure


def _stack(sizes: Mapping[int, float]) -> dict[int, tuple[float, float]]:
    """Bottom and height of each node, the largest on top; gaps take a fifth of the whole."""
    total, gap = sum(sizes.values()), 0.2 / max(len(sizes), 1)
    found, top = {}, 1.0
    for expert in sorted(sizes, key=lambda e: (-sizes[e], e)):
        height = 0.8 * sizes[expert] / total
        found[expert] = (top - height, height)
        top -= height + gap
    return found


def _bands(
    ax: Any,
    left: float,
    right: float,
    one: Mapping[int, tuple[float, float]],
    other: Mapping[int, tuple[float, float]],
    triples: list[list[int]],
) -> None:
    """Bands between nodes, sorted at each node by where they go, so that few cross."""
    leaving = {i: sum(t[2] for t in triples if t[0] == i) for i in one}
    coming = {j: sum(t[2] for t in triples if t[1] == j) for j in other}
    top_one = {i: bottom + size for i, (bottom, size) in one.items()}
    top_other = {j: bottom + size for j, (bottom, size) in other.items()}
    starts: dict[tuple[int, int], tuple[float, float]] = {}
    for i, j, tokens in sorted(triples, key=lambda t: (t[0], -other[t[1]][0])):
        width = one[i][1] * tokens / leaving[i]
        starts[i, j] = (top_one[i] - width, width)
        top_one[i] -= width
    order = sorted(one, key=lambda i: -one[i][0])
    for rank, i, j, tokens in sorted((order.index(i), i, j, tokens) for i, j, tokens in triples):
        width = other[j][1] * tokens / coming[j]
        top_other[j] -= width
        bottom, before = starts[i, j]
        colour = COLOURS[rank % len(COLOURS)]
        ax.add_patch(_band(left + 0.02, right - 0.02, (bottom, before), (top_other[j], width), colour))


def _rectangle(x: float, y: float, width: float, height: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor="#333333", linewidth=0)


def _band(x0: float, x1: float, one: tuple[float, float], other: tuple[float, float], colour: str) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    middle = (x0 + x1) / 2
    (y0, h0), (y1, h1) = one, other
    points = [
        (x0, y0), (middle, y0), (middle, y1), (x1, y1), (x1, y1 + h1), (middle, y1 + h1), (middle, y0 + h0),
        (x0, y0 + h0), (x0, y0),
    ]  # fmt: skip
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    return PathPatch(Path(points, codes), facecolor=colour, alpha=0.45, linewidth=0)


def _confidence(metrics: Metrics) -> Any:
    """How sure routers are, over depth: probabilities of what they choose."""
    figure, axes = new_figure(1, 2, 2.6)
    depth = range(metrics["layers_count"])
    names = {"mass": "all chosen", "first": "first expert", "margin": "its lead over the second"}
    for (name, label), style, colour in zip(names.items(), ("-o", "--s", ":^"), COLOURS, strict=False):
        values = [metrics["layers"][str(layer)][name] for layer in depth]
        axes[0, 0].plot(depth, values, style, label=label, markersize=3.5, color=colour)
    axes[0, 0].set(xlabel="layer", ylabel="mean probability", ylim=(0, 1))
    axes[0, 0].legend(loc="best")
    axes[0, 0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    for layer, style, colour in zip(shown_layers(metrics), ("-", "--", ":"), COLOURS, strict=False):
        counts = np.asarray(metrics["layers"][str(layer)]["histogram"], dtype=float)
        edges = np.linspace(0, 1, len(counts) + 1)
        shares = 100 * counts / max(counts.sum(), 1)
        axes[0, 1].stairs(shares, edges, label=f"layer {layer}", color=colour, linestyle=style, linewidth=1.4)
    axes[0, 1].set(xlabel="probability of the first expert", ylabel="% of tokens", xlim=(0, 1))
    axes[0, 1].legend()
    return figure


def _neighbours(metrics: Metrics) -> Any:
    """How many experts a token has in common with the one before it, over depth."""
    figure, axes = new_figure(1, 1, 2.4)
    ax, depth = axes[0, 0], range(metrics["layers_count"])
    ax.plot(depth, [100 * metrics["layers"][str(layer)]["neighbours"] for layer in depth], "-o", color=COLOURS[0])
    chance = 100 * metrics["chance"]["saturation_k"]
    ax.axhline(chance, color=GREY, linewidth=0.9, linestyle="--")
    ax.annotate("chance", (0, chance), xytext=(0, 3), textcoords="offset points", color=GREY)
    ax.set(xlabel="layer", ylabel="% of experts in common", ylim=(0, None))
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


def _agreement(metrics: Metrics) -> Any:
    """How many experts two models have in common, by domain, over depth."""
    figure, axes = new_figure(1, 2, 2.8, sharey=True)
    depth = range(metrics["layers_count"])
    domains = metrics["against"]["domains"].values()
    lowest = 100 * min(share for numbers in domains for which in ("top_k", "top_1") for share in numbers[which])
    bottom = max(0.0, min(95.0, lowest - 0.5 * (100 - lowest)))  # room for the names below the lines
    for ax, which, title in ((axes[0, 0], "top_k", f"top {metrics['top_k']}"), (axes[0, 1], "top_1", "top 1")):
        for at, (name, numbers) in enumerate(metrics["against"]["domains"].items()):
            style = ("-", "--", ":", "-.")[at % 4]
            values = [100 * value for value in numbers[which]]
            colour = COLOURS[at % len(COLOURS)]
            ax.plot(depth, values, style, marker="o", markersize=3, label=short(name), color=colour)
        ax.set(title=title, xlabel="layer", ylim=(bottom, 101))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes[0, 0].set_ylabel("% of experts in common")
    axes[0, 1].legend(fontsize=7, ncols=math.ceil(len(metrics["against"]["domains"]) / 6))
    return figure


def _revisions(metrics: Metrics) -> Any:
    """How much of the final routing is reached over training, and how load and certainty change (Fig. 20)."""
    import matplotlib

    earlier, layers = metrics["revisions"], [str(layer) for layer in range(metrics["layers_count"])]
    figure, axes = new_figure(2, 2, 4.8)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    panels = {
        "saturation_1": ("top 1", "% of final experts", 100),
        "saturation_k": (f"top {metrics['top_k']}", "% of final experts", 100),
        "max_over_mean": ("busiest expert", "load / uniform load", 1),
        "first": ("first expert", "mean probability", 1),
    }
    for ax, (name, (title, unit, scale)) in zip(axes.flat, panels.items(), strict=True):
        for layer, colour in zip(layers, colours, strict=True):
            values = [each["layers"][layer][name] for each in earlier]
            if name in metrics["layers"][layer]:  # what the model itself has; its saturation is 100 % by definition
                values.append(metrics["layers"][layer][name])
            points = [scale * value for value in values]
            ax.plot(range(len(points)), points, "-o", color=colour, markersize=3, label=layer)
        if name in ("saturation_1", "saturation_k"):
            chance = 100 * metrics["chance"][name]
            ax.axhline(chance, color=GREY, linewidth=0.9, linestyle="--")
        ax.set(title=title, ylabel=unit, ylim=(0, 101 if scale == 100 else None))
        _label_revisions(ax, metrics, len(points))
    axes[0, 1].legend(title="layer", fontsize=6.5, ncols=math.ceil(len(layers) / 6), loc="lower right")
    return figure


def _label_revisions(ax: Any, metrics: Metrics, count: int) -> None:
    """Name at most eight points of the axis, by their steps if all have one."""
    earlier = metrics["revisions"]
    by_step = all(each["step"] is not None for each in earlier)
    names = [f"{each['step']:,}" if by_step else short(each["name"]) for each in earlier] + ["last"]
    places = sorted({round(at) for at in np.linspace(0, count - 1, min(count, 8))})
    rotation = 0 if sum(len(names[at]) for at in places) < 30 else 30
    ax.set_xticks(places, [names[at] for at in places], rotation=rotation)
    ax.set_xlabel("training step" if by_step else "revision")
