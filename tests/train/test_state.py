"""Resumable checkpoints: whole or absent, and exact."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from conftest import make_model
from olmoe.errors import CheckpointError, ConfigError, UserError
from olmoe.model import CausalLM
from olmoe.train import state
from olmoe.train.config import OptimizerConfig
from olmoe.train.optim import build_optimizer
from olmoe.train.state import (
    Progress,
    begin,
    check_continues,
    discard,
    latest,
    prune,
    restore,
    save_state,
    truncate_metrics,
)
from olmoe.weights import checkpoint
from sentences import refused

FINGERPRINT = {"model": {"width": 3}, "optimizer": {"eps": 1e-8, "betas": (0.9, 0.95)}, "seed": 1}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}


def trained(seed: int, steps: int = 2) -> tuple[CausalLM, torch.optim.Optimizer]:
    """A model and an optimizer with non-zero moments."""
    model = make_model(seed, **SMALL)
    optimizer = build_optimizer(model, OptimizerConfig())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, step: int = 7, seed: int = 0) -> tuple[Path, CausalLM, torch.optim.Optimizer]:
    model, optimizer = trained(seed)
    progress = Progress(step=step, tokens=step * 10, best=1.25, best_step=3)
    return save_state(folder, model, optimizer, progress, FINGERPRINT, {"note.txt": "é"}), model, optimizer


def test_everything_is_restored_bit_for_bit(tmp_path):
    path, model, optimizer = save(tmp_path)
    assert path == tmp_path / "checkpoints" / "step-0000007"
    other, other_optimizer = trained(seed=1, steps=1)
    progress = restore(path, other, other_optimizer, FINGERPRINT)
    assert progress == Progress(step=7, tokens=70, best=1.25, best_step=3)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad
    a, b = optimizer.state_dict(), other_optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for key in a["state"]:
        assert all(torch.equal(a["state"][key][name], b["state"][key][name]) for name in a["state"][key])
    # The next step is the same as well.
    for one, two in ((model, optimizer), (other, other_optimizer)):
        for p in one.parameters():
            p.grad = torch.full_like(p, 0.1)
        two.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_is_an_ordinary_model_folder(tmp_path):
    path, model, _ = save(tmp_path)
    loaded = checkpoint.load(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert (path / "note.txt").read_text(encoding="utf-8") == "é"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    assert latest(tmp_path) is None
    for name in ("step-0000009", "step-0000010", "step-12345678", "step-0000002"):  # step numbers may exceed 7 digits
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-99999999.abcd.partial").mkdir()  # left by a killed process
    (tmp_path / "checkpoints" / "step-99999999-copy").mkdir()
    assert latest(tmp_path).name == "step-12345678"


def test_pruning_keeps_the_newest_and_removes_leftovers_of_killed_processes(tmp_path):
    for name in (
        "checkpoints/step-0000001/x",
        "checkpoints/step-0000002/x",
        "checkpoints/step-0000010/x",
        "checkpoints/.step-0000011.abcd.partial/x",
        "checkpoints/notes/x",
        ".best.abcd.partial/x",
        "best/x",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    prune(tmp_path, 2)
    kept = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("x"))
    assert kept == ["best/x", "checkpoints/notes/x", "checkpoints/step-0000002/x", "checkpoints/step-0000010/x"]
    prune(tmp_path, 5)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_an_interrupt_while_pruning_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)

    def interrupt(*arguments, **options) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-0000002"]
    prune(tmp_path, 1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


# ---- starting and resuming ----


def test_a_new_run_creates_its_folder(tmp_path):
    assert begin(tmp_path / "a" / "b", resume=False) is None
    assert (tmp_path / "a" / "b").is_dir()
    assert begin(tmp_path / "a" / "b", resume=False) is None  # nothing in it yet


def test_an_existing_run_is_not_overwritten_nor_a_missing_one_created(tmp_path):
    assert "without --resume" in refused(lambda: begin(tmp_path / "none", resume=True), ConfigError)
    assert not (tmp_path / "none").exists()  # a mistyped folder leaves nothing behind
    (tmp_path / "run" / "checkpoints" / "step-0000001").mkdir(parents=True)
    assert "--resume" in refused(lambda: begin(tmp_path / "run", resume=False), ConfigError)
    assert begin(tmp_path / "run", resume=True).name == "step-0000001"
    (tmp_path / "done" / "best").mkdir(parents=True)  # someone removed its checkpoints to save space
    assert "best" in refused(lambda: begin(tmp_path / "done", resume=False), ConfigError)


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "run.output" in refused(lambda output=output: begin(output, resume=False), ConfigError)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer": {"eps": 1e-7, "betas": (0.9, 0.95)}}, "[optimizer] eps changed from 1e-08 to 1e-07"),
        ({"optimizer": {"eps": 1e-8, "betas": (0.9, 0.99)}}, "[optimizer] betas"),
        ({"model": {"width": 3, "depth": 1}}, "[model] depth changed from None to 1"),
        ({"seed": 2}, "seed changed from 1 to 2"),
    ],
)
def test_a_changed_configuration_is_refused(tmp_path, change, told):
    path, *_ = save(tmp_path)
    model, optimizer = trained(seed=1)
    before = [p.detach().clone() for p in model.parameters()]
    assert told in refused(lambda: restore(path, model, optimizer, FINGERPRINT | change), ConfigError)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_more_tokens_are_a_new_run_that_starts_from_this_one():
    path, was = Path("out/checkpoints/step-0000007"), {"schedule": {"total_tokens": 64}, "seed": 1}
    message = refused(lambda: check_continues(path, was, was | {"schedule": {"total_tokens": 128}}), ConfigError)
    assert "[schedule] total_tokens changed from 64 to 128 since out/checkpoints/step-0000007" in message
    assert "with this checkpoint as its run.initialize_from" in message


def test_files_may_be_moved_or_renamed_but_not_changed(tmp_path):
    def fingerprint(folder: str, **changes):
        source = {"path": f"{folder}/x.txt", "repeat": 1.5}
        data = {"train": [source], "valid": [], "measure": [], "tokens_folder": folder, "sequence_length": 8}
        texts = {f"{folder}-x": "abc", f"{folder}-y": 12}
        return {"data": data, "texts": texts, "measured": [f"{folder}-z"]} | changes

    model, optimizer = trained(seed=0)
    path = save_state(tmp_path, model, optimizer, Progress(step=7), fingerprint("a"), {})
    assert restore(path, model, optimizer, fingerprint("b")).step == 7
    assert state.recorded_names(path) == ["a-x", "a-y", "a-z"]
    assert state.recorded_names(None) == []
    assert state.recorded_names(tmp_path) == []

    def told(**changes):
        return refused(lambda: restore(path, model, optimizer, fingerprint("b", **changes)), ConfigError)

    assert "[texts] b-y changed from 12 to 13" in told(texts={"b-x": "abc", "b-y": 13})
    assert "[texts] b-y changed from 'abc' to 12" in told(texts={"b-y": 12, "b-x": "abc"})  # another order
    assert "from 2 to 1" in told(texts={"b-x": "abc"})
    assert "[data] train" in told(data={"train": [{"path": "a/x.txt", "repeat": 1.0}]})


def test_a_best_checkpoint_is_recovered_from_an_interrupted_replacement(tmp_path):
    save(tmp_path)
    for name, number in ((".best.11111111.old", 1), (".best.22222222.old", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(str(number))
        os.utime(tmp_path / name, (number, number))
    assert not state.has_best(tmp_path)
    begin(tmp_path, resume=True)
    assert (tmp_path / "best" / "config.json").read_text() == "2"
    assert not state.has_best(tmp_path)  # it has no weights
    prune(tmp_path, 1)
    assert (tmp_path / ".best.11111111.old").exists()  # the best checkpoint is missing, and this may have been it
    (tmp_path / "best" / "model.safetensors").touch()
    prune(tmp_path, 1)
    assert not (tmp_path / ".best.11111111.old").exists()


def test_settings_that_older_checkpoints_did_not_record_are_not_compared(tmp_path):
    path, *_ = save(tmp_path)
    assert restore(path, *trained(seed=1), FINGERPRINT | {"tokenizer": "abc"}).step == 7


def test_counters_of_another_version_are_ignored(tmp_path):
    path, *_ = save(tmp_path)
    saved = torch.load(path / state.STATE_NAME, weights_only=True)
    saved["progress"]["counts_LE"] = []  # written before 0.1.0
    torch.save(saved, path / state.STATE_NAME)
    assert restore(path, *trained(seed=1), FINGERPRINT).step == 7


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "foreign", "no progress"])
def test_a_damaged_state_is_reported_in_one_sentence(tmp_path, damage):
    path, *_ = save(tmp_path)
    file = path / state.STATE_NAME
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage in ("foreign", "no progress"):
        torch.save({"optimizer": {}} if damage == "no progress" else [1], file)
    else:
        file.write_bytes(content[: 0 if damage == "empty" else len(content) // 2])
    message = refused(lambda: restore(path, *trained(seed=1), FINGERPRINT), CheckpointError)
    assert state.STATE_NAME in message
    assert f"start again: remove {tmp_path}" in message  # it is the only one


def test_a_state_that_would_run_code_is_refused_without_torchs_advice_to_load_it(tmp_path):
    path, *_ = save(tmp_path)
    torch.save({"optimizer": print, "progress": {}, "fingerprint": "{}"}, path / state.STATE_NAME)
    message = refused(lambda: restore(path, *trained(seed=1), FINGERPRINT), CheckpointError)
    assert "(Weights only load failed);" in message


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", state.STATE_NAME])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_says_how_to_resume(tmp_path, file, damage):
    save(tmp_path, step=5)
    path, *_ = save(tmp_path, step=7)
    save(tmp_path, step=9)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if damage == "truncated":
        (path / file).write_bytes(content[: len(content) // 2])
    message = refused(lambda: restore(path, *trained(seed=1), FINGERPRINT), CheckpointError)
    assert message.endswith(f"; remove {path} to resume from step-0000005.")


# ---- writes that fail ----


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "disk is full"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "cannot be written"),
    ],
)
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failure, told):
    save(tmp_path, step=1)

    def hidden(*arguments) -> None:
        try:
            raise failure
        except OSError:
            raise RuntimeError("unexpected pos 576 vs 534") from None  # torch's own wording

    monkeypatch.setattr(torch, "save", hidden)
    assert told in refused(lambda: save(tmp_path, step=2), UserError)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


def test_a_real_file_size_limit_keeps_the_previous_checkpoint(tmp_path):
    """The weights fit within the limit; the optimizer's moments, twice as large, do not."""
    import resource

    path, *_ = save(tmp_path, step=1)
    limit = (path / "model.safetensors").stat().st_size + 1000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = refused(lambda: save(tmp_path, step=2), UserError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


def test_torchs_own_errors_are_not_hidden(tmp_path, monkeypatch):
    def broken(*arguments) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        save(tmp_path)


# ---- metrics ----


def test_records_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 2, 3)]
    path.write_text("\n".join([*lines[:2], "", "5", '{"tokens": 3}', *lines[2:], '{"step": 1, "lo']), encoding="utf-8")
    truncate_metrics(path, 2)
    assert path.read_text(encoding="utf-8").split("\n") == [*lines[:3], ""]
    path.write_bytes("\n".join([*lines[:2], '{"step": 2, "answer": "é']).encode()[:-1])
    truncate_metrics(path, 2)
    assert path.read_text(encoding="utf-8").split("\n") == [*lines[:2], ""]
    truncate_metrics(path, 0)
    assert path.read_text(encoding="utf-8") == ""
    # An answer with U+2028, which does not end a line, used to be lost; half a character, as after a full disk, raised.
    line = json.dumps({"step": 1, "answers": "a\u2028b\u0085c"}, ensure_ascii=False)
    path.write_bytes(line.encode() + b'\n{"step": 1, "answers": "\xe2\x80')
    truncate_metrics(path, 2)
    assert path.read_text(encoding="utf-8") == line + "\n"
    truncate_metrics(tmp_path / "none.jsonl", 2)
    assert not (tmp_path / "none.jsonl").exists()


