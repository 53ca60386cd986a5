"""A shared expert around the network: what it computes, that it is trained and resumed exactly, and who refuses it."""

from __future__ import annotations

import json
import signal

import pytest
import torch
import torch.nn.functional as F

from conftest import make_model
from olmoe.cli.main import main
from olmoe.errors import CheckpointError, ConfigError
from olmoe.model import CausalLM, Experts, Linear, causal_attend, initialize
from olmoe.train import loop, shared_expert
from olmoe.train.config import load_config
from olmoe.train.evaluation import evaluate_all
from olmoe.train.loop import Interrupted, train
from olmoe.train.run_data import open_data
from olmoe.train.run_folder import latest
from olmoe.train.shards import load_weights
from olmoe.train.throughput import flops_per_token
from olmoe.weights import checkpoint
from sentences import refused
from training_runs import assert_same_run, read_metrics, write_run

ODD = {"num_experts": 7, "num_experts_per_tok": 3}
CHANGES = {"model": ODD, "shared_expert": {"width": 24}, "run": {"peak_flops": 2e10}}


@pytest.fixture
def interruptible():
    """Ctrl-C raises even if the parent process ignores it, as shells make background jobs do."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer_file):
    """The configuration file of an uninterrupted run."""
    path = write_run(tmp_path_factory.mktemp("shared") / "run", tokenizer_file, **CHANGES)
    train(load_config(path), show_progress=False)
    return path


@pytest.mark.parametrize("shape", [(5, 32), (2, 3, 32)])
def test_its_output_is_added_with_weight_1(shape):
    config = make_model(hidden_size=32, **ODD).config
    block = shared_expert.SharedExpertBlock(config, width=24)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y, routed = block(x)
    assert routed.expert_ids.shape == (x.numel() // 32, 3)
    assert routed.logits.shape[1] == 7  # what the router losses see
    expected = torch.zeros(x.numel() // 32, 32)
    for n, token in enumerate(x.reshape(-1, 32)):
        chosen = [(block.experts, int(e), w) for e, w in zip(routed.expert_ids[n], routed.weights[n], strict=True)]
        for experts, e, weight in [*chosen, (block.shared_expert, 0, 1.0)]:
            gate, up = (experts.gate_up_proj[e] @ token).chunk(2)
            expected[n] += weight * (experts.down_proj[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(y, expected.view(shape), rtol=1e-4, atol=1e-5)
    assert block.shared_expert.gate_up_proj.shape == (1, 2 * 24, 32)


def test_it_is_trained_and_counted(finished):
    config = load_config(finished)
    model = CausalLM(config.model)
    shared_expert.add(model, 24)
    initialize(model, 3)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if "shared_expert" in name}
    assert sum(p.numel() for p in own.values()) == shared_expert.parameters(config) == 3 * 24 * 16 * 2
    load_weights(model, shared_expert.source_of(finished.parent / "out" / "best", model))
    for name, before in own.items():
        assert 0.01 < float(before.std()) < 0.03  # initialized like all other matrices
        assert not torch.equal(before, model.get_parameter(name)), name
    step = read_metrics(finished.parent / "out")[-2]
    per_token = flops_per_token(config.model) + 6 * shared_expert.parameters(config)
    assert step["mfu"] == pytest.approx(per_token * step["tokens_per_second"] / 2e10)
    assert [len(layer) for layer in step["expert_load"]] == [7, 7]


def test_the_final_evaluation_includes_it(finished):
    config, data = open_data(load_config(finished), [])
    model = CausalLM(config.model)
    shared_expert.add(model, 24)
    load_weights(model, shared_expert.source_of(finished.parent / "out" / "best", model))
    ((name, expected),) = evaluate_all(model, data.held_out, 16, 0).items()
    report = json.loads((finished.parent / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert report["held_out_loss"][name] == pytest.approx(expected.loss, abs=1e-5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.shared_expert.down_proj.zero_()
    (without,) = evaluate_all(model, data.held_out, 16, 0).values()
    assert abs(without.loss - expected.loss) > 1e-3


def test_a_run_resumes_bit_for_bit(finished, tmp_path, tokenizer_file, monkeypatch, interruptible):
    # In a folder of the same name, which names its files.
    path = write_run(tmp_path / finished.parent.name, tokenizer_file, **CHANGES)
    original, steps = loop.clip_gradients, []

    def clip(*arguments):
        steps.append(1)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(loop, "clip_gradients", clip)
    with pytest.raises(Interrupted):
        train(load_config(path), show_progress=False)
    assert latest(path.parent / "out").name == "step-0000005"
    train(load_config(path, resume=True), resume=True, show_progress=False)
    assert len(steps) == 12
    assert_same_run(path.parent / "out", finished.parent / "out")


@pytest.mark.parametrize("changed", [{"width": 16}, {"width": 0}], ids=str)
def test_resuming_with_another_width_is_refused(finished, tmp_path, tokenizer_file, changed):
    path = write_run(tmp_path / "run", tokenizer_file, **CHANGES | {"shared_expert": changed})
    (path.parent / "out").symlink_to(finished.parent / "out")
    with pytest.raises(ConfigError, match=r"width changed from 24 to 16|\[shared_expert\] was removed since"):
        train(load_config(path, resume=True), resume=True, show_progress=False)


def test_adding_one_to_an_existing_run_is_refused(tmp_path, tokenizer_file):
    path = write_run(tmp_path / "run", tokenizer_file)
    train(load_config(path), show_progress=False)
    path = write_run(tmp_path / "run", tokenizer_file, shared_expert={"width": 8})
    with pytest.raises(CheckpointError, match="was trained without a shared expert"):
        train(load_config(path, resume=True), resume=True, show_progress=False)


def test_other_programs_refuse_the_model(finished, tmp_path, capsys):
    best = finished.parent / "out" / "best"
    assert "of a shared expert, which OLMoE does not have" in refused(lambda: checkpoint.load(best))
    for command in (
        ["quantize", str(best), str(tmp_path / "packed"), "--format", "int8", "--calibration", "none"],
        ["convert", str(best), str(tmp_path / "exported")],
        ["generate", "--model", str(best), "the girl"],
    ):
        assert main(command) == 2, command
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "of a shared expert, which OLMoE does not have; what was trained with one can be measured by" in err
    assert list(tmp_path.iterdir()) == []


def test_bf16_products_cover_it(tmp_path, tokenizer_file):
    path = write_run(tmp_path / "run", tokenizer_file, **CHANGES | {"compute": {"precision": "bf16-products"}})
    model = loop._start(load_config(path), resumed=False)
    assert {m.products for m in model.modules() if isinstance(m, Linear | Experts)} == {torch.bfloat16}
    assert isinstance(model.model.layers[0].mlp.shared_expert, Experts)


def test_unsupported_settings_are_refused(finished, tmp_path, tokenizer_file):
    path = write_run(tmp_path / "run", tokenizer_file, **CHANGES | {"compute": {"precision": "bf16"}})
    message = refused(lambda: train(load_config(path), show_progress=False), ConfigError)
    assert message.startswith("shared_expert.width 24 is trained by one process, with activations in fp32")
    path = write_run(tmp_path / "run", tokenizer_file, shared_expert={"width": -1})
    assert "shared_expert.width must be at least 0" in refused(lambda: load_config(path), ConfigError)
    # A checkpoint without one has no weights to initialize it with.
    start = str(finished.parent / "out" / "best")
    path = write_run(tmp_path / "run", tokenizer_file, run={"initialize_from": start}, **{"model": ODD})
    assert "of a shared expert" in refused(lambda: train(load_config(path), show_progress=False))


def test_models_without_one_are_unchanged():
    model = make_model()
    ids = torch.arange(12).view(1, 12)
    source_types = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert set(source_types) == {"SparseMoeBlock"}
    shared_expert.add(model, 8)
    assert model(ids, torch.arange(12).expand(1, 12), causal_attend).hidden.shape == (1, 12, model.config.hidden_size)
