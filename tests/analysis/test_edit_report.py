"""The report of an edit against other ways to the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import TEXT, make_model
from edited_models import edited_folder, every_edit
from olmoe.analysis import metrics, quality
from olmoe.analysis.edit_report import measure_edit
from olmoe.ops import cpu
from olmoe.runner import make_runner
from olmoe.weights import checkpoint, export, sample_text
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.source import tokenizer_of
from packed_folders import WHOLE, packed_folder
from sentences import refused

BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason="kernels"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    path = tmp_path_factory.mktemp("report") / "model"
    export.save(make_model(), path, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    (path / "a.txt").write_text(TEXT, encoding="utf-8")
    (path / "b.txt").write_text("The dog and the ball. " * 40, encoding="utf-8")
    return {"a": path / "a.txt", "b": path / "b.txt"}


@pytest.fixture(scope="module")
def edited(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("out")
    start = Blueprint.unchanged(open_source(folder).config)
    return {kind: edited_folder(folder, path / kind, blueprint) for kind, blueprint in every_edit(start).items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_those_of_quality_where_models_can_be_compared(folder, edited, texts, backend):
    report = measure_edit(folder, edited["top_k"], texts=texts, tokens=300, backend=backend, speed=False)
    for name, path in texts.items():
        ids = sample_text.read_ids(path, tokenizer_of(open_source(folder)))[:300]
        expected = quality.compare(checkpoint.load(folder), checkpoint.load(edited["top_k"]), ids, 128)
        found = report.texts[name].quality
        assert found.tokens == expected.tokens == len(ids) - 1
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert found.reference_perplexity == pytest.approx(expected.reference_perplexity, rel=1e-4)
        assert found.kl_mean == pytest.approx(expected.kl_mean, rel=1e-3)
        assert found.routing_agreement == pytest.approx(expected.routing_agreement, abs=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_order_agrees_in_everything(folder, edited, texts, backend):
    report = measure_edit(folder, edited["reordered"], texts=texts, backend=backend, speed=False)
    for text in report.texts.values():
        assert text.quality.kl_mean == pytest.approx(0, abs=1e-5)
        assert text.quality.routing_agreement == pytest.approx((1, 1))
        order = [[3, 0, 7, 1, 6, 2, 5, 4], [7, 6, 5, 4, 0, 1, 2, 3]]
        for layer in range(2):
            np.testing.assert_allclose(text.edited_load[layer], text.original_load[layer][order[layer]])


def test_load_is_that_of_a_trace(folder, texts):
    policy = texts["a"].parent / "policy.json"
    policy.write_text(json.dumps({"ban": [{"layer": 0, "expert": 3}], "k": 2}))
    report = measure_edit(folder, policy=policy, texts={"b": texts["b"]}, tokens=129, speed=False)
    ids = sample_text.read_ids(texts["b"], tokenizer_of(open_source(folder)))[:129]
    runner = make_runner(checkpoint.load(folder), "torch")
    from olmoe.runner import Batch, CacheView, RouterPolicy, Want

    for of_report, given in (
        (report.texts["b"].original_load, None),
        (report.texts["b"].edited_load, RouterPolicy(banned=[[e == 3 for e in range(8)], [False] * 8], top_k=2)),
    ):
        blocks = runner.new_cache(1, 128)
        view = CacheView(blocks, np.zeros((1, 1), dtype=np.int32))
        resolved = None if given is None else given.resolve(runner.config)
        out = runner.forward(Batch(ids[:-1], [128], [0], [128], [resolved]), view, Want((), range(128)))
        np.testing.assert_allclose(of_report, metrics.load(out.trace.expert_ids.numpy(), 8), atol=0.02)
        assert of_report.sum(axis=1) == pytest.approx(3 if given is None else 2)
    assert report.texts["b"].edited_load[0, 3] == 0
    assert (report.policy, report.names) == ("policy.json", ("model", "model"))
    assert report.edited.top_k == 2
    assert report.edited.file_bytes == report.original.file_bytes
    assert report.edited.bytes_a_token < report.original.bytes_a_token


def test_pruning_is_the_policy_that_bans(folder, edited, texts):
    blueprint = every_edit(Blueprint.unchanged(open_source(folder).config))["pruned"]
    policy = texts["a"].parent / "ban.json"
    gone = [
        (i, e)
        for i, plan in enumerate(blueprint.layers)
        for e in range(8)
        if e not in {m.experts[0] for m in plan.experts}
    ]
    policy.write_text(json.dumps({"ban": [{"layer": i, "expert": e} for i, e in gone]}))
    one = measure_edit(folder, edited["pruned"], texts=texts, speed=False).texts["a"]
    other = measure_edit(folder, policy=policy, texts=texts, speed=False).texts["a"]
    assert one.quality.perplexity == pytest.approx(other.quality.perplexity, rel=1e-5)
    assert one.quality.kl_mean == pytest.approx(other.quality.kl_mean, rel=1e-3)
    assert one.quality.routing_agreement == pytest.approx(other.quality.routing_agreement)
    for layer, plan in enumerate(blueprint.layers):
        kept = [mix.experts[0] for mix in plan.experts]
        np.testing.assert_allclose(one.edited_load[layer], other.edited_load[layer][kept])


def test_merged_experts_agree_with_each_that_they_were(folder, texts, tmp_path):
    """All experts of every layer in one: whatever the original chooses is in it."""
    start = Blueprint.unchanged(open_source(folder).config)
    whole = start.merged([[range(8)]] * 2, [[1.0] * 8] * 2).with_routing(1).with_copies([0])
    report = measure_edit(folder, edited_folder(folder, tmp_path / "out", whole), texts=texts, speed=False)
    assert report.texts["a"].quality.routing_agreement == pytest.approx((1, 1, 1))
    assert report.texts["a"].edited_load == pytest.approx(np.ones((3, 1)))


def test_bytes(folder, edited, tmp_path):
    report = measure_edit(folder, edited["pruned"], speed=False, tokens=50)
    d, f, v = 32, 12, 320
    attention = 4 * d * d + 2 * d
    beside = v * d + d + 2 * (attention + 2 * d)
    assert report.original.bytes_a_token == 4 * (beside + 2 * (8 * d + 3 * 3 * d * f))
    assert report.edited.bytes_a_token == 4 * (beside + 2 * (6 * d + 3 * 3 * d * f))
    for model, path in ((report.original, folder), (report.edited, edited["pruned"])):
        assert model.file_bytes == (path / "model.safetensors").stat().st_size
    packed = packed_folder(tmp_path / "packed", "q4_0", folder / "tokenizer.json", **WHOLE)
    report = measure_edit(
        packed,
        edited_folder(packed, tmp_path / "out", Blueprint.unchanged(open_source(packed).config).with_routing(1)),
        speed=False,
        tokens=50,
    )
    assert report.original.bytes_a_token - report.edited.bytes_a_token == 2 * 2 * (3 * d * 32) * 18 // 32


def test_speed_tables_and_json(folder, edited, texts):
    report = measure_edit(folder, edited["together"], texts=texts, tokens=100)
    assert report.edited.prompt_tokens_per_s > 0
    assert report.original.decode_tokens_per_s > 0
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["schema"] == "olmoe-edit-report-1"
    assert found["models"]["edited"]["layers"] == 3
    assert len(found["texts"]["a"]["routing_agreement"]) == 3
    assert np.shape(found["texts"]["b"]["load"]["edited"]) == (3, 6)
    table = report.table()
    assert "| experts per layer | 8 | 6 |  |" in table
    assert "| decoding, tokens/s |" in table
    assert len([line for line in table.splitlines() if line.startswith(("| a |", "| b |"))]) == 4


def test_a_packed_copy_of_an_edited_model(folder, edited, texts, tmp_path):
    """The blueprint goes where the weights go."""
    from olmoe.weights.quantize import quantize

    quantize(edited["reordered"], tmp_path / "packed", "q8_0")
    report = measure_edit(folder, tmp_path / "packed", texts=texts, tokens=200, speed=False)
    assert report.texts["a"].quality.routing_mean > 0.9


def test_mistakes(folder, edited, texts, tmp_path):
    for options, wanted in (
        ({}, "give one of them"),
        ({"edited": edited["pruned"], "policy": "x.json"}, "give one of them"),
        ({"edited": edited["pruned"], "tokens": 1}, "at least 2 tokens, not 1"),
        ({"edited": edited["pruned"], "texts": {}}, "0 texts"),
        ({"edited": tmp_path}, "config.json"),
        ({"policy": tmp_path / "none.json"}, "none.json"),
    ):
        assert wanted in refused(lambda options=options: measure_edit(folder, **options))
    other = edited_folder(
        folder, tmp_path / "other", every_edit(Blueprint.unchanged(open_source(folder).config))["pruned"]
    )
    (other / "olmoe_edit.json").write_text("{}")
    assert "cannot be used" in refused(lambda: measure_edit(folder, other))
    (other / "olmoe_edit.json").write_text("[")
    assert "not a JSON object" in refused(lambda: measure_edit(folder, other))
    (other / "olmoe_edit.json").unlink()
    assert "has no olmoe_edit.json" in refused(lambda: measure_edit(folder, other))
