"""How an experiment is laid out as runs."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest

from olmoe.errors import ConfigError
from olmoe.train.config import load_config
from olmoe.train.experiment.definition import load_experiment
from olmoe.train.experiment.runs import STAGE, lay_out, to_toml, write_configuration
from olmoe.train.run_data import open_data
from small_experiments import DENSE, TOKENS, write_experiment


def test_runs_are_ordered_by_seed_in_separate_folders(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    runs = lay_out(experiment, tmp_path / "out", seeds=2)
    assert [(run.arm.name, run.seed) for run in runs] == [("dense", 1), ("sparse", 1), ("dense", 2), ("sparse", 2)]
    assert [str(run.folder.relative_to(tmp_path)) for run in runs[:3]] == [
        "out/dense/seed-1",
        "out/sparse/seed-1",
        "out/dense/seed-2",
    ]
    assert {run.config.run.output for run in runs} == {str(run.folder) for run in runs}
    assert not (tmp_path / "out").exists()


def test_all_arms_of_a_seed_see_the_same_windows_in_the_same_order(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    windows = []
    for run in lay_out(experiment, tmp_path / "out", seeds=2):
        mixture = open_data(run.config, [])[1].mixture
        windows.append(np.stack([mixture.window(i) for i in range(48)]))
    dense_1, sparse_1, dense_2, sparse_2 = windows
    assert (dense_1 == sparse_1).all()
    assert (dense_2 == sparse_2).all()
    assert (dense_1 != dense_2).any()


def test_a_run_started_from_another_sees_new_windows(tmp_path, tokenizer_file):
    arms = {"half": {"model": DENSE}, "on": {"start": "half"}, "up": {"start": "half", "upcycle": {"experts": 4}}}
    half, on, up = lay_out(load_experiment(write_experiment(tmp_path, tokenizer_file, arms)), tmp_path / "out", seeds=1)
    assert (half.config.run.seed, on.config.run.seed, up.config.run.seed) == (1, 1 + STAGE, 1 + STAGE)
    assert on.earlier == up.earlier == half
    assert (half.tokens_before, on.tokens_before, on.tokens) == (0, TOKENS, TOKENS)
    assert on.config.run.initialize_from == str(half.folder / "best")
    assert up.config.run.initialize_from == str(tmp_path / "out" / "up" / "start" / "seed-1")


def test_a_scale_shortens_tokens_warm_up_and_evaluation_intervals(tmp_path, tokenizer_file):
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file))
    half = lay_out(experiment, tmp_path, seeds=1, scale=0.5)[0].config
    assert (half.schedule.total_tokens, half.schedule.warmup_tokens) == (TOKENS // 2, 16)
    assert half.evaluation.every_steps == 2
    assert experiment.arms["dense"].tables["schedule"]["total_tokens"] == TOKENS
    for seeds, scale in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ConfigError, match="at least 1 seed|above 0"):
            lay_out(experiment, tmp_path, seeds=seeds, scale=scale)


def test_an_invalid_training_configuration_names_its_arm(tmp_path, tokenizer_file):
    arms = {"good": {}, "bad": {"model": {"hiden_size": 8}}}
    experiment = load_experiment(write_experiment(tmp_path, tokenizer_file, arms))
    with pytest.raises(ConfigError, match=r"'bad' is not a valid training run: .*hiden_size"):
        lay_out(experiment, tmp_path / "out", seeds=1)


def test_the_written_configuration_loads_in_olmoe_train(tmp_path, tokenizer_file):
    run = lay_out(load_experiment(write_experiment(tmp_path, tokenizer_file)), tmp_path / "out", seeds=1)[0]
    write_configuration(run)
    assert load_config(run.folder / "run.toml").fingerprint() == run.config.fingerprint()


def test_a_run_already_begun_keeps_its_settings(tmp_path, tokenizer_file):
    run = lay_out(load_experiment(write_experiment(tmp_path, tokenizer_file)), tmp_path / "out", seeds=1)[0]
    write_configuration(run)
    changed = write_experiment(tmp_path, tokenizer_file, optimizer={"learning_rate": 3e-3})
    other = lay_out(load_experiment(changed), tmp_path / "out", seeds=1)[0]
    write_configuration(other)  # nothing has been trained yet
    (run.folder / "evaluation.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"learning_rate = 0\.003, and not 0\.01 .*--output"):
        write_configuration(run)
    free = write_experiment(
        tmp_path, tokenizer_file, run={"threads": 2}, checkpoint={"keep": 1}, optimizer={"learning_rate": 3e-3}
    )
    write_configuration(lay_out(load_experiment(free), tmp_path / "out", seeds=1)[0])


def test_every_kind_of_value_is_written_as_toml():
    tables = {
        "a": {"text": 'a "b"\\c\n\x7fé', "number": 3, "real": 1e-5, "yes": True, "list": [1.5, [2], {"x y": "z"}]},
        "b": {},
    }
    assert tomllib.loads(to_toml(tables)) == tables
