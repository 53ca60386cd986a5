"""The tables of an experiment."""

from __future__ import annotations

from olmoe.train.experiment.table import markdown

RESULTS = {
    "title": "Small",
    "question": "Is it?",
    "runs_planned": 4,
    "runs_finished": 4,
    "arms": {
        "a": {
            "label": "first", "parameters": 4_330_000, "active_parameters": 1_570_000, "tokens": 512_000,
            "tokens_before": 512_000, "loss": {"n": 2, "mean": 5.12344, "sd": 0.01},
            "runs": {"1": {"max_load_over_mean": 1.0}, "2": {"max_load_over_mean": 2.0}},
        },
        "b": {
            "label": "second", "parameters": 1_570_000, "active_parameters": 1_570_000, "tokens": 1_024_000,
            "tokens_before": 0, "loss": {"n": 1, "mean": 5.0, "sd": None}, "runs": {"1": {"max_load_over_mean": 1.0}},
        },
    },
    "comparisons": [
        {
            "from": "a", "to": "b", "n": 2, "mean": -0.12, "low": -0.2, "high": -0.04, "t": -19.06, "p": 0.0334,
            "p_holm": 0.067,
        },
        {"from": "a", "to": "c", "n": 5, "mean": 0.1, "low": 0.09, "high": 0.11, "t": 40.0, "p": 2e-6, "p_holm": 4e-6},
        {"from": "b", "to": "c", "n": 1, "mean": 0.1, "low": None, "high": None, "t": None, "p": None},
    ],
}  # fmt: skip


def test_every_number_is_in_its_cell():
    lines = markdown(RESULTS).split("\n")
    assert lines[:3] == ["# Small", "", "Is it?"]
    assert "| a: first | 4.33M | 1.57M | 1,024,000 | 2 | 5.1234 | 0.0100 | 1.50 |" in lines
    assert "| b: second | 1.57M | 1.57M | 1,024,000 | 1 | 5.0000 | – | 1.00 |" in lines
    assert "| b − a | 2 | -0.1200 | -0.2000 to -0.0400 | -19.1 | 0.033 | 0.067 |" in lines
    assert "| c − a | 5 | +0.1000 | +0.0900 to +0.1100 | 40.0 | < 0.0001 | < 0.0001 |" in lines
    assert "| c − b | 1 | +0.1000 | – | – | – | – |" in lines
    assert "Only" not in markdown(RESULTS)


def test_an_unfinished_experiment_says_so():
    assert "Only 3 of 4 runs are finished." in markdown(RESULTS | {"runs_finished": 3})
