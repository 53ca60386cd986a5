"""Fine-tuning configurations: the recipes' defaults, schedules, and what is refused."""

from __future__ import annotations

import pytest

from finetuning_runs import write_run
from olmoe.errors import ConfigError
from olmoe.train.finetune.config import FinetuneSchedule, PreferenceConfig, SFTConfig, load_config
from sentences import refused


def test_defaults_follow_the_paper(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[run]\noutput = "out"\ninitialize_from = "x"\n[data]\ntrain = [{ path = "a.jsonl" }]\n[batch]\nsequences = 4\n'
        "[optimizer]\neps = 1e-9\n"
    )
    chats = load_config(tmp_path / "run.toml", SFTConfig)
    assert (chats.optimizer.learning_rate, chats.optimizer.weight_decay) == (2e-5, 0.0)
    assert (chats.schedule.epochs, chats.schedule.warmup) == (2.0, 0.03)
    assert (chats.loss.load_balancing, chats.loss.router_z) == (0.0, 0.0)
    assert chats.adapter is None
    assert chats.residual_dropout == 0.0
    assert "regularization" not in chats.fingerprint()  # runs older than the dropout setting continue
    pairs = load_config(tmp_path / "run.toml", PreferenceConfig)
    assert (pairs.optimizer.learning_rate, pairs.schedule.epochs, pairs.schedule.warmup) == (5e-7, 3.0, 0.1)
    assert pairs.loss.strength == 0.1


def test_runs_older_than_the_adapter_precision_setting_continue(tmp_path, tokenizer_file):
    adapter = {"rank": 2}
    plain = load_config(write_run(tmp_path / "a", tokenizer_file, adapter=adapter), SFTConfig).fingerprint()
    rounded = load_config(
        write_run(tmp_path / "b", tokenizer_file, adapter=adapter | {"precision": "bf16"}), SFTConfig
    ).fingerprint()
    assert plain["adapter"] == {"rank": 2, "alpha": 32.0, "targets": ("attention", "experts"), "pack": None}
    assert rounded["adapter"] == plain["adapter"] | {"precision": "bf16"}


def test_precision_must_stay_where_recomputation_may_change(tmp_path, tokenizer_file):
    plain, recomputed, rounded = (
        load_config(write_run(tmp_path, tokenizer_file, compute=compute), SFTConfig).fingerprint()
        for compute in ({}, {"activation_checkpointing": "selective"}, {"precision": "bf16-products"})
    )
    assert recomputed == plain
    assert "compute" not in plain  # runs older than [compute] continue
    assert rounded == plain | {"precision": "bf16-products"}


def test_recompute_means_full_activation_checkpointing(tmp_path, tokenizer_file):
    path = write_run(tmp_path, tokenizer_file)
    path.write_text("recompute = true\n" + path.read_text())
    assert load_config(path, SFTConfig).of_layers.activation_checkpointing == "full"
    path = write_run(tmp_path, tokenizer_file, compute={"activation_checkpointing": "selective"})
    assert load_config(path, SFTConfig).of_layers.activation_checkpointing == "selective"
    path.write_text("recompute = true\n" + path.read_text())
    assert "leave out one" in refused(lambda: load_config(path, SFTConfig), ConfigError)


def test_learning_rates_match_the_released_log():
    """The released SFT run: 9,500 steps, 2e-5, a warm-up of 0.03 (its log counts steps from 1)."""
    rate = FinetuneSchedule().rate
    assert rate(2e-5, 0, 9500) == pytest.approx(7.018e-8, rel=1e-3)
    assert rate(2e-5, 284, 9500) == pytest.approx(2e-5)
    assert rate(2e-5, 2840, 9500) == pytest.approx(1.4454e-5, rel=1e-3)
    assert 0 < rate(2e-5, 9499, 9500) < 1e-8
    cosine = FinetuneSchedule(kind="cosine", warmup=0.0, final_fraction=0.1).rate
    assert [cosine(1.0, step, 10) for step in (0, 5)] == pytest.approx([1.0, 0.55])
    assert FinetuneSchedule(kind="constant", warmup=0.0).rate(1.0, 9, 10) == 1.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": {"initialize_from": ""}}, "run.initialize_from is missing"),
        ({"run": {"output": ""}}, "run.output is empty"),
        ({"data": {"train": []}}, "data.train is empty"),
        ({"data": {"turns": "first"}}, "data.turns must be all or last, not 'first'"),
        ({"data": {"too_long": "x"}}, "data.too_long must be cut, drop or refuse"),
        ({"data": {"length": 3}}, "unknown key 'length'"),
        ({"model": {"hidden_size": 8}}, "[model] is for olmoe train"),  # was an unknown key
        ({"tokenizer": {"path": "tokenizer.json"}}, "brings its own; leave [tokenizer] out"),
        ({"schedule": {"kind": "step"}}, "schedule.kind must be"),
        ({"schedule": {"epochs": 0}}, "schedule.epochs must be above 0"),
        ({"schedule": {"warmup": 1.0}}, "schedule.warmup must be from 0 to below 1"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate must be above 0"),
        ({"loss": {"reduce": "max"}}, "loss.reduce must be mean or sum, not 'max'"),
        ({"loss": {"load_balancing": -0.1}}, "loss.load_balancing must be at least 0"),
        ({"regularization": {"residual_dropout": 1.0}}, "regularization.residual_dropout must be from 0 to below 1"),
        ({"schedule": {"epochs": 2**40}}, "schedule.epochs must be above 0 and at most 1,000,000"),  # would never end
        ({"data": {"train": [{"path": "train.jsonl", "repeat": 2**40}]}}, "repeat of 'train.jsonl' must be above 0"),
        ({"data": {"valid": [{"path": "valid.jsonl", "repeat": 2}]}}, "is not trained on, so its repeat means nothing"),
        ({"run": {"peak_flops": 1e12}}, "run.peak_flops is for the MFU of olmoe train"),
        ({"adapter": {"rank": 0}}, "adapter.rank must be above 0"),
        (
            {"adapter": {"rank": "8"}},
            "adapter.rank must be of type int, not '8'",
        ),  # was reported as {'rank': '8'} of the wrong type
        ({"adapter": {"rnak": 8}}, "[adapter] has the unknown key 'rnak'; known are alpha, pack, precision, rank"),
        ({"adapter": {"rank": 2**62}}, "adapter.rank must be above 0 and at most 1,000,000"),  # was a traceback
        ({"adapter": {"targets": ["all"]}}, "adapter.targets must be attention, experts or router, not 'all'"),
        ({"adapter": {"targets": []}}, "adapter.targets must be"),
        ({"compute": {"precision": "fp16"}}, "compute.precision must be fp32, bf16 or bf16-products, not 'fp16'"),
        ({"compute": {"activation_checkpointing": "on"}}, "compute.activation_checkpointing must be off, selective"),
        (
            {"compute": {"activation_checkpointing": "selective"}, "adapter": {"rank": 2}},
            'beside an [adapter] choose "full" or "off"',
        ),
        ({"compute": {"compile": True}}, "compute.compile is for olmoe train"),
        ({"compute": {"precision": "bf16"}, "adapter": {"rank": 2}}, 'set adapter.precision = "bf16" instead'),
        ({"adapter": {"precision": "fp8"}}, "adapter.precision must be fp32 or bf16, not 'fp8'"),
    ],
)
def test_mistakes_are_named(tmp_path, tokenizer_file, changes, says):
    path = write_run(tmp_path, tokenizer_file, **changes)
    assert says in refused(lambda: load_config(path, SFTConfig), ConfigError)
