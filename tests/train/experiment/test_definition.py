"""Experiment files: what they define, and every mistake they can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from olmoe.errors import UserError
from olmoe.train import shared_expert
from olmoe.train.experiment.definition import find, load_experiment
from olmoe.train.experiment.runs import lay_out
from small_experiments import DENSE, write_experiment

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "experiments").glob("*.toml") if path.stem != "base")


def test_an_arm_changes_keys_and_keeps_the_rest(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    assert (experiment.name, experiment.title, experiment.question) == ("small", "Small", "Is it?")
    dense, sparse = (experiment.arms[name].tables for name in ("dense", "sparse"))
    assert {k: v for k, v in dense["model"].items() if sparse["model"][k] != v} == DENSE
    assert dense["optimizer"] == sparse["optimizer"] == {"learning_rate": 1e-2}
    assert dense["data"]["train"] == [{"path": str(tmp_path / "train.txt"), "repeat": 1.5}]
    assert dense["data"]["tokens_folder"] == str(tmp_path / "tokens")
    assert experiment.output == tmp_path / "runs" / "small"


def test_arms_may_override_compute_and_skipping(tmp_path, tokenizer_file):
    """Both were once refused as unknown keys of an arm, though the shared configuration may have them."""
    arms = {"one": {"skip": {"sigmas": 0.0}}, "two": {"compute": {"activation_checkpointing": "full"}}}
    one, two = lay_out(load_experiment(write_experiment(tmp_path, tokenizer_file, arms)), tmp_path / "runs", 1)
    assert (one.config.skip.sigmas, two.config.skip.sigmas) == (0.0, 6.0)
    assert two.config.compute.activation_checkpointing == "full"


def test_paths_are_relative_to_the_experiment_file(tmp_path, tokenizer_file):
    path = write_experiment(tmp_path / "shared", tokenizer_file)
    other = tmp_path / "elsewhere" / "mine.toml"
    other.parent.mkdir()
    text = path.read_text(encoding="utf-8").replace("base.toml", "../shared/base.toml")
    other.write_text(text + 'data = { valid = [{ path = "held_out.txt" }] }\n', encoding="utf-8")
    data = load_experiment(other).arms["sparse"].tables["data"]
    assert data["train"][0]["path"] == str(tmp_path / "shared" / "train.txt")
    assert data["valid"] == [{"path": str(tmp_path / "elsewhere" / "held_out.txt")}]


def test_an_arm_that_starts_from_another_has_its_model(tmp_path, tokenizer_file):
    arms = {
        "half": {"model": DENSE, "compared": False},
        "on": {"start": "half"},
        "up": {"start": "half", "upcycle": {"experts": 4, "top_k": 2, "split": 2, "form": "normalized"}},
    }
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file, arms))
    half, on, up = (arm.tables["model"] for arm in experiment.arms.values())
    assert on == half
    changed = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8, "norm_topk_prob": True}
    assert up == half | changed


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ({"one": {}}, "at least two arms"),
        ({"one": {}, "two": {"compared": False}}, "fewer than two"),
        ({"one": {}, "two": {"optimiser": {}}}, "optimiser"),
        ({"one": {}, "two": {"label": 3}}, "label"),
        ({"one": {}, "two": {"compared": "no"}}, "compared"),
        ({"one": {}, "two": {"model": 3}}, "model"),
        ({"one": {}, "a/b": {}}, "a/b"),
        ({"one": {}, "..": {}}, "names a folder"),
        ({"one": {"start": "two"}, "two": {}}, "'two', which is not an earlier arm"),
        ({"one": {}, "two": {"upcycle": {"experts": 4}}}, "add start = ARM"),
        ({"one": {}, "two": {"start": "one", "model": DENSE}}, "remove its [model]"),
        ({"one": {}, "two": {"start": "one", "upcycle": {"experts": 4}}}, "must be dense"),
        ({"one": {"model": DENSE}, "two": {"start": "one", "upcycle": {"expert": 4}}}, "'expert'"),
        ({"one": {"model": DENSE}, "two": {"start": "one", "upcycle": {"experts": "4"}}}, "upcycle.experts"),
        ({"one": {"model": DENSE}, "two": {"start": "one", "upcycle": {"form": "best"}}}, "'best'"),
        ({"one": {"model": DENSE}, "two": {"start": "one", "upcycle": {"experts": 3, "split": 3}}}, "split 3"),
        ({"one": {}, "two": {"run": {"initialize_from": "x"}}}, "start = ARM"),
        ({"one": {"shared_expert": {"width": 8}}, "two": {"start": "one"}}, "which a shared expert rules out"),
        ({"one": {}, "two": {"start": "one", "shared_expert": {"width": 8}}}, "which a shared expert rules out"),
    ],
    ids=lambda value: str(value)[-50:],
)
def test_invalid_definitions_are_refused(tmp_path, tokenizer_file, arms, told):
    with pytest.raises(UserError) as caught:
        load_experiment(write_experiment(tmp_path, tokenizer_file, arms))
    assert told in str(caught.value)


def test_files_that_are_not_experiments_are_refused(tmp_path, tokenizer_file, monkeypatch):
    path = write_experiment(tmp_path, tokenizer_file)
    for text, told in (("[arms", "not valid TOML"), ("seed = 3", "'seed'"), ('base = "none.toml"', "two arms")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=told):
            load_experiment(path)
    path.write_text('base = "none.toml"\n[arms.a]\n[arms.b]\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"There is no file .*none\.toml"):
        load_experiment(path)
    path.write_text("[arms.a]\n[arms.b]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no run\.output"):
        load_experiment(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no folder experiments/"):
        find("small")


def test_an_experiment_is_found_by_path_or_by_name(tmp_path, tokenizer_file, monkeypatch):
    path = write_experiment(tmp_path / "experiments", tokenizer_file)
    monkeypatch.chdir(tmp_path)
    assert find(str(path)) == path
    assert find("small") == Path("experiments/small.toml")
    with pytest.raises(UserError, match=r"no experiment 'big'.*experiments/ has small\."):
        find("big")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_arms_match_in_tokens_and_parameters(path, tmp_path):
    """All arms train on the same number of tokens; most have as many active parameters, some as many in total."""
    experiment = load_experiment(path)
    runs = lay_out(experiment, tmp_path, seeds=1)
    compared = [run for run in runs if run.arm.compared]
    assert len({run.tokens_before + run.tokens for run in compared}) == 1
    assert len({run.config.tokens_per_step for run in runs}) == 1
    shared = {run.arm.name: shared_expert.parameters(run.config) for run in compared}
    active = [run.config.model.num_active_parameters + shared[run.arm.name] for run in compared]
    if path.stem != "upcycling":
        assert max(active) < 1.02 * min(active)  # the router's rows
    if path.stem in ("granularity", "shared-expert"):
        sizes = [run.config.model.num_parameters + shared[run.arm.name] for run in compared]
        assert max(sizes) < 1.01 * min(sizes)
    assert not (tmp_path / "dense").exists()


def test_shipped_experiments_are_listed():
    names = ["dense", "granularity", "load-balancing", "shared-expert", "upcycling", "z-loss"]
    assert [path.stem for path in FILES] == names