def finished_run(folder):
    for name in ("checkpoints/step-0000001", "checkpoints/step-0000002", "best"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "checkpoints" / "step-0000002" / "training_state.pt").touch()
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 2}\n{"st')
    (folder / "evaluation.json").write_text("{}")
    return folder


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run = finished_run(tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "kept-aside").mkdir()
    assert "--overwrite" in refused(lambda: begin(run, resume=False), ConfigError)
    assert "one of them" in refused(lambda: begin(run, resume=True, overwrite=True), ConfigError)
    assert begin(run, resume=False, overwrite=True) is None
    assert latest(run) is not None  # deleted only once the new run is ready
    discard(run)
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*")) == [
        "checkpoints",
        "checkpoints/kept-aside",
        "notes.txt",
    ]
    discard(run)


@pytest.mark.parametrize("name", ["best/notes.txt", "checkpoints/step-0000001/adapter/x", "metrics.jsonl"])
def test_foreign_files_in_a_run_folder_are_named_and_kept(tmp_path, name):
    run = finished_run(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("not ours")
    for attempt in (lambda: begin(run, resume=False, overwrite=True), lambda: discard(run)):
        assert name.split("/x")[0] in refused(attempt, ConfigError)
    assert (run / name).read_text() == "not ours"
    assert (run / "best" / "config.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.json"])
def test_results_of_another_program_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text('{"loss": 3}\n')
    assert name in refused(lambda: begin(tmp_path, resume=False), ConfigError)
