"""What a training configuration may leave out, because the checkpoint that it starts from has it. No torch.

`run.initialize_from` brings the architecture and the tokenizer: keys given in `[model]` override the checkpoint's, and
`[tokenizer]` may be left out. A resumed run uses its own checkpoint, even if the one that it started from is gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from olmoe.config import ModelConfig
from olmoe.errors import ConfigError, UserError
from olmoe.io import hub
from olmoe.tokenizer import Tokenizer
from olmoe.train.run_folder import latest

END_OF_TEXT = "<|endoftext|>"


def start_folder(start: str, path: Path) -> Path:
    """The checkpoint that `run.initialize_from` names: a folder at `path`, else whatever the hub makes of the name.

    Raises `CheckpointError` if there is none.
    """
    return hub.resolve(path if path.exists() or _looks_like_a_path(start) else start)


def check_start_stays(start: str, path: Path, output: Path) -> None:
    """Raise `ConfigError` if the checkpoint that a run starts from is among what emptying its output would delete."""
    if output.resolve() in start_folder(start, path).resolve().parents:
        raise ConfigError(
            f"run.initialize_from {start!r} lies in run.output, which --overwrite would empty; choose another output."
        )


def _looks_like_a_path(start: str) -> bool:
    return start.startswith((".", "/", "~", "$")) or "\\" in start or start.count("/") > 1


def inherit(
    raw: dict[str, Any], resolve: Callable[[str], Path], resume: bool, build: Callable[[Any], ModelConfig]
) -> dict[str, Any]:
    """The tables of a configuration with what its starting checkpoint adds; `build` makes a model of a table.

    Raises `ConfigError` or `CheckpointError` if something is missing and there is no checkpoint that has it.
    """
    run = raw.get("run")
    start = run.get("initialize_from") if isinstance(run, dict) else None
    if not isinstance(run, dict) or not isinstance(start, str) or not isinstance(raw.get("model", {}), dict):
        return raw
    complete = "model" in raw and "tokenizer" in raw
    try:
        begun = latest(resolve(run["output"])) if resume and isinstance(run.get("output"), str) else None
        folder = begun or start_folder(start, resolve(start))
        model = ModelConfig.from_file(folder / "config.json")
        if written := raw.get("model"):
            built = build(written)
            model = dataclasses.replace(model, **{key: getattr(built, key) for key in written})
    except UserError:
        if complete:
            return raw  # the run reports what is wrong with the checkpoint if it needs it
        raise
    tokenizer = raw.get("tokenizer", {})
    if isinstance(tokenizer, dict):
        tokenizer = {"path": str((folder / "tokenizer.json").absolute())} | tokenizer
    return raw | {"model": model, "tokenizer": tokenizer}


def derive_eos(path: Path, model: ModelConfig) -> ModelConfig:
    """`model` with the id that ends a text in the tokenizer at `path`, for a configuration that does not name it.

    Raises `ConfigError` if the tokenizer has no such token.
    """
    whole = path.name == "tokenizer.json"
    tokenizer = Tokenizer.from_folder(path.parent) if whole else Tokenizer.from_file(path)
    named = tokenizer.special_tokens().get("eos_token")
    if named is None and all(0 <= i < tokenizer.vocab_size for i in model.eos_token_ids or (-1,)):
        return model  # OLMoE's own id, in OLMoE's tokenizer, whatever it is called there
    found = tokenizer.token_id(named or END_OF_TEXT)
    if found is None:
        raise ConfigError(
            f"{path} has no token {named or END_OF_TEXT}; set model.eos_token_id to what ends a document."
        )
    return dataclasses.replace(model, eos_token_id=found)
