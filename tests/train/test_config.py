"""Training configurations: values are built as TOML gives them, and every mistake is reported in one sentence."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe.config import RopeParameters
from olmoe.errors import ConfigError
from olmoe.train.config import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LossConfig,
    OptimizerConfig,
    ScheduleConfig,
    Source,
    load_config,
)
from sentences import refused
from training_runs import sections, to_toml

ROOT = Path(__file__).parents[2]


def load(tmp_path: Path, **changes):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(sections("tokenizer.json", **changes)), encoding="utf-8")
    return load_config(path)


# ---- what is read ----


def test_values_are_read_with_their_types(tmp_path):
    config = load(
        tmp_path,
        model={"rope": {"rope_type": "linear", "factor": 2}, "eos_token_id": [319, 0], "clip_qkv": 8},
        data={"train": [{"path": "a.txt", "repeat": 2}, {"path": "b.npy"}], "measure": [{"path": "c.txt"}]},
        optimizer={"learning_rate": 1, "betas": [0.8, 0.9]},
    )
    assert config.model.rope == RopeParameters(rope_type="linear", factor=2.0)
    assert config.model.eos_token_ids == (319, 0)
    assert config.model.clip_qkv == 8.0
    assert config.data.train == (Source(path="a.txt", repeat=2.0), Source(path="b.npy", repeat=1.0))
    assert config.data.measure == (Source(path="c.txt"),)
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (1.0, (0.8, 0.9))
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.batch == BatchConfig(sequences=2, accumulation=2)
    assert config.schedule == ScheduleConfig(total_tokens=768, warmup_tokens=32)


def test_defaults_are_olmoes_recipe(tmp_path):
    values = sections("tokenizer.json")
    kept = {name: values[name] for name in ("run", "model", "tokenizer", "data", "batch", "schedule")}
    path = tmp_path / "run.toml"
    path.write_text(to_toml(kept), encoding="utf-8")
    config = load_config(path)
    assert config.optimizer == OptimizerConfig(
        learning_rate=4e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    assert config.loss == LossConfig(load_balancing=0.01, router_z=0.001)
    assert config.schedule.kind == "cosine"
    assert config.schedule.final_fraction == 0.1
    assert (config.evaluation, config.checkpoint) == (EvaluationConfig(), CheckpointConfig())


def test_paths_are_relative_to_the_file(tmp_path, monkeypatch):
    config = load(tmp_path)
    assert config.resolve("a/b.txt") == tmp_path / "a" / "b.txt"
    assert config.resolve(str(tmp_path / "x")) == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    assert load_config("run.toml").resolve("a.txt") == Path("a.txt")


def test_the_number_of_steps_follows_from_tokens(tmp_path):
    config = load(tmp_path, schedule={"total_tokens": 12 * 64 + 1})
    assert config.tokens_per_step == 2 * 2 * 16
    assert config.total_steps == 13  # the last step may exceed it


def test_the_fingerprint_covers_what_decides_the_weights(tmp_path):
    config = load(tmp_path)
    for change in (
        {"model": {"hidden_size": 32}},
        {"data": {"sequence_length": 8}},
        {"batch": {"sequences": 4}},
        {"optimizer": {"eps": 1e-9}},
        {"schedule": {"total_tokens": 999}},
        {"loss": {"router_z": 0.0}},
        {"run": {"seed": 4}},
    ):
        assert load(tmp_path, **change).fingerprint() != config.fingerprint(), change
    same = load(tmp_path, run={"output": "b", "threads": 2}, evaluation={"windows": 1}, checkpoint={"keep": 9})
    assert same.fingerprint() == config.fingerprint()


def test_olmoe_tiny_has_olmoes_structure():
    config = load_config(ROOT / "configs" / "olmoe-tiny.toml")
    model = config.model
    assert model.num_parameters == 7_637_120
    assert (model.num_experts, model.num_experts_per_tok) == (64, 8)
    assert not model.norm_topk_prob
    assert not model.tie_word_embeddings
    assert (model.clip_qkv, model.attention_bias, model.hidden_act) == (None, False, "silu")
    assert model.kv_heads == model.num_attention_heads
    assert model.rope == RopeParameters()
    assert (model.vocab_size, model.eos_token_id, model.pad_token_id) == (4096, 4095, 1)
    assert (config.loss, config.run.seed) == (LossConfig(), 6198)
    assert dataclasses.replace(config.optimizer, learning_rate=4e-4) == OptimizerConfig()
    stories = sum(source.repeat for source in config.data.train if "stories" in source.path)
    assert stories > sum(source.repeat for source in config.data.train) / 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"hiden_size": 8}}, "hiden_size"),
        ({"run": {"base": "x"}}, "base"),
        ({"optimiser": {"learning_rate": 1.0}}, "optimiser"),
        ({"run": {"output": None}}, "output"),
        ({"run": {"output": ""}}, "run.output"),
        ({"run": {"output": 3}}, "run.output"),
        ({"run": {"seed": -1}}, "run.seed"),
        ({"run": {"seed": 1.5}}, "run.seed"),
        ({"run": {"seed": True}}, "run.seed"),
        ({"run": {"threads": "two"}}, "run.threads"),
        ({"model": {"hidden_size": "16"}}, "model.hidden_size"),
        ({"model": {"hidden_size": 15}}, "hidden_size"),
        ({"model": {"rope": 10000.0}}, "model.rope"),
        ({"model": {"rope": {"kind": "linear"}}}, "kind"),
        ({"model": {"rope": {"rope_type": "yarn"}}}, "yarn"),
        ({"model": {"eos_token_id": []}}, "eos_token_id"),
        ({"model": {"attention_dropout": 0.1}}, "attention_dropout"),
        ({"regularization": {"residual_dropout": 1.0}}, "residual_dropout"),
        ({"regularization": {"residual_dropout": -0.1}}, "residual_dropout"),
        ({"regularization": {"residual_dropout": float("nan")}}, "residual_dropout"),
        ({"tokenizer": {"vocab_size": 321}}, "tokenizer.vocab_size"),
        ({"data": {"train": []}}, "data.train"),
        ({"data": {"train": ["train.txt"]}}, "data.train[0]"),
        ({"data": {"train": "train.txt"}}, "data.train"),
        ({"data": {"train": [{"repeat": 2}]}}, "path"),
        ({"data": {"train": [{"path": "a.txt", "repeat": 0}]}}, "a.txt"),
        ({"data": {"train": [{"path": "a.txt", "weight": 0}]}}, "weight of 'a.txt'"),
        ({"data": {"train": [{"path": "a.txt", "weight": 0.5, "repeat": 2}]}}, "both repeat and weight"),
        ({"data": {"train": [{"path": "a.txt", "weight": 0.5}, {"path": "b.txt"}]}}, "'b.txt' has none"),
        ({"data": {"valid": [{"path": "b.txt", "weight": 0.5}]}}, "'b.txt' is not trained on"),
        ({"data": {"mask_repetitions": -1}}, "mask_repetitions"),
        ({"data": {"document_mask": True}, "compute": {"compile": True}}, "data.document_mask exclude each other"),
        ({"data": {"mask_repetitions": 1}}, "everything occurs once"),
        ({"data": {"train": [{"path": "a.txt", "repeat": float("inf")}]}}, "a.txt"),
        ({"data": {"valid": [{"path": "b.txt", "repeat": -1}]}}, "b.txt"),
        ({"data": {"valid": [{"path": "b.txt", "repeat": 2}]}}, "'b.txt' is not trained on, so its repeat"),
        ({"data": {"train": [{"path": "a.txt", "repeat": 2**40}]}}, "must be above 0 and at most 1,000,000"),
        ({"batch": {"accumulation": 2**62}}, "batch.sequences x batch.accumulation x data.sequence_length"),
        ({"data": {"sequence_length": 33}}, "max_position_embeddings"),
        ({"data": {"sequence_length": 1}}, "at least 2"),
        ({"data": {"sequence_length": 0}}, "data.sequence_length"),
        ({"batch": {"sequences": 0}}, "batch.sequences"),
        ({"batch": {"accumulation": -1}}, "batch.accumulation"),
        ({"optimizer": {"learning_rate": 0.0}}, "learning_rate"),
        ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate"),
        ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"optimizer": {"betas": [-0.1, 0.9]}}, "optimizer.betas"),
        ({"optimizer": {"eps": 0.0}}, "optimizer.eps"),
        ({"optimizer": {"weight_decay": -0.1}}, "weight_decay"),
        ({"optimizer": {"max_grad_norm": 0.0}}, "max_grad_norm"),
        ({"schedule": {"kind": "constant"}}, "constant"),
        ({"schedule": {"total_tokens": 0}}, "total_tokens"),
        ({"schedule": {"total_tokens": 10**400}}, "total_tokens"),
        ({"schedule": {"total_tokens": None}}, "total_tokens"),
        ({"schedule": {"warmup_tokens": 768}}, "warmup_tokens"),
        ({"schedule": {"warmup_tokens": -1}}, "warmup_tokens"),
        ({"schedule": {"final_fraction": -0.1}}, "final_fraction"),
        ({"loss": {"load_balancing": -0.01}}, "load_balancing"),
        ({"loss": {"router_z": float("nan")}}, "router_z"),
        ({"evaluation": {"every_steps": 0}}, "evaluation.every_steps"),
        ({"evaluation": {"windows": -1}}, "evaluation.windows"),
        ({"evaluation": {"final_windows": -1}}, "evaluation.final_windows"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep"),
        ({"checkpoint": {"every_steps": 0}}, "checkpoint.every_steps"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_mistakes_are_refused_by_section_and_key(tmp_path, changes, told):
    assert told in refused(lambda: load(tmp_path, **changes), ConfigError)


@pytest.mark.parametrize("section", ["run", "model", "tokenizer", "data", "batch", "schedule"])
def test_a_missing_section_is_not_replaced_by_defaults(tmp_path, section):
    values = sections("tokenizer.json")
    del values[section]
    (tmp_path / "run.toml").write_text(to_toml(values), encoding="utf-8")
    assert f"'{section}'" in refused(lambda: load_config(tmp_path / "run.toml"), ConfigError)


@pytest.mark.parametrize(
    "line", ["base = '.'", "model = 5", "model = 'olmoe-tiny'", "data = []", "run = true", "unknown = 1"]
)
def test_sections_must_be_tables_and_known(tmp_path, line):
    values = sections("tokenizer.json")
    values.pop(line.split()[0], None)
    (tmp_path / "run.toml").write_text(f"{line}\n{to_toml(values)}", encoding="utf-8")
    message = refused(lambda: load_config(tmp_path / "run.toml"), ConfigError)
    assert line.split()[0] in message
    assert ("unknown key" in message) == (line.split()[0] in ("base", "unknown"))


@pytest.mark.parametrize(
    "content",
    [b"", b"run", b"[run]\noutput = 'a'\noutput = 'b'\n", b'{"run": {}}', b"\xff\xfe", b"\x80[run]"],
    ids=["empty", "a word", "key twice", "JSON", "UTF-16", "Latin-1"],
)
def test_invalid_toml_is_refused(tmp_path, content):
    (tmp_path / "run.toml").write_bytes(content)
    refused(lambda: load_config(tmp_path / "run.toml"), ConfigError)


@pytest.mark.parametrize("part", [{"adapter": {"rank": 8}}, {"schedule": {"epochs": 2}}], ids=["adapter", "epochs"])
def test_a_fine_tuning_configuration_names_the_commands_for_it(tmp_path, part):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(sections("tokenizer.json") | part), encoding="utf-8")
    assert "olmoe sft" in refused(lambda: load_config(path), ConfigError)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    assert "none.toml" in refused(lambda: load_config(tmp_path / "none.toml"), ConfigError)
    assert tmp_path.name in refused(lambda: load_config(tmp_path), ConfigError)
    (tmp_path / "file").touch()
    refused(lambda: load_config(tmp_path / "file" / "run.toml"), ConfigError)


def test_reading_a_configuration_needs_no_torch():
    code = f"""
import sys
from olmoe.train.config import load_config
load_config({str(ROOT / "configs" / "olmoe-tiny.toml")!r})
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
