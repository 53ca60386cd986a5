"""Preference training: the loss of a step, the reference, and exact resumption."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_model
from finetuning_runs import interrupt, preference, run, write_run
from olmoe.errors import CheckpointError
from olmoe.model import causal_attend
from olmoe.train.finetune.chats import Completion, Conversation
from olmoe.train.finetune.config import PreferenceConfig, load_config
from olmoe.train.finetune.dpo import PreferenceTask, others, with_answer_of
from olmoe.train.finetune.start import open_start
from sentences import refused
from training_runs import assert_same_run, copy_of, files, read_metrics

SMALL = {"batch": {"sequences": 2, "accumulation": 2}, "schedule": {"epochs": 4}, "optimizer": {"learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_file) -> Path:
    return run(write_run(tmp_path_factory.mktemp("finished"), tokenizer_file, row=preference, **SMALL), "dpo")


def test_chosen_answers_become_more_likely_than_rejected_ones(finished):
    records = read_metrics(finished)
    assert records[0]["held_out_loss"] == {next(iter(records[0]["held_out_loss"])): 0.69315}
    assert records[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    held_out = [r for r in records if "held_out_accuracy" in r]
    assert list(held_out[-1]["held_out_accuracy"].values()) == [1.0]
    assert next(iter(held_out[-1]["held_out_loss"].values())) < 0.5
    assert files(finished) == ["best", "checkpoints", "evaluation.json", "metrics.jsonl", "reference.npy"]


@pytest.mark.parametrize(("kind", "scale"), [("dpo", 1.2), ("dpo_norm", 1.2), ("kto", 1.2), ("kto", 0.8)])
def test_a_step_matches_one_written_out_by_hand(tmp_path, tokenizer_file, kind, scale):
    """Log-probabilities one by one, from full logits; the reference is the model that the run starts from.

    With a sharper head KTO's z would be below 0, and with a flatter one it is above though not for every answer.
    """
    loss = {"kind": kind} | ({"undesirable_weight": 0.25} if kind == "kto" else {})
    path = write_run(tmp_path, tokenizer_file, row=preference, loss=loss, **SMALL)
    config = load_config(path, PreferenceConfig)
    task = PreferenceTask(config, open_start(config), torch.device("cpu"))
    reference, model, other = (make_model(max_position_embeddings=256) for _ in range(3))
    task.prepare(reference, tmp_path, False, False)
    for changed in (model, other):
        changed.requires_grad_(True)
        with torch.no_grad():
            head = changed.lm_head.weight.mul_(scale)
            head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)), alpha=0.07 * (scale < 1))

    def log_prob(net, number):
        example = task.examples[number]
        ids, labels = torch.from_numpy(example.inputs)[None], torch.from_numpy(example.labels)
        scores = net.logits(net(ids, torch.arange(ids.shape[1])[None], causal_attend).hidden[0]).log_softmax(-1)
        each = torch.stack([scores[t, label] for t, label in enumerate(labels.tolist()) if label != -100])
        return each.mean() if kind == "dpo_norm" else each.sum()

    def moved(number):
        return log_prob(other, number) - log_prob(reference, number).detach()

    units = [unit for batch in task.plan.microbatches(0) for unit in batch]
    assert len(units) == 4
    if kind == "kto":
        each = torch.stack([moved(2 * unit + 1) for unit in units]).detach()
        assert float(each.min()) < 0
        assert (float(each.mean()) > 0) == (scale < 1)
        z = each.mean().clamp(min=0)
        signs = [1.0 if task._desirable[unit] else -1.0 for unit in units]
        assert set(task._desirable) == {True, False}
        losses = [1 - torch.sigmoid(s * 0.1 * (moved(2 * u) - z)) for s, u in zip(signs, units, strict=True)]
        losses = [loss * (1.0 if sign > 0 else 0.25) for sign, loss in zip(signs, losses, strict=True)]
    else:
        beta = 5.0 if kind == "dpo_norm" else 0.1
        losses = [-torch.log(torch.sigmoid(beta * (moved(2 * unit) - moved(2 * unit + 1)))) for unit in units]
    expected = torch.stack(losses).mean()
    expected.backward()
    values = task.accumulate(model, 0)
    assert values["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    for (name, a), b in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-2, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_interrupted_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    """With the reference log-probabilities computed before the first step."""
    folder = copy_of(finished, tmp_path)
    interrupt(monkeypatch, folder / "run.toml", "dpo", number=signal.SIGTERM, step=7)
    reference = (folder / "out" / "reference.npy").read_bytes()
    np.save(folder / "out" / "reference.npy", np.zeros(3, np.float32))
    assert "is of other samples" in refused(lambda: run(folder / "run.toml", "dpo", resume=True), CheckpointError)
    (folder / "out" / "reference.npy").write_bytes(b"")  # was a traceback
    assert "cannot be read" in refused(lambda: run(folder / "run.toml", "dpo", resume=True), CheckpointError)
    (folder / "out" / "reference.npy").unlink()  # recomputed from the weights that the run started from
    assert_same_run(run(folder / "run.toml", "dpo", resume=True), finished)
    assert (folder / "out" / "reference.npy").read_bytes() == reference


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_adapters_learn_preferences(tmp_path, tokenizer_file, kind):
    changes = SMALL | {"optimizer": {"learning_rate": 1e-2, "kind": "rmsprop" if kind == "kto" else "adamw"}}
    path = write_run(
        tmp_path, tokenizer_file, row=preference, loss={"kind": kind}, adapter={"rank": 2, "pack": "int8"}, **changes
    )
    output = run(path, "dpo")
    assert "adapter_model.safetensors" in files(output / "best")
    held_out = [r["held_out_loss"] for r in read_metrics(output) if "held_out_loss" in r]
    assert next(iter(held_out[-1].values())) < next(iter(held_out[0].values())) - 0.05


def said(prompt: str, answer: str) -> Conversation:
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], (False, True))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abc", [2, 0, 1]),
        ("aabbcc", [4, 5, 0, 1, 2, 3]),  # pairs: the chosen answers, and the rejected ones of the previous pair
        ("abba", [1, 0, 0, 1]),  # the last prompt repeats the first
        ("abca", [2, 0, 1, 2]),
        ("aaab", [3, 3, 3, 0]),
        ("aa", [-1, 0]),  # there is no other prompt
        ("a", [-1]),
    ],
)
def test_kto_estimates_its_baseline_on_answers_to_other_prompts(prompts, expected):
    """As in arXiv 2402.01306; neighbours that share a prompt once got each other's answers."""
    for kind in (said, Completion):
        samples = [kind(prompt, str(i)) for i, prompt in enumerate(prompts)]
        assert others(samples) == expected
        if len(set(prompts)) > 1:
            assert all(prompts[i] != prompts[other] for i, other in enumerate(expected))


def test_a_cached_reference_of_paired_answers_is_recomputed(tmp_path, tokenizer_file, monkeypatch):
    """For KTO runs started when both answers of a pair were still matched with the same prompt."""
    path = write_run(tmp_path, tokenizer_file, row=preference, loss={"kind": "kto"}, **SMALL)
    interrupt(monkeypatch, path, "dpo", number=signal.SIGTERM, step=2)
    file = tmp_path / "out" / "reference.npy"
    reference = np.load(file)
    assert reference.shape == (48, 2)
    np.save(file, np.zeros(96, np.float32))
    run(path, "dpo", resume=True)
    assert (np.load(file) == reference).all()


def test_the_answer_of_a_sample_can_be_replaced_by_anothers():
    one = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], (False, True))
    assert with_answer_of(one, Completion("x", "y")).messages[-1] == {"role": "assistant", "content": "y"}
    assert with_answer_of(Completion("x", "y"), one) == Completion("x", "b")
