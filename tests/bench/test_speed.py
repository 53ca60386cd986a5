"""Timed prompts and steps. Numbers of seconds are never asserted."""

from __future__ import annotations

import pytest

from configurations import small_config
from conftest import make_model
from olmoe.bench.random_models import random_model
from olmoe.bench.speed import Measured, measure
from olmoe.errors import BackendUnavailableError, UserError
from olmoe.ops import cpu
from olmoe.ops.cpu import extension
from olmoe.runner import CpuRunner, TorchRunner
from packed_folders import WHOLE
from sentences import refused


def test_measure_counts_every_sequence_and_reports_every_step(monkeypatch):
    measured = Measured(random_model(small_config(**WHOLE), "int4"))
    prompts, batches, reports = [], [], []
    monkeypatch.setattr(measured, "prefill", lambda running, n: prompts.append((len(running.lengths), n)) or 0.5)

    def decode(running):
        batches.append(list(running.lengths))
        running.lengths = [length + 1 for length in running.lengths]
        return 0.25

    monkeypatch.setattr(measured, "decode", decode)
    speed = measure(
        measured,
        prefill=20,
        decode=3,
        context=7,
        batch=2,
        repeats=2,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert speed["prefill_tokens_per_second"] == 40.0
    assert speed["decode_tokens_per_second"] == speed["decode_tokens_per_second_best"] == 8.0
    assert prompts[1:] == [(1, 20), (1, 20), (2, 7)]
    assert batches[1:] == [[7, 7], [8, 8], [9, 9]]  # the step before them warms up
    assert reports == [(1, 7), (2, 7), (4, 7), (5, 7), (6, 7), (7, 7)]


def test_numbers_below_one_are_refused():
    measured = Measured(make_model())
    for name in ("prefill", "decode", "context", "batch", "repeats"):
        options = {"prefill": 1, "decode": 1, "context": 1, "batch": 1, "repeats": 1} | {name: 0}
        with pytest.raises(UserError, match="at least 1"):
            measure(measured, **options)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_backend_decides_who_computes(backend):
    kind = CpuRunner if backend == "auto" and cpu.available() else TorchRunner
    assert type(Measured(make_model(), backend)._runner) is kind


def test_kernels_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda: (None, "there are none"))
    refused(lambda: Measured(make_model(), "cpu"), BackendUnavailableError)
