"""Checkpoints of a sharded run: each rank writes what it holds, in torch's DCP format, while training goes on.

`RUN/checkpoints/step-0000500/` holds `.metadata` and a shard file per rank; `config.json` and the tokenizer, so that
`olmoe convert` can make what transformers reads; and `training_state.json` with the counters. Folders appear whole or
not at all, and any number of ranks, in any split, or a single process can continue from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from olmoe.errors import UserError
from olmoe.io.atomic import atomic_folder
from olmoe.model import CausalLM
from olmoe.train.ranks import Ranks
from olmoe.train.shards import Part, local, moment_names, moments, owned, set_moments
from olmoe.train.state import SHARDED_STATE_NAME, Progress, check_continues, one_sentence, unreadable
from olmoe.weights.sharded_folder import MODEL_PREFIX, ShardedFolder, ShardFiles


def tensors_of(model: CausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run's state by the names that they have in its checkpoints."""
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = moments(optimizer, parameter)
        values[MODEL_PREFIX + name] = parameter.detach()
        values |= {f"{moment}/{name}": state[moment] for moment in moment_names(optimizer)}
    return values


def texts_of(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    fingerprint: dict[str, Any],
    extra_files: dict[str, str],
) -> dict[str, str]:
    """The small files of a checkpoint by name."""
    step = float(
        moments(optimizer, next(model.parameters()))["step"]
    )  # the optimizer's: steps that were skipped do not count
    state = {"progress": vars(progress), "fingerprint": fingerprint, "optimizer_step": step}
    return extra_files | {"config.json": model.config.to_json("float32"), SHARDED_STATE_NAME: json.dumps(state) + "\n"}


class ShardSaver:
    """Writes checkpoints of a run in the background, one at a time. Every rank makes one and calls it alike."""

    def __init__(self, ranks: Ranks) -> None:
        # Agreements in the background must not mix with those of training.
        self._ranks = replace(ranks, group=dist.new_group(backend="gloo"))
        self._main = ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._then: Callable[[], None] | None = None

    def start(self, target: Path, tensors: dict[str, Tensor], texts: dict[str, str], then: Callable[[], None]) -> None:
        """Write a checkpoint of what `tensors` hold now; `then` is done on the first rank by the `finish` that follows.

        Raises what `finish` does of the one before.
        """
        self.finish()
        snapshot = {name: _Share(value) for name, value in tensors.items()}
        self._pending, self._then = self._thread.submit(self._write, target, snapshot, texts), then

    @property
    def has_failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as this rank knows by now."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait until the last checkpoint is whole. Raises `UserError` on all ranks if it could not be written."""
        pending, then, self._pending, self._then = self._pending, self._then, None, None
        if pending is not None:
            self._main.on_all(pending.result)
        if then is not None:
            self._main.on_first(then)

    def close(self) -> None:
        """Wait for pending writes, whether or not they succeed."""
        self._thread.shutdown(wait=True)

    def _write(self, target: Path, tensors: dict[str, _Share], texts: dict[str, str]) -> None:
        with ExitStack() as stack:

            def begin() -> Path:
                temporary = stack.enter_context(atomic_folder(target))
                for name, text in texts.items():
                    (temporary / name).write_text(text, encoding="utf-8")
                return temporary

            temporary = self._ranks.on_first(begin)
            try:
                save(tensors, storage_writer=_Writer(temporary), planner=_Planner(), process_group=self._ranks.group)
            except CheckpointException as error:  # not an `Exception`, and with the tracebacks of all ranks
                raise _cause(error, target) from None


class _Writer(FileSystemWriter):
    """torch's writer, made to report errors of the file system."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """See `StorageWriter.write_data`."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides it behind an error of its own
                raise error.__context__ from error
            raise


class _Planner(DefaultSavePlanner):
    """torch's planner, to which a `_Share` is a tensor."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The part of a tensor that this rank writes."""
        share: _Share = self.state_dict[index.fqn]
        return share.own


def _cause(error: CheckpointException, target: Path) -> Exception:
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause
    reason = str(causes[0]).strip().split("\n")[0].rstrip(".") if causes else "no reason is known"
    return UserError(f"{target} was not written ({reason}); the run goes on from the checkpoint before it.")


class _Share:
    """A copy of this rank's part of a tensor, which training does not change, described as DCP expects."""

    def __init__(self, value: Tensor) -> None:
        self.own = local(value).detach().to("cpu", copy=True)
        self._part, self._shape = owned(value), value.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.own.numel() == 0:
            return []
        return [ChunkStorageMetadata(torch.Size(part.start for part in self._part), self.own.shape)]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        about = TensorProperties.create_from_tensor(self.own)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, about, self._shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


@dataclass(frozen=True)
class _Saved:
    """A tensor of a checkpoint, to be read in parts."""

    files: ShardFiles
    name: str

    def __getitem__(self, part: Part) -> Tensor:
        return self.files.read(self.name, part)


def restore_shards(
    path: Path, model: CausalLM, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]
) -> Progress:
    """`state.restore` of such a checkpoint, into a model that is sharded in any way or not at all."""
    try:
        state = json.loads((path / SHARDED_STATE_NAME).read_text(encoding="utf-8"))
        progress, was = Progress.from_saved(state["progress"]), state["fingerprint"]
        step = float(state["optimizer_step"])
    except Exception as error:  # whatever is wrong with the file
        raise unreadable(path / SHARDED_STATE_NAME, error) from None
    check_continues(path, was, fingerprint)
    with one_sentence(path):
        ShardedFolder(path).check()
        files = ShardFiles(path)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                local(parameter).copy_(_Saved(files, MODEL_PREFIX + name)[owned(parameter)])
            set_moments(
                optimizer, parameter, step, {key: _Saved(files, f"{key}/{name}") for key in moment_names(optimizer)}
            )
    return progress
