"""`olmoe experiment`: what goes where, exit codes, and what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from olmoe.cli.main import main
from olmoe.train.experiment.definition import load_experiment
from olmoe.train.experiment.runs import lay_out, write_configuration
from olmoe.train.experiment.table import markdown
from olmoe.train.loop import train
from small_experiments import write_experiment

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("experiment_*.json"))


def sentence(capsys) -> str:
    """What went to stderr, which must be one line; nothing goes to stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("olmoe: ")
    assert err.count("\n") == 1
    return err


def test_a_whole_experiment_by_name(tmp_path, tokenizer_file, capfd, monkeypatch):
    write_experiment(tmp_path / "experiments", tokenizer_file)
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", "small", "--seeds", "2", "--jobs", "4", "--scale", "0.34"]) == 0
    out, err = capfd.readouterr()
    output = tmp_path / "experiments" / "runs" / "small"
    assert out == (output / "results.md").read_text(encoding="utf-8")
    assert err == ""  # no bar where there is no terminal
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert (results["runs_finished"], results["runs_planned"]) == (4, 4)
    assert results["arms"]["sparse"]["tokens"] == 5 * 64  # 261 of 768, in whole steps
    assert (output / "loss.png").is_file()


def test_a_report_of_what_is_finished(tmp_path, tokenizer_file, capsys):
    path = write_experiment(tmp_path, tokenizer_file)
    command = ["experiment", str(path), "--seeds", "2", "--output", str(tmp_path / "out"), "--report", "--no-figure"]
    assert main(command) == 2
    assert "No run of this experiment is finished" in sentence(capsys)
    for run in lay_out(load_experiment(path), tmp_path / "out", seeds=1):
        write_configuration(run)
        train(run.config, show_progress=False)
    assert main(command) == 0
    assert "Only 2 of 4 runs are finished." in capsys.readouterr().out
    assert not (tmp_path / "out" / "loss.png").exists()
    assert main([*command, "--scale", "0.5"]) == 2
    assert "evaluation.every_steps = 4, and not 2 as the experiment says now; give the --scale of then" in sentence(
        capsys
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none"], "no experiment 'none'"),
        (["small.toml", "--seeds", "0"], "at least 1 seed"),
        (["small.toml", "--scale", "-1"], "above 0"),
        (["small.toml", "--scale", "inf"], "above 0"),
        (["small.toml", "--jobs", "0"], "At least 1 run"),
        (["small.toml", "--output", "train.txt"], "--output"),
        (["base.toml"], "unknown key"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_mistakes_are_one_sentence(tmp_path, tokenizer_file, capsys, monkeypatch, arguments, told):
    write_experiment(tmp_path, tokenizer_file)
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *arguments]) == 2
    assert told in sentence(capsys)


def test_an_interrupt_says_how_to_go_on(tmp_path, tokenizer_file, capsys, monkeypatch):
    from olmoe.train.experiment import schedule

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule, "train_all", interrupt)
    assert main(["experiment", str(write_experiment(tmp_path, tokenizer_file)), "--seeds", "1"]) == 130
    assert sentence(capsys).endswith("0 of 2 runs are finished. The same command continues.\n")


def test_the_page_is_about_what_is_there(tmp_path, tokenizer_file):
    """Hours of training are not repeated here: commands must name experiments, and the example must be one."""
    named = re.findall(r"^olmoe experiment ([\w-]+)", PAGE, flags=re.MULTILINE)
    assert named
    assert all((ROOT / "experiments" / f"{name}.toml").is_file() for name in named)
    shipped = {path.stem for path in (ROOT / "experiments").glob("*.toml")} - {"base"}
    assert set(re.findall(r"^\| `([\w-]+)` \| ", PAGE, flags=re.MULTILINE)) >= shipped
    path = write_experiment(tmp_path, tokenizer_file)
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    path.write_text(example, encoding="utf-8")
    off = load_experiment(path).arms["off"]
    assert off.tables["loss"] == {"load_balancing": 0.0}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_of_the_page_are_those_of_the_results(path):
    """Both tables as the command prints them, the figure, and the experiment that the results are of."""
    results = json.loads(path.read_text(encoding="utf-8"))
    name = results["experiment"]
    assert path.stem == f"experiment_{name}"
    experiment = load_experiment(ROOT / "experiments" / f"{name}.toml")
    assert {arm: found["label"] for arm, found in results["arms"].items()} == {
        arm.name: arm.label for arm in experiment.arms.values()
    }
    tables = [part for part in markdown(results).split("\n\n") if part.startswith("| ")]
    assert len(tables) == 2
    (section,) = [part for part in PAGE.split("\n### ") if f"(images/experiment-{name}.png)" in part]
    for table in tables:
        assert table.strip() in section
    assert (ROOT / "docs" / "images" / f"experiment-{name}.png").is_file()


def test_all_results_are_of_one_scale():
    """Runs of several experiments are compared with each other, and some are the same."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS]
    arms = [arm for results in found for arm in results["arms"].values() if arm["compared"]]
    assert len({arm["tokens"] + arm["tokens_before"] for arm in arms}) == 1
    assert len({results["tokens_per_step"] for results in found}) == 1
