"""Skipped steps: which ones, from when on, and how many in a row."""

from __future__ import annotations

import math
import signal

import numpy as np
import pytest
import torch

from olmoe.errors import ConfigError
from olmoe.train import loop
from olmoe.train.config import SkipConfig
from olmoe.train.skipping import StepFilter
from rank_processes import train_run, train_until
from sentences import refused
from training_runs import assert_same_run, read_metrics, write_run

CONFIG = SkipConfig(sigmas=6.0, window=8, limit=2)


def after(steps: int) -> StepFilter:
    """A filter that has seen losses with mean 2 and deviation 0.1, and norms with mean 1 and deviation 0.1."""
    made = StepFilter(CONFIG, [])
    for step in range(steps):
        sign = 1 if step % 2 else -1
        assert made.admits(2 + 0.1 * sign, 1 + 0.1 * sign, step + 1)
    return made


@pytest.mark.parametrize(
    ("loss", "norm", "admitted"),
    [
        (2.59, 1.0, True),
        (2.61, 1.0, False),
        (2.0, 1.59, True),
        (2.0, 1.61, False),
        (0.0, 0.0, True),  # a falling loss is no outlier
        (math.nan, 1.0, False),
        (2.0, math.inf, False),
        (2.0, math.nan, False),
    ],
)
def test_outliers_beyond_six_sigma_and_nonfinite_values_are_skipped(loss, norm, admitted):
    assert after(8).admits(loss, norm, 9) is admitted


def test_nothing_is_skipped_before_half_a_window_is_filled():
    assert after(3).admits(100.0, math.nan, 4)  # a run that diverges from the start is the caller's to end
    assert not after(4).admits(100.0, 1.0, 5)


def test_skipped_steps_stay_out_of_the_window_and_it_moves_on():
    made = after(8)
    assert not made.admits(100.0, 1.0, 9)
    assert not made.admits(100.0, 1.0, 10)
    assert made.admits(2.0, 1.0, 11)
    assert len(made.recent) == 8
    assert made.recent[-1] == [2.0, 1.0]
    for step in range(12, 20):
        made.admits(2.0, 1.0, step)
    assert made.recent == [[2.0, 1.0]] * 8


def test_too_many_in_a_row_end_the_run():
    made = after(8)
    assert not made.admits(100.0, 1.0, 9)
    assert not made.admits(math.nan, 1.0, 10)
    message = refused(lambda: made.admits(math.nan, math.inf, 11), ConfigError)
    assert "3 steps in a row had to be skipped, up to step 11" in message
    assert "skip.limit" in message


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 2.7182818, 1e-30, 0.0])
def test_steps_that_are_all_alike_are_taken(value):
    """The mean of 81 times 0.1 is 0.09999999999999999, of which 0.1 is no outlier."""
    made = StepFilter(SkipConfig(window=100), [])
    assert all(made.admits(value, value, step) for step in range(1, 201))
    assert not made.admits(value + 0.01, value, 201)  # without any deviation, what differs stands out


@pytest.mark.parametrize("resumed", [False, True])
def test_decisions_are_those_of_numpy(resumed):
    random, made, taken, skipped = np.random.default_rng(0), StepFilter(SkipConfig(limit=99), []), [], 0
    for step in range(1, 1001):
        loss, norm = random.normal(3, 0.05), abs(random.normal(1, 0.2))
        if random.random() < 0.04:
            loss += random.choice([0.1, 0.5, np.nan, np.inf])
            norm *= random.choice([0.1, 2, 3, np.nan])
        last = np.array(taken[-128:])
        known = len(last) >= 64
        wanted = not known or bool(((loss, norm) <= last.mean(0) + 6 * last.std(0)).all())
        if resumed and step % 100 == 50:
            made = StepFilter(SkipConfig(limit=99), [list(pair) for pair in made.recent])
        assert made.admits(loss, norm, step) is wanted, step
        skipped += not wanted
        if wanted and np.isfinite([loss, norm]).all():
            taken.append((loss, norm))
    assert 10 < skipped < 100


def test_zero_sigmas_skip_nothing():
    made = StepFilter(SkipConfig(sigmas=0), [[1.0, 1.0]] * 128)
    assert made.admits(1e9, 1e9, 1)


# ---- in a run ----


def test_a_spike_changes_no_weight_and_the_run_continues_exactly(tmp_path, tokenizer_file, monkeypatch):
    """A norm as large as a flipped bit could make it, and a NaN, both after resuming."""
    skip = {"sigmas": 6.0, "window": 8, "limit": 1}
    spikes = {7: 1e9, 9: math.nan}
    original, seen = loop.clip_gradients, []

    def clip(parameters, max_norm):
        seen.append(True)
        norm = original(parameters, max_norm)
        return norm * spikes.get(len(seen), 1.0)

    monkeypatch.setattr(loop, "clip_gradients", clip)
    outputs = []
    for name in ("whole", "parts"):
        path = write_run(tmp_path / name / "run", tokenizer_file, skip=skip)
        seen.clear()
        if name == "parts":
            assert train_until(path, 6, 0, signal.SIGINT) == "step-0000006"
        train_run(path, resume=name == "parts")
        outputs.append(path.parent / "out")
    assert_same_run(*outputs)
    records = [r for r in read_metrics(outputs[0]) if "cross_entropy" in r]
    assert [r["step"] for r in records if r.get("skipped")] == [7, 9]
    assert records[8]["grad_norm"] is None  # JSON has no NaN
    optimizer = torch.load(outputs[0] / "checkpoints" / "step-0000012" / "training_state.pt")["optimizer"]
    assert float(optimizer["state"][0]["step"]) == 10
    progress = torch.load(outputs[0] / "checkpoints" / "step-0000012" / "training_state.pt")["progress"]
    assert len(progress["recent"]) == 8
    spikes[8] = 1e9  # now three in a row
    path = write_run(tmp_path / "limit" / "run", tokenizer_file, skip=skip)
    seen.clear()
    assert "2 steps in a row" in refused(lambda: train_run(path), ConfigError)
