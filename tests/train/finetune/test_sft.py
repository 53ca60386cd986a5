"""Fine-tuning on chats: its loss, what it writes, and exact resumption."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import make_model
from finetuning_runs import interrupt, run, write_run
from olmoe.engine.llm import LLM
from olmoe.errors import ConfigError
from olmoe.model import causal_attend
from olmoe.model.router_losses import load_balancing
from olmoe.train.config import RegularizationConfig
from olmoe.train.document_mask import isolated_attend
from olmoe.train.finetune import loop
from olmoe.train.finetune.config import SFTConfig, load_config
from olmoe.train.finetune.masks import IGNORE
from olmoe.train.finetune.packing import Batch
from olmoe.train.finetune.sft import ChatTask
from olmoe.train.finetune.start import open_start
from olmoe.train.recompute import wrap
from packed_folders import packed_folder
from sentences import refused
from training_runs import assert_same_run, at_step, copy_of, files, fixed, read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_file) -> Path:
    """The output of an uninterrupted run, to compare others with."""
    return run(write_run(tmp_path_factory.mktemp("finished"), tokenizer_file))


def test_a_run_writes_an_ordinary_checkpoint(finished):
    assert files(finished) == ["best", "checkpoints", "evaluation.json", "metrics.jsonl"]
    assert "chat_template.jinja" in files(finished / "best")
    llm = LLM(finished / "best")
    chat = [{"role": "user", "content": "a ball "}]
    assert llm.chat(chat, show_progress=False)[0].text == "The ball."
    assert "generation %}" in llm.tokenizer.chat_template


def test_the_loss_falls_and_answers_are_logged(finished):
    records = read_metrics(finished)
    held_out = [next(iter(r["held_out_loss"].values())) for r in records if "held_out_loss" in r]
    assert held_out[0] > 5
    assert held_out[-1] < 1
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert all(r["trained_tokens"] < r["step_tokens"] for r in steps)
    answers = [r["answers"] for r in records if "answers" in r]
    assert answers[-1][0]["prompt"].endswith("<|user|>\na ball \n<|assistant|>\n")
    assert len(answers[-1][0]["answer"]) > 1


def test_every_trained_token_of_a_step_has_equal_weight(tmp_path, tokenizer_file):
    """Gradients of packed microbatches equal those of single samples, summed and divided once."""
    path = write_run(tmp_path, tokenizer_file, batch={"sequences": 2, "accumulation": 3})
    config = load_config(path, SFTConfig)
    task = ChatTask(config, open_start(config), torch.device("cpu"))
    model, other = (make_model(max_position_embeddings=256).train() for _ in range(2))
    for one in (model, other):
        one.requires_grad_(True)
    values = task.accumulate(model, 0)
    numbers = [number for batch in task.plan.microbatches(0) for number in batch]
    assert len(numbers) > 6
    summed, trained = torch.zeros(()), 0
    for example in (task.examples[number] for number in numbers):
        ids, labels = torch.from_numpy(example.inputs)[None], torch.from_numpy(example.labels)
        hidden = other(ids, torch.arange(ids.shape[1])[None], causal_attend).hidden[0]
        summed = summed + F.cross_entropy(other.logits(hidden), labels, ignore_index=IGNORE, reduction="sum")
        trained += example.trained
    (summed / trained).backward()
    assert values["loss"] == pytest.approx(float(summed.detach()) / trained, rel=1e-5)
    assert values["trained_tokens"] == trained
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_summed_loss_gives_tokens_of_all_steps_equal_weight(tmp_path, tokenizer_file):
    """Like OLMoE's `--reduce_loss sum` up to a constant; metrics still report nats per token."""
    found = {}
    for reduce in ("mean", "sum"):
        path = write_run(tmp_path, tokenizer_file, loss={"reduce": reduce}, batch={"sequences": 2, "accumulation": 2})
        config = load_config(path, SFTConfig)
        task = ChatTask(config, open_start(config), torch.device("cpu"))
        assert ("reduce" in config.fingerprint()["loss"]) == (reduce == "sum")  # runs older than the setting resume
        steps = []
        for step in range(task.plan.steps):
            model = make_model(max_position_embeddings=256).train().requires_grad_(True)
            steps.append((task.accumulate(model, step), model.lm_head.weight.grad))
        found[reduce] = steps
    trained = [values["trained_tokens"] for values, _ in found["mean"]]
    assert trained[-1] < trained[0]  # the last step has fewer rows
    mean = sum(trained) / len(trained)
    for (one, grad), (other, summed), count in zip(found["mean"], found["sum"], trained, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        torch.testing.assert_close(summed, grad * (count / mean), rtol=1e-5, atol=1e-8)


def test_auxiliary_losses_are_off_unless_they_are_asked_for(tmp_path, tokenizer_file):
    gates = []
    for weight in (0.0, 0.5):
        config = load_config(write_run(tmp_path, tokenizer_file, loss={"load_balancing": weight}), SFTConfig)
        task = ChatTask(config, open_start(config), torch.device("cpu"))
        model = make_model(max_position_embeddings=256).train().requires_grad_(True)
        task.accumulate(model, 0)
        gates.append(model.model.layers[0].mlp.gate.weight.grad)
    model.zero_grad()
    for numbers in task.plan.microbatches(0):
        batch = Batch.of([task.examples[number] for number in numbers])
        routers = model(batch.ids, batch.positions, isolated_attend(batch.lengths)).routers
        (0.5 * load_balancing(routers) / 2).backward()
    torch.testing.assert_close(gates[1] - gates[0], model.model.layers[0].mlp.gate.weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_continues_bit_for_bit(finished, tmp_path, monkeypatch, number):
    folder = copy_of(finished, tmp_path)
    interrupt(monkeypatch, folder / "run.toml", number=number, step=5)
    assert_same_run(run(folder / "run.toml", resume=True), finished)


def test_a_killed_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    """Steps after the last checkpoint are repeated."""

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    folder = copy_of(finished, tmp_path)
    with monkeypatch.context() as patched:
        at_step(patched, loop, 9, kill)
        with pytest.raises(Killed):
            run(folder / "run.toml")
    assert files(folder / "out" / "checkpoints") == ["step-0000005"]
    assert_same_run(run(folder / "run.toml", resume=True), finished)


def test_recomputing_changes_nothing(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text("recompute = true\n" + text, encoding="utf-8")
    output = run(folder / "run.toml")
    assert list(map(fixed, read_metrics(output))) == list(map(fixed, read_metrics(finished)))


def test_dropout_of_a_step_is_reproducible(tmp_path, tokenizer_file):
    """It differs by step and microbatch but not when a step is resumed or recomputed; it is off by default."""
    path = write_run(tmp_path, tokenizer_file, regularization={"residual_dropout": 0.2})
    losses = []
    for share, recompute in ((0.2, False), (0.2, True), (0.0, False)):
        config = load_config(path, SFTConfig)
        config = dataclasses.replace(config, regularization=RegularizationConfig(residual_dropout=share))
        task = ChatTask(config, open_start(config), torch.device("cpu"))
        task.plan.rows = task.plan.rows[:2] * 2  # two steps on the same rows
        model = make_model(max_position_embeddings=256).train().requires_grad_(True)
        if recompute:
            for layer in model.model.layers:
                wrap(layer, "full")
        first = task.accumulate(model, 0)["loss"]
        gradient = model.model.layers[0].mlp.gate.weight.grad
        losses.append((first, task.accumulate(model, 1)["loss"], gradient.clone()))
    (first, second, gradient), again, without = losses
    assert first == again[0]
    assert torch.equal(gradient, again[2])
    assert first != second
    assert without[0] == without[1] != first


def test_a_run_with_dropout_continues_bit_for_bit(tmp_path, tokenizer_file, monkeypatch):
    changes: dict[str, dict[str, object]] = {"regularization": {"residual_dropout": 0.1}, "schedule": {"epochs": 2}}
    whole = run(write_run(tmp_path / "whole", tokenizer_file, **changes))
    path = copy_of(whole, tmp_path / "parts") / "run.toml"
    interrupt(monkeypatch, path, number=signal.SIGINT, step=5)
    assert_same_run(run(path, resume=True), whole)


def test_a_run_with_changed_settings_is_not_resumed(finished, tmp_path):
    folder = copy_of(finished, tmp_path)
    output = run(folder / "run.toml")
    (folder / "train.jsonl").write_text(
        (folder / "train.jsonl").read_text(encoding="utf-8").replace("park", "Park"), encoding="utf-8"
    )
    message = refused(lambda: run(folder / "run.toml", resume=True), ConfigError)
    assert "[texts]" in message
    assert files(output) == files(finished)


@pytest.mark.parametrize(
    ("section", "values"), [("regularization", {"residual_dropout": 0.1}), ("adapter", {"rank": 2})]
)
def test_removing_a_section_prevents_resuming(tmp_path, tokenizer_file, monkeypatch, section, values):
    path = write_run(tmp_path, tokenizer_file, **{section: values})
    interrupt(monkeypatch, path, number=signal.SIGINT, step=2)
    write_run(tmp_path, tokenizer_file)
    assert f"[{section}] was removed since" in refused(lambda: run(path, resume=True), ConfigError)


def test_full_fine_tuning_of_packed_weights_is_refused(tmp_path, tokenizer_file):
    packed_folder(tmp_path / "start", "int4", tokenizer_file, max_position_embeddings=256)
    path = write_run(tmp_path, tokenizer_file)
    assert "[adapter]" in refused(lambda: run(path), ConfigError)
