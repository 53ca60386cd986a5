"""Checkpoints of several ranks: resumed by any other number of ranks or by one process, and back."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from olmoe import LLM
from olmoe.cli.main import main
from olmoe.errors import CheckpointError, UserError
from olmoe.model import causal_attend
from olmoe.train import sharded_state, state
from olmoe.train.config import load_config
from olmoe.train.loop import train
from olmoe.train.ranks import join_ranks
from olmoe.train.run_folder import run_lock
from olmoe.weights import checkpoint
from olmoe.weights.sharded_folder import ShardFiles
from rank_processes import ends_on_ranks, error_of, on_ranks, train_run, train_until
from sentences import refused
from training_runs import assert_close_records, assert_same_run, fixed, read_metrics, write_run

STEPS = 9
SHORT = {
    "batch": {"sequences": 4, "accumulation": 2},
    "parallel": {"balance": "all"},  # so that results do not depend on the number of ranks
    "schedule": {"total_tokens": STEPS * 8 * 16, "warmup_tokens": 32},
    "evaluation": {"every_steps": 4, "windows": 5},
    "checkpoint": {"every_steps": 3, "keep": 9},
}


def write(folder: Path, tokenizer: Path, **split) -> Path:
    """Write the configuration of the run in `folder` for another split of the ranks."""
    changes = SHORT | {"parallel": SHORT["parallel"] | split}
    return write_run(folder / "run", tokenizer, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokenizer_file) -> Path:
    """The output of one uninterrupted process."""
    path = write(tmp_path_factory.mktemp("alone"), tokenizer_file)
    train_run(path)
    return path.parent / "out"


@pytest.fixture(scope="module")
def together(tmp_path_factory, tokenizer_file) -> Path:
    """The output of two uninterrupted ranks."""
    path = write(tmp_path_factory.mktemp("together"), tokenizer_file, data=2)
    on_ranks(2, train_run, path)
    return path.parent / "out"


def assert_equal(output: Path, reference: Path, tolerance: float) -> None:
    assert_close_records(read_metrics(output), read_metrics(reference), tolerance)
    for a, b in zip(*(checkpoint.load(o / "best").parameters() for o in (output, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def files_of(folder: Path) -> dict[str, torch.Tensor]:
    found = ShardFiles(folder)
    return {name: found.read(name) for name in found.shapes}


def test_a_run_resumes_on_two_ranks_then_one_then_four_then_other_splits(tmp_path, tokenizer_file, alone):
    path = write(tmp_path, tokenizer_file, data=2)
    # SIGTERM to any single rank is enough.
    assert on_ranks(2, train_until, path, 2, 1, signal.SIGTERM) == ["step-0000002"] * 2
    path = write(tmp_path, tokenizer_file)
    assert train_until(path, 4, 0, signal.SIGINT, True) == "step-0000004"
    path = write(tmp_path, tokenizer_file, data=4)
    assert on_ranks(4, train_until, path, 5, 3, signal.SIGTERM, True) == ["step-0000005"] * 4
    path = write(tmp_path, tokenizer_file, expert=2)
    assert on_ranks(2, train_until, path, 7, 0, signal.SIGTERM, True) == ["step-0000007"] * 2
    path = write(tmp_path, tokenizer_file, data=2, expert=2)
    on_ranks(4, train_run, path, True)
    assert_equal(path.parent / "out", alone, 3e-6)
    assert sorted(p.name for p in (path.parent / "out").rglob(".*") if p.name != ".metadata") == []


def test_the_same_ranks_resume_bit_for_bit(tmp_path, tokenizer_file, together):
    path = write(tmp_path, tokenizer_file, data=2)
    on_ranks(2, train_until, path, 5, 0, signal.SIGINT)
    on_ranks(2, train_run, path, True)
    output = path.parent / "out"
    assert [fixed(r) for r in read_metrics(output)] == [fixed(r) for r in read_metrics(together)]
    ours, theirs = (files_of(o / "checkpoints" / "step-0000009") for o in (output, together))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_number_of_ranks_reads_the_state_bit_for_bit(tmp_path, tokenizer_file, together):
    """A step with a learning rate too small to change anything writes back what was read."""
    saved = files_of(together / "checkpoints" / "step-0000009")
    for ranks, split in ((1, {}), (4, {"data": 2, "expert": 2})):
        folder = tmp_path / str(ranks)
        shutil.copytree(together.parent, folder / "run")
        shutil.rmtree(folder / "run" / "out" / "best")
        path = write(folder, tokenizer_file, **split)
        on_ranks(ranks, train_run, path, True) if ranks > 1 else train_run(path, True)  # only exports the final state
        best = checkpoint.load(folder / "run" / "out" / "best")
        assert all(torch.equal(saved[f"model/{name}"], value) for name, value in best.named_parameters())


def test_ranks_resume_a_checkpoint_of_one_process(tmp_path, tokenizer_file, alone):
    path = write(tmp_path, tokenizer_file)
    assert train_until(path, 5, 0, signal.SIGINT) == "step-0000005"
    assert (path.parent / "out" / "checkpoints" / "step-0000005" / state.STATE_NAME).is_file()
    path = write(tmp_path, tokenizer_file, expert=2)
    on_ranks(2, train_run, path, True)
    assert_equal(path.parent / "out", alone, 3e-6)


def test_one_process_still_resumes_bit_for_bit(tmp_path, tokenizer_file, alone):
    path = write(tmp_path, tokenizer_file)
    train_until(path, 5, 0, signal.SIGINT)
    shutil.rmtree(path.parent / "out" / "checkpoints" / "step-0000005")
    train_run(path, True)
    reference = shutil.copytree(alone, tmp_path / "alone")
    for output in (reference, path.parent / "out"):
        for folder in sorted((output / "checkpoints").iterdir())[:-1]:
            shutil.rmtree(folder)
    assert_same_run(path.parent / "out", reference)


def test_training_during_a_checkpoint_does_not_change_it(tmp_path, monkeypatch):
    begun, released = threading.Event(), threading.Event()
    original = sharded_state._Writer.write_data

    def write_data(self, plan, planner):
        begun.set()
        assert released.wait(60)
        return original(self, plan, planner)

    monkeypatch.setattr(sharded_state._Writer, "write_data", write_data)
    values, done = {"model/x": torch.arange(6.0).view(2, 3)}, []
    with join_ranks("cpu", group_of_one=True) as ranks:
        saver = sharded_state.ShardSaver(ranks)
        saver.start(tmp_path / "step-1", values, {"note.txt": "é"}, then=lambda: done.append(True))
        assert begun.wait(60)
        values["model/x"].zero_()  # the next step
        assert not (tmp_path / "step-1").exists()
        assert not saver.has_failed
        released.set()
        saver.finish()
        saver.close()
    assert done == [True]
    assert torch.equal(files_of(tmp_path / "step-1")["model/x"], torch.arange(6.0).view(2, 3))
    assert (tmp_path / "step-1" / "note.txt").read_text(encoding="utf-8") == "é"


# ---- what others read ----


def test_transformers_and_the_engine_read_the_export_of_ranks(tmp_path, together):
    best = together / "best"
    theirs, info = AutoModelForCausalLM.from_pretrained(best, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        model = checkpoint.load(best)
        ours = model.logits(model(ids, torch.arange(12).unsqueeze(0), causal_attend).hidden)
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    saved = together / "checkpoints" / "step-0000009"
    assert main(["convert", str(saved), str(tmp_path / "converted"), "--type", "f32", "--quiet"]) == 0
    a, b = checkpoint.load(tmp_path / "converted"), checkpoint.load(saved)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    texts = [LLM(str(where)).generate("the girl")[0].text for where in (saved, tmp_path / "converted")]
    assert texts[0] == texts[1] != ""
    assert main(["average", str(saved), str(best), str(tmp_path / "mean"), "--quiet"]) == 0


# ---- what is damaged ----


@pytest.fixture
def damaged(tmp_path, tokenizer_file, together) -> Path:
    """A copy of the two ranks' run, to be damaged and resumed by any number of processes."""
    shutil.copytree(together.parent, tmp_path / "run")
    write(tmp_path, tokenizer_file)
    return tmp_path / "run" / "out" / "checkpoints" / "step-0000009"


