"""From the measurements of an analysis to a router policy that forces the experts of a domain on any text.

Which experts a domain has is read from `metrics.json` of `olmoe analyze`; the policy is a `NamedPolicy`, which
`olmoe.runner.policy_file` writes as a file for everything that generates.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from olmoe.analysis.measurements import SCHEMA
from olmoe.errors import UserError, shown
from olmoe.io.json_file import read_object
from olmoe.runner.policy_file import NamedPolicy

How = Literal["only", "boost", "pin"]
By = Literal["share", "contrast"]


def domain_policy(
    metrics: Mapping[str, Any] | str | os.PathLike[str],
    domain: str,
    *,
    how: How = "only",
    experts: int | None = None,
    by: By = "share",
    strength: float = 2.0,
) -> NamedPolicy:
    """A policy that forces, in every layer, the experts that tokens of `domain` choose most.

    `metrics` is a `metrics.json`, the folder of an analysis, or the contents of one. `how` says what is done with the
    domain's experts:

    - "only": no others are chosen. By default they are those with more than an even share of the domain's tokens.
    - "boost": `strength` is added to their logits; the same experts by default.
    - "pin": every token chooses them; by default half of top-k, so that the router is free to choose the other half.
      `experts` is their number in each layer. They are ranked `by` their "share" of the domain's tokens, or by

    "contrast": that share minus the one for all domains together, for experts that hardly anything else chooses.
    Raises `UserError` for measurements without this domain, and for numbers that no policy can have.
    """
    if how not in get_args(How) or by not in get_args(By):
        wrong, choices = (how, get_args(How)) if how not in get_args(How) else (by, get_args(By))
        raise UserError(f"A domain's experts cannot be forced by {shown(wrong)}; choose one of {', '.join(choices)}.")
    found = metrics if isinstance(metrics, Mapping) else _read(Path(metrics))
    shares, contrasts, top_k = _shares(found, domain)
    count = len(shares[0])
    if experts is not None:
        least, most = top_k if how == "only" else 1, top_k if how == "pin" else count
        if isinstance(experts, bool) or not isinstance(experts, int) or not least <= experts <= most:
            raise UserError(
                f"With how={how!r} there can be {least} to {most} experts of a domain in a layer, not "
                f"{shown(experts)}; each token chooses {top_k} of {count}."
            )
    if not 0 < strength <= 1e4:
        raise UserError(f"The strength of a boost must be above 0 and at most 10000, not {shown(strength)}.")
    places: list[tuple[int | None, int]] = []
    for layer, row in enumerate(shares):
        ranks = row if by == "share" else contrasts[layer]
        falling = sorted(range(count), key=lambda expert, ranks=ranks: (-ranks[expert], expert))  # type: ignore[misc]
        number = experts or _default(how, row, top_k)
        places += [(layer, expert) for expert in sorted(falling[:number])]
    if how == "boost":
        return NamedPolicy(boost=tuple((layer, expert, float(strength)) for layer, expert in places))
    return NamedPolicy(allow=tuple(places)) if how == "only" else NamedPolicy(pin=tuple(places))


def _default(how: How, shares: list[float], top_k: int) -> int:
    """How many experts of a layer count as the domain's, given the shares of the domain's tokens."""
    if how == "pin":
        return max(top_k // 2, 1)
    return max(sum(share > top_k / len(shares) for share in shares), top_k)


def _read(path: Path) -> Mapping[str, Any]:
    path = Path(os.path.expanduser(path))
    path = path / "metrics.json" if path.is_dir() else path
    try:
        return read_object(path)
    except OSError as error:
        raise UserError(f"The measurements {path} cannot be read ({error.strerror}).") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"The measurements {path} are not a JSON object ({error}).") from None


def _shares(metrics: Mapping[str, Any], domain: str) -> tuple[list[list[float]], list[list[float]], int]:
    """For each layer the shares of a domain's tokens by expert, and their difference from those of all; and top_k."""
    if metrics.get("schema") != SCHEMA:
        raise UserError(
            f"The measurements have the schema {shown(metrics.get('schema'))}, not {SCHEMA}; make them with "
            "olmoe analyze."
        )
    try:
        layers = [str(layer) for layer in range(metrics["layers_count"])]
        count, top_k, domains = int(metrics["experts"]), int(metrics["top_k"]), metrics["domains"]
        if domain not in domains:
            raise UserError(f"There is no domain {shown(domain)}; the measurements have {', '.join(domains)}.")
        own = [[float(x) for x in domains[domain]["layers"][layer]["top_k"]] for layer in layers]
        every = [[float(x) for x in metrics["layers"][layer]["top_k"]] for layer in layers]
    except (KeyError, TypeError) as error:
        raise UserError(f"The measurements are incomplete ({error}); make them with olmoe analyze.") from None
    if not own or any(len(row) != count for row in (*own, *every)):
        raise UserError(f"The measurements are incomplete: a layer lacks its {count} shares; make them again.")
    return own, [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(own, every, strict=True)], top_k
