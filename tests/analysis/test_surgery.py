"""Which experts an edit chooses, against loops; what it asks of the user; permuting experts permutes it all."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import TEXT, make_model
from edited_models import LOAD, edited_folder, run
from olmoe.analysis import surgery
from olmoe.analysis.contributions import Contributions, measure_contributions
from olmoe.analysis.surgery import Edits, apply, calibration_windows, edit, group_alike, least, plan, read_lists
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint, export
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import open_source
from packed_folders import WHOLE, packed_folder
from sentences import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    path = tmp_path_factory.mktemp("surgery") / "model"
    export.save(make_model(), path, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(folder):
    return Blueprint.unchanged(open_source(folder).config)


def contributions(similarity=None):
    load = np.array(LOAD)
    return Contributions(100, load, load[:, ::-1] * 2, similarity)


def kept(blueprint, layer=0):
    return [mix.experts for mix in blueprint.layers[layer].experts]


# ---- which experts ----


def test_the_least_useful_go(start):
    by_load = apply(start, Edits(prune=3, by="load"), contributions())
    assert kept(by_load) == [(1,), (4,), (5,), (6,), (7,)]
    by_reap = apply(start, Edits(prune=3), contributions())
    assert kept(by_reap) == [(0,), (1,), (2,), (3,), (6,)]  # of LOAD backwards: 4, 5 and 7 are least


def test_of_equal_scores_the_last_go():
    assert least(np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 1.0, 2.0]]), 2) == [[2, 3], [2, 3]]
    assert least(np.zeros((1, 4)), 0) == [[]]


def test_random_experts_are_those_of_the_seed(start):
    a, b, c = (apply(start, Edits(prune=4, by="random", seed=seed), None) for seed in (0, 0, 1))
    assert a == b != c
    assert kept(a, 0) != kept(a, 1)


@settings(max_examples=100, deadline=None)
@given(arrays(np.float64, (7, 7), elements=st.floats(-1, 1)), st.integers(0, 6))
def test_groups_are_those_of_a_loop(values, fewer):
    """Average linkage by its definition: all pairs of groups, all pairs in them."""
    similarity = np.round(values + values.T, 3)
    groups = [[e] for e in range(7)]
    for _ in range(fewer):

        def mean(pair, groups=groups):
            a, b = pair
            return sum(similarity[i, j] for i in groups[a] for j in groups[b]) / (len(groups[a]) * len(groups[b]))

        pairs = list(itertools.combinations(range(len(groups)), 2))
        best = max(mean(pair) for pair in pairs)
        a, b = next(pair for pair in pairs if mean(pair) > best - 1e-9)
        ties = sum(mean(pair) > best - 1e-9 for pair in pairs)
        if ties > 1:
            return  # rounding may decide
        groups[a] += groups.pop(b)
    assert group_alike(similarity, [(e,) for e in range(7)], fewer) == [sorted(g) for g in groups if len(g) > 1]


def test_merged_experts_are_alike_by_all_their_members(start):
    similarity = np.zeros((2, 8, 8))
    similarity[:, 0, 1] = similarity[:, 1, 0] = 0.9
    similarity[:, 2, 0] = similarity[:, 0, 2] = 0.8
    similarity[:, 2, 3] = similarity[:, 3, 2] = 0.5
    once = apply(start, Edits(merge=1), contributions(similarity))
    assert kept(once)[0] == (0, 1)
    # 2 is nearer to 0 than to 3, but not to 0 and 1 together.
    twice = apply(once, Edits(merge=1), contributions(similarity))
    assert kept(twice)[:2] == [(0, 1), (2, 3)]
    assert kept(apply(start, Edits(merge=2), contributions(similarity))) == kept(twice)


def test_edits_apply_in_their_order(start):
    found = contributions(np.ones((2, 8, 8)))
    edits = Edits(top_k=2, duplicate_layers=[1], layers=[1, 0], reorder="load", merge=1, prune=[0, 1], seed=5)
    steps = start
    for single in (
        Edits(prune=[0, 1]), Edits(merge=1), Edits(reorder="load"), Edits(layers=[1, 0]), Edits(duplicate_layers=[1]),
        Edits(top_k=2),
    ):  # fmt: skip
        steps = apply(steps, single, found)
    blueprint = apply(start, edits, found)
    assert blueprint == steps
    assert [layer.origin for layer in blueprint.layers] == [1, 0, 0]
    busiest = [sum(LOAD[0][e] for e in mix.experts) for mix in blueprint.layers[1].experts]
    assert busiest == sorted(busiest, reverse=True)


def test_what_changes_something():
    assert Edits().named() == {}
    assert Edits(by="load", seed=3, duplicate_layers=[]).named() == {}
    assert Edits(prune=2).named() == {"prune": 2, "by": "reap"}
    assert Edits(prune=2, by="random").named() == {"prune": 2, "by": "random", "seed": 0}
    assert Edits(prune=[1], normalize_top_k=False).named() == {"prune": [1], "normalize_top_k": False}


# ---- from text to folders ----


def test_an_edit_of_a_folder(folder, text, start, tmp_path):
    steps = []
    blueprint = edit(
        folder, tmp_path / "out", Edits(prune=2, merge=1, reorder="load", top_k=2), calibration=[text], tokens=200,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    source = open_source(folder)
    found = measure_contributions(source, calibration_windows(source, [text], 200), similarity=True)
    assert blueprint == apply(start, Edits(prune=2, merge=1, reorder="load", top_k=2), found)
    assert checkpoint.load(tmp_path / "out").config == blueprint.config
    notes = json.loads((tmp_path / "out/olmoe_edit.json").read_text())
    assert notes["model"] == "model"
    assert notes["edits"] == {"prune": 2, "by": "reap", "merge": 1, "reorder": "load", "top_k": 2}
    assert steps[15] == (16, 16)
    assert steps[-1][0] == steps[-1][1]


def test_merging_without_text(folder, start):
    blueprint = plan(open_source(folder), Edits(merge=3), calibration=None)
    assert blueprint.num_experts == 5
    for layer in blueprint.layers:
        for mix in layer.experts:
            assert mix.weights == pytest.approx([1 / len(mix.experts)] * len(mix.experts))


def test_packed_models_are_chosen_from_what_they_decode_to(text, tokenizer_file, tmp_path):
    packed = packed_folder(tmp_path / "packed", "int8", tokenizer_file, **WHOLE)
    blueprint = edit(packed, tmp_path / "out", Edits(prune=3), calibration=[text])
    found = measure_contributions(open_source(packed), calibration_windows(open_source(packed), [text]))
    assert blueprint == apply(Blueprint.unchanged(open_source(packed).config), Edits(prune=3), found)


def test_permuting_experts_permutes_what_is_chosen(folder, text, start, tmp_path):
    orders = [[3, 0, 7, 1, 6, 2, 5, 4], [7, 6, 5, 4, 0, 1, 2, 3]]
    moved = edited_folder(folder, tmp_path / "moved", start.reordered(orders))
    for edits in (Edits(prune=3), Edits(prune=3, by="load"), Edits(merge=2)):
        one, other = (plan(open_source(path), edits, calibration=[text]) for path in (folder, moved))
        for layer in range(2):
            were = {frozenset(orders[layer][e] for e in experts) for experts in kept(other, layer)}
            assert were == set(map(frozenset, kept(one, layer)))
    edit(folder, tmp_path / "a", Edits(prune=3), calibration=[text])
    edit(moved, tmp_path / "b", Edits(prune=3), calibration=[text])
    np.testing.assert_allclose(run(tmp_path / "a", "torch")[0], run(tmp_path / "b", "torch")[0], rtol=1e-3, atol=1e-3)


def test_calibration_text_comes_from_all_files(folder, tmp_path, tokenizer_file):
    tokenizer = Tokenizer.from_folder(folder)
    (tmp_path / "a.txt").write_text("dog " * 500)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "ball " * 500}) + "\n")
    windows = calibration_windows(open_source(folder), [tmp_path / "a.txt", tmp_path / "b.jsonl"], 256)
    assert windows.shape == (2, 128)
    assert windows[0].tolist() == tokenizer.encode(("dog " * 500).strip())[:128]
    assert windows[1].tolist() == tokenizer.encode(("ball " * 500).strip())[:128]
    (tmp_path / "short.txt").write_text("A dog.")
    assert calibration_windows(open_source(folder), [tmp_path / "short.txt"]).shape[0] == 1


# ---- lists ----


def test_lists(tmp_path, start):
    path = tmp_path / "lists.json"
    for written, wanted in (
        ("[1, 2]", [[1, 2], [1, 2]]),
        ("[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ('{"1": [3, 4], "0": [1, 2]}', [[1, 2], [3, 4]]),
    ):
        path.write_text(written)
        assert surgery.by_layer(read_lists(path), start) == wanted
    path.write_text("[[7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]]")
    assert kept(apply(start, Edits(reorder=read_lists(path)), None))[0] == (7,)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("", "JSON"),
        ('{"a": [1]}', "JSON"),
        ('{"0": [1]}', "no experts of layer 1"),
        ('{"0": [1], "2": [1]}', "no layer 2"),
        ("[[1]]", "1 lists of experts, but 2 layers"),
        ("[[1], 2]", "lists of numbers"),
        ("[[1], [true]]", "lists of numbers"),
        ('"12"', "lists of numbers"),
        ("3", "lists of numbers"),
        ("[[1], [2, 3]]", "one number for all layers"),
        ("[8]", "no expert 8"),
    ],
)
def test_other_lists(written, wanted, tmp_path, folder):
    path = tmp_path / "lists.json"
    path.write_text(written)
    assert wanted in refused(lambda: edit(folder, tmp_path / "out", Edits(prune=read_lists(path))))
    assert not (tmp_path / "out").exists()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("edits", "options", "wanted"),
    [
        ({}, {}, "Nothing is to be edited"),
        ({"prune": 8}, {}, "prune must be from 0 to 7, not 8"),
        ({"prune": -1}, {}, "prune must be from 0 to 7, not -1"),
        ({"merge": 8}, {}, "merge must be from 0 to 7, not 8"),
        ({"prune": 4, "merge": 4}, {}, "merge must be from 0 to 3, not 4"),
        ({"prune": 6}, {}, "choose 3 experts, but a layer has 2"),
        ({"merge": 7}, {}, "choose 3 experts, but a layer has 1"),
        ({"top_k": 9}, {}, "choose 9 experts"),
        ({"duplicate_layers": [2]}, {}, "no layer 2"),
        ({"layers": []}, {}, "Nothing is to be edited"),
        ({"prune": 2, "by": "luck"}, {}, "by 'luck'"),
        ({"reorder": "size"}, {}, "ordered by 'size'"),
        ({"prune": 2}, {"calibration": None}, "no"),
        ({"reorder": "load"}, {"calibration": None}, "give calibration text"),
        ({"prune": 2}, {"calibration": ["nowhere.txt"]}, "does not exist"),
        ({"prune": 2}, {"calibration": []}, "no calibration text"),
        ({"prune": 2}, {"tokens": 0}, "at least 1, not 0"),
    ],
    ids=str,
)
def test_mistakes(edits, options, wanted, folder, tmp_path):
    assert wanted in refused(lambda: edit(folder, tmp_path / "out", Edits(**edits), **options))
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_refused_before_anything_is_read(folder, tmp_path, monkeypatch):
    edit(folder, tmp_path / "out", Edits(top_k=2))
    monkeypatch.setattr(surgery, "measure_contributions", None)
    assert "exists already" in refused(lambda: edit(folder, tmp_path / "out", Edits(prune=2)))
    assert "exists already" in refused(lambda: edit("no/such-model", tmp_path / "out", Edits(prune=2)))
    (tmp_path / "out" / "notes").write_text("")
    assert "not replaced" in refused(lambda: edit(folder, tmp_path / "out", Edits(prune=2), overwrite=True))
    monkeypatch.undo()
    (tmp_path / "out" / "notes").unlink()
    assert edit(folder, tmp_path / "out", Edits(prune=[0]), overwrite=True).num_experts == 7
    assert checkpoint.load(tmp_path / "out").config.num_experts == 7


def test_a_model_without_a_tokenizer(tmp_path):
    export.save(make_model(), tmp_path / "model")
    assert "tokenizer.json" in refused(lambda: edit(tmp_path / "model", tmp_path / "out", Edits(prune=2)))
    assert edit(tmp_path / "model", tmp_path / "out", Edits(prune=2, by="random")).num_experts == 6
