"""The figure of an experiment: what is drawn, not how it looks."""

from __future__ import annotations

import copy
import importlib.util

import pytest

from olmoe.errors import UserError
from olmoe.train.experiment import figure
from olmoe.train.experiment.statistics import estimate, t_quantile

pytest.importorskip("matplotlib")


def arm(label, *curves):
    runs = {str(seed): {"curve": [list(point) for point in curve]} for seed, curve in enumerate(curves, 1)}
    return {"label": label, "compared": True, "loss": {"n": len(curves)}, "runs": runs}


def results():
    return {
        "title": "Costs $5 or $6",
        "arms": {
            "a": arm("dense", [(1e6, 9.0), (2e6, 5.0)], [(1e6, 9.5), (2e6, 5.2)]),
            "b": arm("sparse", [(1e6, 9.1), (2e6, 4.0)], [(1e6, 9.1), (2e6, 4.4), (3e6, 4.0)]),
        },
        "comparisons": [
            {"from": "a", "to": "b", "differences": {"1": -1.0, "2": -0.8}, "mean": -0.9, "low": -2.2, "high": 0.4}
        ],
    }


def test_curves_are_means_with_confidence_bands():
    curves, differences = figure._draw(results()).axes
    lines = {line.get_label(): line for line in curves.get_lines()}
    assert lines["dense"].get_xydata().tolist() == [[1.0, 9.25], [2.0, 5.1]]
    assert lines["sparse"].get_xydata()[1] == pytest.approx([2.0, 4.2])  # where both seeds have a point
    band = curves.collections[0].get_datalim(curves.transData)
    half = t_quantile(0.95, 1) * estimate([9.0, 9.5]).sd / 2**0.5
    assert (band.y1, band.y0) == pytest.approx((9.25 + half, min(9.25 - half, 5.1 - 12.7062 * 0.1)), abs=1e-3)
    points, interval, mean = differences.get_lines()[1:]
    assert points.get_xdata().tolist() == [-1.0, -0.8]
    assert list(interval.get_xdata()) == [-2.2, 0.4]
    assert list(mean.get_xdata()) == [-0.9]
    assert [text.get_text() for text in differences.get_yticklabels()] == ["sparse"]
    assert differences.get_title() == "against dense"


def test_one_seed_has_neither_band_nor_interval():
    single = results()
    for each in single["arms"].values():
        del each["runs"]["2"]
    single["comparisons"][0] |= {"differences": {"1": -1.0}, "low": None, "high": None}
    curves, differences = figure._draw(single).axes
    assert len(curves.collections) == 0
    assert len(differences.get_lines()) == 3
    assert figure.png(single).startswith(b"\x89PNG")


def test_figures_are_byte_identical_and_can_show_selected_arms():
    assert figure.png(results()) == figure.png(copy.deepcopy(results()))
    assert figure.png(results() | {"comparisons": []}).startswith(b"\x89PNG")


def test_missing_matplotlib_is_reported(monkeypatch):
    figure.require_matplotlib()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--no-figure"):
        figure.require_matplotlib()
