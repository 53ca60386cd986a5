"""Models of random weights, ceilings and timed steps. Numbers of seconds are never asserted."""

from __future__ import annotations

import math

import pytest
import torch

from configurations import small_config
from conftest import make_model
from olmoe.bench import benchmark
from olmoe.bench.benchmark import Ceiling, Measured, StepBytes, measure, random_model, skeleton, step_bytes
from olmoe.config import ModelConfig
from olmoe.errors import BackendUnavailableError, UserError
from olmoe.ops import cpu
from olmoe.ops.cpu import extension
from olmoe.quant import PackedModule
from olmoe.runner import CpuRunner, TorchRunner
from olmoe.weights import packed
from olmoe.weights.quantize import RECIPES
from packed_folders import WHOLE, packed_folder
from sentences import refused

FORMATS = (*RECIPES, "bf16", "fp32")


@pytest.mark.parametrize("format", FORMATS)
def test_random_models_compute_finite_logits(format):
    model = random_model(small_config(**WHOLE), format)
    measured = Measured(model)
    running = measured.sequences(2, 8)
    assert measured.prefill(running, 5) > 0
    assert running.lengths == [5, 5]
    assert measured.decode(running) > 0
    assert running.lengths == [6, 6]
    logits = measured.sequences(2, 4).prefill([[0], [0, 1]])
    assert torch.isfinite(logits).all()
    assert logits.std() > 0  # neither zeros nor one value
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_random_packed_models_have_the_tensors_of_packed_folders(tmp_path, recipe):
    stored = packed.load(packed_folder(tmp_path / "packed", recipe, **WHOLE))
    model = random_model(stored.config, recipe)
    shapes = {name: (p.shape, p.dtype) for name, p in stored.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in model.named_parameters()} == shapes
    assert {type(m) for m in model.modules()} == {type(m) for m in stored.modules()}
    assert not any(p.requires_grad for p in model.parameters())


def test_scales_are_the_small_ones_and_codes_are_noise():
    model = random_model(small_config(**WHOLE), "int8")
    module = model.model.layers[1].mlp.experts
    assert isinstance(module, PackedModule)
    values = module.decode("down_proj", torch.float32, 3)
    assert values.abs().max() <= 128 * 2.0**-11
    assert values.unique().numel() > 100
    assert not torch.equal(values, module.decode("down_proj", torch.float32, 4))
    other = model.model.layers[0].mlp.experts.decode("down_proj", torch.float32, 3)
    assert not torch.equal(values, other)


def test_matrices_longer_than_the_noise_are_filled_to_the_end(monkeypatch):
    monkeypatch.setattr(benchmark, "_NOISE", 997)
    for format in ("fp32", "int4"):
        model = random_model(small_config(**WHOLE), format)
        again = random_model(small_config(**WHOLE), format)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(p, q), name  # memory that was left alone would differ, sooner or later
            assert p.dim() == 1 or (p.view(-1)[-997:] != 0).any(), name


def test_tied_embeddings_stay_one_tensor():
    for format in ("int4", "bf16"):
        model = random_model(small_config(tie_word_embeddings=True, **WHOLE), format)
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_overrides_change_the_format_of_what_they_name():
    config = small_config(**WHOLE)
    plain, changed = skeleton(config, "q4_0"), skeleton(config, "q4_0", {"lm_head": "q8_0"})
    assert changed.lm_head.weight.numel() > plain.lm_head.weight.numel()
    assert changed.model.embed_tokens.weight.numel() == plain.model.embed_tokens.weight.numel()


def test_unknown_formats_are_refused():
    message = refused(lambda: random_model(small_config(), "int3"), UserError)
    assert "int3" in message
    assert "int4" in message


def test_weights_that_do_not_fit_the_memory_are_refused_before_they_are_made():
    huge = ModelConfig(num_hidden_layers=2, intermediate_size=2**24)
    assert "GB" in refused(lambda: random_model(huge, "bf16"))


def test_a_step_reads_what_the_formats_take():
    config = ModelConfig()  # the released one
    model = skeleton(config, "bf16")
    step = step_bytes(model, 100)
    # All active parameters but the embeddings, of which one row is read.
    assert step.weights == 2 * (config.num_active_parameters - config.vocab_size * config.hidden_size)
    assert step.cache == 100 * 16 * 2 * 2048 * 2
    four = step_bytes(skeleton(config, "q4_0"), 100)
    assert four.weights / (step.weights / 2) == pytest.approx(4.5 / 8, rel=0.02)
    assert four.cache == step.cache  # fp16
    assert step_bytes(model, 100, cache_dtype=torch.float32).cache == 2 * step.cache


def test_a_batch_shares_the_dense_weights_and_some_experts():
    model = skeleton(ModelConfig(), "bf16")
    one, eight, many = (step_bytes(model, 10, batch).weights for batch in (1, 8, 10_000))
    assert one < eight < 8 * one
    config = model.config
    assert many == 2 * (config.num_parameters - config.vocab_size * config.hidden_size)
    assert step_bytes(model, 10, 8).cache == 8 * step_bytes(model, 10).cache


def test_the_ceiling_is_bandwidth_over_bytes():
    ceiling = Ceiling(2e9, StepBytes(900_000_000, 100_000_000), 4)
    assert ceiling.tokens_per_second == 8.0
    assert ceiling.to_dict()["read_gb_per_s"] == 2.0
    assert ceiling.to_dict()["decode_tokens_per_s"] == 8.0


def test_bandwidth_is_measured_with_and_without_the_kernels(monkeypatch):
    assert 1e6 < benchmark.read_bandwidth(1, 2**22) < 1e14
    monkeypatch.setattr(extension, "_load", lambda: (None, "there are none"))
    assert 1e6 < benchmark.read_bandwidth(1, 2**22) < 1e14


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


def test_machine_facts_are_complete():
    facts = benchmark.machine_facts()
    assert facts["cpu"]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert math.isfinite(facts["cores"])


def test_a_package_outside_a_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "benchmark.py"))
    assert "commit" not in benchmark.machine_facts()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert "commit" not in benchmark.machine_facts()