@pytest.mark.parametrize(
    ("name", "keep", "told"),
    [
        ("__1_0.distcp", None, "The shard __1_0.distcp is missing"),
        ("__1_0.distcp", 0.5, "is cut short"),
        (".metadata", 0.5, "is damaged or foreign"),
        ("config.json", 0.5, "config.json"),
        ("training_state.json", None, "training_state.json cannot be read"),
        ("training_state.json", 0.5, "training_state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_reported_in_one_sentence_on_every_rank(damaged, name, keep, told):
    content = (damaged / name).read_bytes()
    (damaged / name).unlink()
    if keep is not None:
        (damaged / name).write_bytes(content[: int(len(content) * keep)])
    config = load_config(damaged.parent.parent.parent / "run.toml", resume=True)
    message = refused(lambda: train(config, resume=True, show_progress=False), CheckpointError)
    assert told in message
    assert f"remove {damaged} to resume from step-0000006" in message


def test_damaged_values_and_foreign_pickles_are_refused(damaged):
    file = damaged / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert "is damaged" in refused(lambda: files_of(damaged), CheckpointError)

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    (damaged / ".metadata").write_bytes(pickle.dumps(Evil()))
    assert "it asks for posix.system" in refused(lambda: ShardFiles(damaged), CheckpointError)


def test_changed_data_is_refused_on_all_ranks(tmp_path, tokenizer_file, together):
    shutil.copytree(together.parent, tmp_path / "run")
    path = write(tmp_path, tokenizer_file, data=2)
    (path.parent / "train.txt").write_text("the girl saw a red ball\n" * 200, encoding="utf-8")
    found = on_ranks(2, error_of, train_run, path, True)
    assert [kind for kind, _ in found].count("ToldByAnother") == 1
    assert all("run-train changed from" in text for _, text in found)


def full_disk(path: Path) -> None:
    """Train while rank 1's disk fills up."""
    original = sharded_state._Writer.write_data

    def write_data(self, plan, planner):
        if os.environ["RANK"] == "1" and "step-0000006" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, plan, planner)

    sharded_state._Writer.write_data = write_data
    train_run(path)


def test_a_full_disk_ends_all_ranks_and_keeps_the_previous_checkpoint(tmp_path, tokenizer_file, together):
    path = write(tmp_path, tokenizer_file, data=2)
    found = on_ranks(2, error_of, full_disk, path)
    assert sorted(kind for kind, _ in found) == ["ToldByAnother", "UserError"]
    assert all("The disk is full" in text for _, text in found)
    output = path.parent / "out"
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-0000003"]
    on_ranks(2, train_run, path, True)
    assert_equal(output, together, 0)


def while_writing(path: Path, rank: int, number: int) -> None:
    """Train, and send a rank a signal while it writes the second checkpoint in the background."""
    original = sharded_state._Writer.write_data

    def write_data(self, plan, planner):
        if os.environ["RANK"] == str(rank) and "step-0000006" in str(self.path):
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # training goes on
        return original(self, plan, planner)

    sharded_state._Writer.write_data = write_data
    train_run(path)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_while_writing_keeps_the_previous_checkpoint(tmp_path, tokenizer_file, together, rank):
    path = write(tmp_path, tokenizer_file, data=2)
    ends = ends_on_ranks(tmp_path, 2, while_writing, path, rank, signal.SIGKILL)
    assert ends[rank] == "killed"
    assert ends[1 - rank] == "RankLostError"
    output = path.parent / "out"
    assert [p.name for p in state.checkpoints(output)] == ["step-0000003"]
    on_ranks(2, train_run, path, True)
    assert_equal(output, together, 0)
    assert list(output.rglob("*.partial")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_a_checkpoint_is_written_saves_another(tmp_path, tokenizer_file, together, rank):
    path = write(tmp_path, tokenizer_file, data=2)
    assert ends_on_ranks(tmp_path, 2, while_writing, path, rank, signal.SIGTERM) == ["Interrupted"] * 2
    output = path.parent / "out"
    steps = [p.name for p in state.checkpoints(output)]
    assert steps[:2] == ["step-0000003", "step-0000006"]
    on_ranks(2, train_run, path, True)
    assert_equal(output, together, 0)


def test_a_second_run_into_the_folder_is_refused_on_all_ranks(tmp_path, tokenizer_file):
    path = write(tmp_path, tokenizer_file, data=2)
    (path.parent / "out").mkdir()
    with run_lock(path.parent / "out"):
        found = on_ranks(2, error_of, train_run, path)
    assert sorted(kind for kind, _ in found) == ["ConfigError", "ToldByAnother"]
    assert all(f"Another olmoe train (process {os.getpid()}) is writing into" in text for _, text in found)


def test_overwriting_removes_the_files_of_ranks(tmp_path, together):
    run = shutil.copytree(together.parent, tmp_path / "run") / "out"
    state.begin(run, resume=False, overwrite=True)
    (run / "checkpoints" / "step-0000009" / "notes.distcp").touch()
    assert "notes.distcp" in refused(lambda: state.begin(run, resume=False, overwrite=True), UserError)
    (run / "checkpoints" / "step-0000009" / "notes.distcp").unlink()
    state.discard(run)
    assert list(run.rglob("*.distcp")) == []


def test_the_batch_of_a_step_may_be_divided_differently_but_not_changed(tmp_path, tokenizer_file, together):
    shutil.copytree(together.parent, tmp_path / "run")
    for sequences, accumulation, told in ((2, 4, None), (2, 2, "[batch] sequences x accumulation changed from 8 to 4")):
        batch = {"sequences": sequences, "accumulation": accumulation}
        path = write_run(tmp_path / "run", tokenizer_file, **(SHORT | {"batch": batch}))
        kind = error_of(train_run, path, True)
        assert kind is None if told is None else told in kind[1]
