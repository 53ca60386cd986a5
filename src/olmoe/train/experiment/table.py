"""Results as two tables of Markdown: the arms, and the differences between them."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """The text of results.md."""
    parts = [f"# {results['title']}", *([results["question"]] if results["question"] else [])]
    if results["runs_finished"] < results["runs_planned"]:
        parts.append(f"Only {results['runs_finished']} of {results['runs_planned']} runs are finished.")
    parts += ["\n".join(_arms(results)), "\n".join(_comparisons(results))]
    parts.append(
        "Held-out loss in nats a token. A difference is the mean over seeds of the second arm minus the first with the "
        "same seed, below zero where the second is better; with its interval of 95 % and p by Student's t of paired "
        "differences. The last column is p after Holm's correction for the number of pairs."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _arms(results: dict[str, Any]) -> list[str]:
    lines = [
        "| arm | parameters | active | tokens | seeds | loss | sd | busiest expert / mean |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in results["arms"].items():
        loss, runs = arm["loss"], arm["runs"].values()
        load = sum(run["max_load_over_mean"] for run in runs) / len(runs)
        tokens = arm["tokens"] + arm["tokens_before"]
        lines.append(
            f"| {name}: {arm['label']} | {_millions(arm['parameters'])} | {_millions(arm['active_parameters'])} "
            f"| {tokens:,} | {loss['n']} | {_number(loss['mean'])} | {_number(loss['sd'])} | {load:.2f} |"
        )
    return lines


def _comparisons(results: dict[str, Any]) -> list[str]:
    if not results["comparisons"]:
        return []
    lines = [
        "| difference | seeds | mean | 95 % interval | t | p | p (Holm) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["comparisons"]:
        interval = "–" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        t = "–" if row["t"] is None else f"{row['t']:.1f}"
        lines.append(
            f"| {row['to']} − {row['from']} | {row['n']} | {row['mean']:+.4f} | {interval} | {t} | {_p(row['p'])} "
            f"| {_p(row.get('p_holm'))} |"
        )
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"
