"""What an experiment is: a TOML file with a training configuration for all arms, and what each arm changes in it.

    title = "Load balancing"
    question = "Does the loss that balances the experts help?"
    base = "base.toml"                # an ordinary training configuration; paths in it are relative to it

    [arms.on]
    label = "weight 0.01"

    [arms.off]
    loss = { load_balancing = 0.0 }

An arm may name another one that it continues from (`start`), whose best checkpoint of the same seed it starts with, and
how to turn that into a mixture of experts first (`upcycle`, with the options of `olmoe upcycle`). The figure compares
all other arms with the first compared arm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError, shown
from olmoe.train.toml_file import read_toml, resolve_path
from olmoe.weights.upcycle import Upcycling

Tables = dict[str, dict[str, Any]]

_SECTIONS = (
    "run", "model", "tokenizer", "data", "batch", "schedule", "optimizer", "loss", "regularization", "shared_expert",
    "skip", "compute", "evaluation", "checkpoint",
)  # fmt: skip
_FOLDER = "experiments"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: `tables` is its whole training configuration, with absolute paths.

    `start` is the arm that it continues from, and `upcycle` how that arm's model is changed first. Arms that are not
    `compared` only serve as starts for others.
    """

    name: str
    label: str
    tables: Tables
    start: str | None = None
    upcycle: dict[str, Any] = field(default_factory=dict)
    compared: bool = True


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment and its arms, in the order of the file: an arm comes after the one that it starts from."""

    name: str
    title: str
    question: str
    arms: dict[str, Arm]

    @property
    def output(self) -> Path:
        """Where its runs are kept unless another folder is given: under `run.output` of the shared configuration."""
        return Path(next(iter(self.arms.values())).tables["run"]["output"]) / self.name


def find(name: str) -> Path:
    """The file of an experiment: a path, or the name of one in the folder experiments/ here.

    Raises `ConfigError` if there is none.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    named = Path(_FOLDER) / f"{name}.toml"
    if named.is_file():
        return named
    known = sorted(p.stem for p in Path(_FOLDER).glob("*.toml") if "arms" in _toml(p))
    hint = f"{_FOLDER}/ has {', '.join(known)}" if known else f"there is no folder {_FOLDER}/ with any here"
    raise ConfigError(f"There is no experiment {name!r}; give the path of a TOML file, or a name: {hint}.")


def load_experiment(path: Path) -> Experiment:
    """Read and check the file of an experiment. Raises `ConfigError` with the offending key and value.

    Training configurations themselves are checked when their runs are laid out.
    """
    raw = _toml(path)
    _refuse_unknown(raw, ("title", "question", "base", "arms"), str(path))
    if not isinstance(raw.get("arms"), dict) or len(raw["arms"]) < 2:
        raise ConfigError(f"{path} must have at least two arms to compare, as tables [arms.NAME].")
    base: dict[str, Any] = {}
    if "base" in raw:
        base_path = path.parent / _text(raw, "base", "", str(path))
        base = _absolute(_toml(base_path), base_path.parent)
    arms: dict[str, Arm] = {}
    for name, table in raw["arms"].items():
        arms[name] = _arm(name, table, base, arms, path)
    if sum(arm.compared for arm in arms.values()) < 2:
        raise ConfigError(f"{path} compares fewer than two arms; leave compared = false out of one of them.")
    title = _text(raw, "title", path.stem, str(path))
    return Experiment(name=path.stem, title=title, question=_text(raw, "question", "", str(path)), arms=arms)


def _arm(name: str, table: Any, base: dict[str, Any], before: dict[str, Arm], path: Path) -> Arm:
    where = f"[arms.{name}] in {path}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"{where} names a folder, so it can have letters, digits, dots, dashes and underscores only.")
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table, not {shown(table)}.")
    _refuse_unknown(table, ("label", "start", "upcycle", "compared", *_SECTIONS), where)
    tables = _merged(base, _absolute({k: v for k, v in table.items() if k in _SECTIONS}, path.parent), where)
    if "initialize_from" in tables["run"]:
        raise ConfigError(f"{where} has run.initialize_from; name an arm to start from instead: start = ARM.")
    start = _text(table, "start", "", where) or None
    if start is not None and start not in before:
        raise ConfigError(
            f"{where} starts from {start!r}, which is not an earlier arm ({', '.join(before) or 'none is'})."
        )
    compared = table.get("compared", True)
    if not isinstance(compared, bool):
        raise ConfigError(f"compared of {where} must be true or false, not {shown(compared)}.")
    upcycle = table.get("upcycle", {})
    if upcycle and start is None:
        raise ConfigError(f"{where} upcycles, but does not start from an arm; add start = ARM.")
    if start is not None:
        if "shared_expert" in tables or "shared_expert" in before[start].tables:
            raise ConfigError(f"{where} starts from another arm, which a shared expert rules out; remove one.")
        if "model" in table:
            raise ConfigError(f"{where} starts from {start!r}, whose model it has; remove its [model].")
        tables["model"] = before[start].tables["model"] | _upcycled(before[start].tables["model"], upcycle, where)
    label = _text(table, "label", name, where)
    return Arm(name=name, label=label, tables=tables, start=start, upcycle=upcycle, compared=compared)


