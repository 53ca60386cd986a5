"""Earlier checkpoints of a model: which are meant, and how far their routing is, against loops written to be read."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import training_runs
from conftest import make_model
from olmoe.analysis import tracing
from olmoe.analysis.analyze import analyze
from olmoe.analysis.measurements import domains_of
from olmoe.analysis.revisions import Revision, find, require_alike
from olmoe.analysis.trace import Trace
from olmoe.train.config import load_config
from olmoe.train.loop import train
from olmoe.weights import export
from olmoe.weights.checkpoint import Checkpoint
from sentences import refused

TEXT = "Once upon a time there was a little girl.\n<|endoftext|>\nThe dog ran to the ball, and the girl ran too.\n"
CODE = "def add(a, b):\n    return a + b\n" * 12
STEPS = (5, 40, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_file):
    """A "run" of three checkpoints, each nearer to the last; names that do not sort by step."""
    folder = tmp_path_factory.mktemp("run")
    first, last = make_model(seed=0).state_dict(), make_model(seed=1).state_dict()
    for step in STEPS:
        model, part = make_model(), step / STEPS[-1]
        model.load_state_dict({name: torch.lerp(first[name], last[name], part) for name in first})
        export.save(model, folder / f"step{step}", dtype=torch.float32)
        shutil.copy(tokenizer_file, folder / f"step{step}" / "tokenizer.json")
    (folder / ".step7.partial").mkdir()
    (folder / ".step7.partial" / "config.json").touch()
    (folder / "notes.txt").touch()
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "stories.txt").write_text(TEXT * 8, encoding="utf-8")
    (folder / "code.txt").write_text(CODE, encoding="utf-8")
    return {"stories": folder / "stories.txt", "code": folder / "code.txt"}


def names(found):
    return [each.name for each in found]


# ---- which are meant ----


def test_folders_and_folders_of_them(run, monkeypatch):
    one = str(run / "step40")
    assert find(None, None, [one, run / "step5"]) == [
        Revision("step5", str(run / "step5")),
        Revision("step40", str(run / "step40")),
    ]
    assert names(find(None, None, [run])) == ["step5", "step40", "step100"]
    monkeypatch.chdir(run)
    assert names(find("step100", None, ["."])) == ["step5", "step40"]  # the model itself is none of its revisions
    (run / "notes").mkdir()
    assert "holds neither a config.json" in refused(lambda: find(None, None, ["notes"]))


def test_steps_in_names():
    told = {
        "step5000-tokens20B": 5000, "step-0000500": 500, "checkpoint-60": 60, "global_step7": 7, "iter_8": 8, "90": 90,
        "main": None, "1b-7b": None, "footstep3": None, "step3b": None, "2024-run": None,
    }  # fmt: skip
    assert {name: Revision(name, "x").step for name in told} == told


def test_order_is_kept_where_steps_are_unknown(tmp_path):
    for name in ("z", "a", "step9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert names(find(None, None, [tmp_path / "z", tmp_path / "step9", tmp_path / "a"])) == ["z", "step9", "a"]


def test_revisions_of_a_repository():
    found = find("owner/name", None, ["step9-tokens1B", "step5-tokens0B", "main"])
    assert found == [
        Revision("step5-tokens0B", "owner/name", "step5-tokens0B"),
        Revision("step9-tokens1B", "owner/name", "step9-tokens1B"),
    ]
    assert names(find("owner/name", "step9", ["step9", "main"])) == ["main"]


def test_checkpoints_of_two_runs_have_their_paths_for_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "step1").mkdir(parents=True)
        (tmp_path / name / "step1" / "config.json").touch()
    assert names(find(None, None, [tmp_path / "a", tmp_path / "b"])) == [str(tmp_path / n / "step1") for n in "ab"]
    assert "given twice" in refused(lambda: find(None, None, [tmp_path / "a"] * 2))
    assert "given twice" in refused(lambda: find("owner/name", None, ["x", "x"]))


def test_what_can_be_no_revision(run):
    assert "no MODEL is given" in refused(lambda: find(None, None, ["step5000"]))
    assert "has no revisions" in refused(lambda: find(str(run / "step5"), None, ["step5000"]))
    assert "has no revisions" in refused(lambda: find("olmoe-tiny", None, ["step5000"]))
    assert "no MODEL" in refused(lambda: find(None, None, [""]))


def test_other_shapes_are_refused_before_anything_is_traced(run, texts, tmp_path):
    export.save(make_model(num_hidden_layers=1), tmp_path / "step1")
    wanted = Checkpoint(run / "step5").config
    require_alike(wanted, find(None, None, [run]))
    assert "num_hidden_layers 1" in refused(lambda: require_alike(wanted, find(None, None, [tmp_path / "step1"])))
    out = tmp_path / "out"
    given = [tmp_path / "step1"]
    assert "of one run" in refused(lambda: analyze(run / "step100", texts, out, revisions=given, report=False))
    given = [run / "step100"]
    assert "no earlier" in refused(lambda: analyze(run / "step100", texts, out, revisions=given, report=False))
    assert "no earlier" in refused(lambda: analyze(None, texts, out, revisions=given, report=False))
    assert not out.exists()


# ---- what is measured ----


def test_against_loops(run, texts, tmp_path):
    """Each checkpoint is traced by an analysis of its own, and compared token by token."""
    found = analyze(None, texts, tmp_path / "out", revisions=[run], report=False)
    assert (found["model"], names_of(found)) == ("step100", [("step5", 5), ("step40", 40)])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "trace.safetensors"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["revisions"] == found["revisions"]
    traces = {}
    for step in STEPS:
        analyze(run / f"step{step}", texts, tmp_path / str(step), report=False)
        traces[step] = Trace.open(tmp_path / str(step) / "trace.safetensors")
    final = traces[100]
    for step, each in zip(STEPS, found["revisions"], strict=False):
        trace = traces[step]
        n, layers, k = trace.expert_ids.shape
        inside = [i for i in range(n - 1) if i + 1 not in trace.starts]
        right = [trace.predicted_ids[i] == trace.input_ids[i + 1] for i in inside]
        assert each["accuracy"] == pytest.approx(np.mean(right))
        for layer in range(layers):
            numbers = each["layers"][str(layer)]
            rows = list(zip(trace.expert_ids[:, layer].tolist(), final.expert_ids[:, layer].tolist(), strict=True))
            assert numbers["saturation_k"] == pytest.approx(sum(len({*a} & {*b}) / k for a, b in rows) / n)
            assert numbers["saturation_1"] == pytest.approx(sum(a[0] == b[0] for a, b in rows) / n)
            load = np.bincount([e for a, _ in rows for e in a], minlength=trace.experts)
            assert numbers["max_over_mean"] == pytest.approx(max(load) * trace.experts / sum(load))
            assert numbers["dead"] == sum(load == 0)
            parts = [x / sum(load) for x in load if x]
            assert numbers["entropy"] == pytest.approx(-sum(p * np.log(p) for p in parts) / np.log(trace.experts))
            weights = trace.weights[:, layer].astype(float).tolist()
            assert numbers["first"] == pytest.approx(sum(w[0] for w in weights) / n)
            assert numbers["margin"] == pytest.approx(sum(w[0] - w[1] for w in weights) / n)
            assert numbers["mass"] == pytest.approx(sum(map(sum, weights)) / n)
            before = [
                len({*a} & {*b}) / k
                for i, (a, b) in enumerate(pairwise([a for a, _ in rows]))
                if i + 1 not in trace.starts
            ]
            assert numbers["neighbours"] == pytest.approx(np.mean(before))
            first = np.bincount([a[0] for a, _ in rows], minlength=trace.experts) / n
            for name, part in domains_of(trace).items():
                own = rows[part]
                domain = each["domains"][name]
                assert domain["top_k"][layer] == pytest.approx(np.mean([len({*a} & {*b}) / k for a, b in own]))
                assert domain["top_1"][layer] == pytest.approx(np.mean([a[0] == b[0] for a, b in own]))
                mine = np.bincount([a[0] for a, _ in own], minlength=trace.experts) / len(own)
                assert domain["distance"][layer] == pytest.approx(np.abs(mine - first).sum() / 2)
    far, near = ([v["saturation_k"] for v in each["layers"].values()] for each in found["revisions"])
    assert all(a < b < 1 for a, b in zip(far, near, strict=True))


def names_of(found):
    return [(each["name"], each["step"]) for each in found["revisions"]]


def test_one_at_a_time_and_finished_ones_are_not_traced_again(run, texts, tmp_path, monkeypatch):
    record, traced = tracing.record, []

    def interrupted(runner, documents, writer, **options):
        traced.append(writer._path.parent)
        parts = [p.suffix for p in (tmp_path / "out").glob(".part-*")] if (tmp_path / "out").exists() else []
        most.append(parts.count(".safetensors"))
        for step in record(runner, documents, writer, **options):
            if len(traced) == 6:
                raise KeyboardInterrupt
            yield step

    most: list[int] = []
    whole = analyze(None, texts, tmp_path / "whole", revisions=[run], report=False)
    monkeypatch.setattr(tracing, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze(None, texts, tmp_path / "out", revisions=[run], report=False)
    # The model's two domains, those of the first revision, and the first of the second are done.
    left = sorted(p.suffix for p in (tmp_path / "out").iterdir())
    assert left == [".json", *[".safetensors"] * 4]
    assert max(most) == 3  # of no other checkpoint than the one that is being read
    assert analyze(None, texts, tmp_path / "out", revisions=[run], report=False) == whole
    assert len(traced) == 7
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "trace.safetensors"]


def test_progress_counts_every_checkpoint(run, texts, tmp_path):
    moves = []
    found = analyze(None, texts, tmp_path / "o", revisions=[run], report=False, progress=lambda *m: moves.append(m))
    assert moves[-1] == (3 * found["tokens"], 3 * found["tokens"])


def test_a_run_of_olmoe_train(tokenizer_file, texts, tmp_path):
    """Its folder is enough: earlier checkpoints against the newest, and against the best one where that is given."""
    path = training_runs.write_run(tmp_path, tokenizer_file, checkpoint={"every_steps": 3, "keep": 9})
    best = train(load_config(path), show_progress=False)
    found = analyze(None, texts, tmp_path / "a", revisions=[tmp_path / "out"], report=False)
    assert (found["model"], names_of(found)) == (
        "step-0000012",
        [("step-0000003", 3), ("step-0000006", 6), ("step-0000009", 9)],
    )
    mean = [np.mean([v["saturation_k"] for v in each["layers"].values()]) for each in found["revisions"]]
    assert found["chance"]["saturation_k"] < mean[0] < mean[2] < 1
    against = analyze(best, texts, tmp_path / "b", revisions=[tmp_path / "out"], report=False)
    assert (against["model"], [step for _, step in names_of(against)]) == ("best", [3, 6, 9, 12])


def test_revisions_on_the_hub(run, texts, tmp_path, monkeypatch, tokenizer_file):
    """From its cache, as `--revision` reads them."""
    repository = tmp_path / "cache" / "models--owner--tiny"
    for number, (ref, step) in enumerate((("step5-tokens1B", 5), ("main", 100))):
        commit = str(number) * 40
        shutil.copytree(run / f"step{step}", repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    options = {"report": False, "local_files_only": True}
    found = analyze("owner/tiny", texts, tmp_path / "a", revisions=["step5-tokens1B"], **options)
    same = analyze(run / "step100", texts, tmp_path / "b", revisions=[run / "step5"], report=False)
    assert found["revisions"][0]["name"] == "step5-tokens1B"
    assert found["revisions"][0]["layers"] == same["revisions"][0]["layers"]
    message = refused(lambda: analyze("owner/tiny", texts, tmp_path / "c", revisions=["step6"], **options))
    assert "step6" in message
    assert not (tmp_path / "c").exists()


def test_checkpoints_that_read_otherwise(run, texts, tmp_path, tokenizer_file):
    """One without a tokenizer reads as the model does; another tokenizer is refused."""
    shutil.copytree(run / "step5", tmp_path / "step5")
    (tmp_path / "step5" / "tokenizer.json").unlink()
    found = analyze(run / "step100", texts, tmp_path / "a", revisions=[tmp_path / "step5"], report=False)
    same = analyze(run / "step100", texts, tmp_path / "b", revisions=[run / "step5"], report=False)
    assert found["revisions"] == same["revisions"]
    other = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    other["model"]["merges"] = other["model"]["merges"][:5]
    (tmp_path / "step5" / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    given = [tmp_path / "step5"]
    message = refused(lambda: analyze(run / "step100", texts, tmp_path / "c", revisions=given, report=False))
    assert "different tokens" in message
    assert not (tmp_path / "c").exists()
