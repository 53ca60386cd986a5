"""`olmoe upcycle`: turns a dense checkpoint into a sparse one to continue training from, and measures the loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from olmoe.config import read_object
from olmoe.errors import UserError
from olmoe.io import hub
from olmoe.model import CausalLM
from olmoe.runtime import log
from olmoe.train.data import TokenFile
from olmoe.train.evaluation import evaluate
from olmoe.weights import sample_text
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.dense import OlmoFolder
from olmoe.weights.source import WeightSource, load_model, tokenizer_of
from olmoe.weights.to_folder import to_folder
from olmoe.weights.upcycle import UpcycledSource, Upcycling

WINDOW = 512
# On which the norms of queries and keys of an OLMo are measured.
CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class Losses:
    """Nats per token on held-out text, for the dense and the sparse model, and the number of tokens."""

    before: float
    after: float
    tokens: int


def upcycle(
    dense: str | os.PathLike[str],
    target: str | os.PathLike[str],
    plan: Upcycling,
    *,
    dtype: torch.dtype = torch.bfloat16,
    text: str | os.PathLike[str] = sample_text.HELD_OUT,
    calibration: str | os.PathLike[str] = sample_text.CALIBRATION,
    tokens: int = 16384,
    overwrite: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Losses | None:
    """Write the folder `target` and measure the loss on at most `tokens` tokens of `text`; with 0 of them, None.

    `dense` is a folder or a hub id: OLMo in Hugging Face's layout, or an OLMoE with one expert. An OLMo's queries and
    keys are measured on `calibration` (see `weights.dense`). One matrix is in memory at a time while it is written; the
    losses and the calibration need whole models, in fp32. `progress(done, total)` counts bytes.

    Raises `UserError`, `CheckpointError` or `ConfigError` for what cannot be read, written or made.
    """
    source = open_dense(dense, revision=revision, local_files_only=local_files_only)
    result = UpcycledSource(source, plan)
    if isinstance(source, OlmoFolder):
        source.fit_norms(sample_text.read_ids(calibration, tokenizer_of(source))[:CALIBRATION_TOKENS], _window(source))
    if plan.form == "plain":
        log.warning(
            "The form plain does not preserve the function: outputs of the MLPs shrink, at most to %d / %d, "
            "and the loss jumps until training mends it; normalized keeps it.",
            plan.top_k,
            plan.experts,
        )
    to_folder(result, Path(os.path.expanduser(target)), dtype, progress, overwrite=overwrite)
    if not tokens:
        return None
    ids = sample_text.read_ids(text, tokenizer_of(source))[:tokens]
    if len(ids) < 2:
        raise UserError(f"The text {text} has fewer than two tokens, so nothing can be predicted; give a longer one.")
    before = _loss(source.dense_model() if isinstance(source, OlmoFolder) else load_model(source, torch.float32), ids)
    after = _loss(Checkpoint.open(Path(os.path.expanduser(target))).load(dtype=torch.float32), ids)
    return Losses(before, after, len(ids) - 1)


def open_dense(
    name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> WeightSource:
    """The dense model of a folder or a hub id. Raises `ConfigError` for other architectures."""
    folder = hub.resolve(
        name if isinstance(name, str) else Path(name), revision=revision, local_files_only=local_files_only
    )
    if read_object(folder / "config.json").get("model_type") == "olmoe":
        return Checkpoint(folder).source()
    return OlmoFolder(folder)


def _loss(model: CausalLM, ids: list[int]) -> float:
    file = TokenFile("text", "", len(ids))
    return evaluate(model, file, np.asarray(ids), min(WINDOW, model.config.max_position_embeddings)).loss


def _window(source: WeightSource) -> int:
    return min(WINDOW, source.config.max_position_embeddings)