def plan_of(upcycle: dict[str, Any], seed: int) -> Upcycling:
    """The upcycling plan of an arm, with routers of this seed."""
    return Upcycling(**upcycle | {"seed": seed})


def _upcycled(model: dict[str, Any], upcycle: Any, where: str) -> dict[str, Any]:
    """What upcycling changes in a [model]; nothing without one."""
    if not isinstance(upcycle, dict):
        raise ConfigError(f"upcycle of {where} must be a table, not {shown(upcycle)}.")
    if not upcycle:
        return {}
    kinds = {"experts": int, "top_k": int, "split": int, "form": str, "noise": float, "noise_std": float}
    _refuse_unknown(upcycle, tuple(kinds), f"upcycle of {where}")
    for key, value in upcycle.items():
        if not isinstance(value, (int, float) if kinds[key] is float else kinds[key]) or isinstance(value, bool):
            raise ConfigError(f"upcycle.{key} of {where} must be of type {kinds[key].__name__}, not {shown(value)}.")
    plan, width = plan_of(upcycle, seed=0), model.get("intermediate_size")
    if model.get("num_experts") != 1 or not isinstance(width, int) or width % plan.split:
        raise ConfigError(
            f"{where} upcycles a model that must be dense, of num_experts = 1 and an intermediate_size that is a "
            f"multiple of {plan.split}, not {shown(model.get('num_experts'))} and {shown(width)}."
        )
    return {
        "num_experts": plan.experts,
        "num_experts_per_tok": plan.top_k,
        "intermediate_size": width // plan.split,
        "norm_topk_prob": plan.form == "normalized",
    }


def _merged(base: dict[str, Any], changes: dict[str, Any], where: str) -> Tables:
    """The sections of a configuration with some of their keys changed."""
    merged: Tables = {"run": {}, "data": {}}
    for tables in (base, changes):
        for section, values in tables.items():
            if not isinstance(values, dict):
                raise ConfigError(f"{section} of {where} must be a table, not {shown(values)}.")
            merged[section] = merged.get(section, {}) | values
    if not isinstance(merged["run"].get("output"), str):
        raise ConfigError(f"{where} has no run.output; name the folder for the runs of all experiments.")
    merged["data"].setdefault("tokens_folder", os.path.join(merged["run"]["output"], "tokens"))
    return merged


def _absolute(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration's tables with the paths that are written in them made absolute."""

    def whole(value: Any) -> Any:
        return os.path.abspath(resolve_path(value, folder)) if isinstance(value, str) else value

    tables: dict[str, Any] = {n: dict(table) if isinstance(table, dict) else table for n, table in raw.items()}
    for name, key in (("run", "output"), ("tokenizer", "path"), ("data", "tokens_folder")):
        if isinstance(tables.get(name), dict) and key in tables[name]:
            tables[name][key] = whole(tables[name][key])
    data = tables.get("data")
    if isinstance(data, dict):
        for group in ("train", "valid", "measure"):
            if isinstance(data.get(group), list):
                data[group] = [_with_path(source, whole) for source in data[group]]
    return tables


def _with_path(source: Any, whole: Callable[[Any], Any]) -> Any:
    """A source of data with its path made absolute; invalid ones are left to the configuration's own checks."""
    return source | {"path": whole(source["path"])} if isinstance(source, dict) and "path" in source else source


def _toml(path: Path) -> dict[str, Any]:
    return read_toml(path, "file")


def _text(table: dict[str, Any], key: str, default: str, where: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise ConfigError(f"{key} of {where} must be a text, not {shown(value)}.")
    return value


def _refuse_unknown(table: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ConfigError(f"{where} has the unknown key {shown(unknown[0])}; known are {', '.join(known)}.")
