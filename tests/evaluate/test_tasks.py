"""Finding tasks by name, pattern and file; the tasks of examples/eval; data that cannot be had."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")

from olmoe.errors import UserError
from olmoe.evaluate import tasks

EXAMPLES = Path(__file__).parents[2] / "examples" / "eval"
PATH = [str(EXAMPLES)]


def test_names_patterns_and_files():
    manager, names = tasks.find(["next_sentence", " pages "], PATH)
    assert names == ["next_sentence", "pages"]
    assert set(manager.all_tasks) == {"next_sentence", "pages", "retell"}  # the harness' own were not looked through
    assert tasks.find(["*"], PATH)[1] == ["next_sentence", "pages", "retell"]
    assert tasks.find(["p*", "pages"], PATH)[1] == ["pages"]
    file = str(EXAMPLES / "pages.yaml")
    manager, names = tasks.find([file])
    assert names == [file]
    assert list(manager.load(names)["tasks"]) == ["pages"]


def test_what_means_nothing_is_said(tmp_path):
    with pytest.raises(UserError, match="There is no task 'next_sentense'; did you mean next_sentence"):
        tasks.find(["next_sentense"], PATH)
    with pytest.raises(UserError, match="There is no task '.*none.yaml'; --tasks list shows all"):
        tasks.find([str(tmp_path / "none.yaml")], PATH)
    with pytest.raises(UserError, match="No task is named"):
        tasks.find([" ", ""], PATH)
    with pytest.raises(UserError, match="There is no folder nowhere with tasks"):
        tasks.find(["x"], ["nowhere"])


def test_the_harness_own_tasks_are_there_too():
    manager, names = tasks.find(["next_sentence", "arc_easy"], PATH)
    assert names == ["next_sentence", "arc_easy"]
    assert len(manager.all_tasks) > 1000


def test_data_that_cannot_be_had_is_one_sentence(ours, tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "tasks")
    (tmp_path / "tasks" / "pages.jsonl").unlink()
    manager, names = tasks.find(["pages"], [str(tmp_path / "tasks")])
    with pytest.raises(UserError, match=r"^The data of a task is not available \(.*pages.jsonl.*\); make sure that"):
        tasks.evaluate(ours, names, manager)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("test_split: test", "test_split: nosplit", "KeyError: 'nosplit'"),
        ("output_type: multiple_choice", "output_type: nonsense", "ValueError: Got invalid output_type 'nonsense'"),
        ("local_data.load", "local_data.nothing", "AttributeError: Module .* has no function 'nothing'"),
        ("doc_to_choice: choices", 'doc_to_choice: "{{missing}}"', "UndefinedError: 'missing' is undefined"),
        ("doc_to_choice: choices", "  bad: [", "ScannerError: mapping values are not allowed in this context in .*"),
    ],
)
def test_tasks_that_do_not_work_are_one_sentence(ours, tmp_path, old, new, reason):
    shutil.copytree(EXAMPLES, tmp_path / "tasks")
    file = tmp_path / "tasks" / "next_sentence.yaml"
    text = file.read_text("utf-8")
    assert old in text
    file.write_text(text.replace(old, new), "utf-8")
    manager, names = tasks.find([str(file)])
    with pytest.raises(UserError, match=rf"^A task does not work as defined \({reason}.*\); check its YAML file"):
        tasks.evaluate(ours, names, manager, limit=2)


def test_faults_of_ours_are_not_blamed_on_tasks(ours, monkeypatch):
    def broken(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr(ours.tokenizer, "encode_rendered", broken)
    ours._encoded.cache_clear()
    manager, names = tasks.find(["next_sentence"], PATH)
    with pytest.raises(KeyError, match="ours"):
        tasks.evaluate(ours, names, manager, limit=2)


def test_results_name_the_model(ours):
    manager, names = tasks.find(["next_sentence"], PATH)
    found = tasks.evaluate(ours, names, manager, limit=4, bootstrap_iters=0)
    assert found["config"]["model"] == "olmoe"
    assert found["config"]["model_args"] == {"pretrained": "olmoe-tiny"}
    assert found["config"]["model_num_parameters"] == ours.llm.config.num_parameters
    assert 0 <= found["results"]["next_sentence"]["acc,none"] <= 1
    assert found["n-samples"]["next_sentence"] == {"original": 50, "effective": 4}


def test_the_examples_are_what_their_script_writes(tmp_path, monkeypatch):
    shutil.copy(EXAMPLES / "make_tasks.py", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tasks.py"])
    runpy.run_path(str(tmp_path / "make_tasks.py"), run_name="__main__")
    for name in ("next_sentence.jsonl", "pages.jsonl"):
        assert (tmp_path / name).read_text("utf-8") == (EXAMPLES / name).read_text("utf-8")


def test_questions_have_one_right_answer():
    rows = [json.loads(line) for line in (EXAMPLES / "next_sentence.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == len({row["context"] for row in rows}) == 50
    assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
    assert min(sum(row["answer"] == place for row in rows) for place in range(4)) > 5


def test_a_small_model_is_better_than_chance(ours):
    manager, names = tasks.find(["next_sentence"], PATH)
    found = tasks.evaluate(ours, names, manager, bootstrap_iters=0)
    assert found["results"]["next_sentence"]["acc_norm,none"] > 0.3
