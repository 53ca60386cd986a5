"""The page of a training run: complete in itself, true to its numbers."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

from olmoe.analysis.training import read_curves
from olmoe.analysis.training_page import training_findings, training_page
from run_records import write_records


def test_the_page_is_complete_in_itself(tmp_path):
    text = training_page("<small> & run", read_curves(write_records(tmp_path, steps=30)))
    assert "<title>Training of &lt;small&gt; &amp; run</title>" in text
    assert re.findall(r'<section id="(\w+)"', text) == [
        "loss", "bits", "schedule", "load", "balance", "margins", "speed",
    ]  # fmt: skip
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<script" not in text
    assert "http-equiv" not in text
    assert "30 steps, 1,920 tokens so far." in text
    assert re.search(r"<td>books</td>.*2\.000.*1\.333.*1,920.*1\.333.*0\.667", text)


def test_a_page_that_is_followed_is_read_again(tmp_path):
    text = training_page("run", read_curves(write_records(tmp_path, steps=30), most=10), reload=20)
    assert '<meta http-equiv="refresh" content="20">' in text
    assert "Each point is the mean of 4 steps, each band their range." in text


def test_sentences_are_computed(tmp_path):
    said = training_findings(read_curves(write_records(tmp_path, steps=30)))
    assert all(re.fullmatch(r"[A-Z][^\n]*[^.]\.", sentence) for sentence in said.values())
    assert "from 2.970 to 2.100 nats per token; on the held-out file books it is 1.333." in said["loss"]
    assert "was lowest at 1,920 tokens (0.6667) and is now 0.6667" in said["bits"]
    assert (
        "3.00e-02 after a peak of 3.00e-02; the largest gradient norm before clipping was 10 (step 1)"
        in (said["schedule"])
    )
    assert (
        "expert 0 of layer 0 had the highest load, 2.00 times the uniform one, and expert 3 of layer 0 the lowest "
        "(0.00)" in (said["load"])
    )
    assert (
        "1.97 times the uniform load, the entropy of a layer's load is 0.700 of the maximum, 1.0 experts"
        in (said["balance"])
    )
    assert "probability is 0.150 above the second's (0.150 at the start of the run)" in said["margins"]
    assert "is 0.1600 above the next one's, with the smallest margin in layer 0 (0.0200)" in said["margins"]
    assert "The median throughput is 1,000 tokens per second, 25.0% of the devices' peak" in said["speed"]
    assert "used at most 1.00 GB" in said["speed"]


@pytest.mark.parametrize(
    ("values", "figures", "says"),
    [
        ({"loss": 2.5, "max_load_over_mean": 3.0}, ["loss", "schedule", "speed"], "to 2.500 nats per token; on"),
        (
            {"loss": 0.69, "accuracy": 0.75, "margin": 0.5},
            ["loss", "preferences", "schedule", "speed"],
            "to 0.690; on",
        ),
    ],
    ids=["sft", "dpo"],
)
def test_fine_tuning_has_a_page_too(tmp_path, values, figures, says):
    """Was a KeyError: these runs have no cross_entropy."""
    step = {"tokens": 9, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_second": 10.0} | values
    records = [{"step": 0, "tokens": 0, "held_out_loss": {"chats": 2.0}}, {"step": 1} | step]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    curves = read_curves(tmp_path)
    assert re.findall(r'<section id="(\w+)"', training_page("run", curves)) == figures
    said = training_findings(curves)
    assert says in said["loss"]
    if "accuracy" in values:
        assert (
            "75% of pairs or answers were on the right side of the reference, and the mean margin was 0.500"
            in said["preferences"]
        )


def test_sentences_of_a_run_that_recorded_less(tmp_path):
    record = {"step": 1, "tokens": 4, "learning_rate": 1e-3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    said = training_findings(read_curves(tmp_path))
    assert all(re.fullmatch(r"[A-Z][^\n]*[^.]\.", sentence) for sentence in said.values())
