"""The figures of a training run show its records."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

from olmoe.analysis.drawing import image_bytes
from olmoe.analysis.training import read_curves
from olmoe.analysis.training_figures import draw_training, max_over_mean
from run_records import write_records


def lines(figure, axis: int = 0) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[axis].lines}


def test_figures_are_drawn_of_what_was_recorded(tmp_path):
    curves = read_curves(write_records(tmp_path, steps=30))
    drawn = draw_training(curves)
    assert list(drawn) == ["loss", "bits", "schedule", "load", "balance", "margins", "speed"]
    assert lines(drawn["loss"])["training"] == curves.mean["cross_entropy"].tolist()
    assert lines(drawn["loss"])["books"] == [2.0, 1.5, 1 + 1 / 3]
    assert lines(drawn["bits"])["books"] == [1.0, 0.75, (1 + 1 / 3) / 2]
    (image,) = drawn["load"].axes[0].images
    assert image.get_array().shape == (2 * 4, 30)  # experts of layers, steps
    np.testing.assert_allclose(image.get_array()[5], curves.load[:, 1, 1] / curves.load[:, 1].mean(axis=1))
    assert lines(drawn["balance"])["1"] == max_over_mean(curves)[:, 1].tolist()
    assert lines(drawn["balance"], 2)["0"] == [1.0] * 30
    assert [ax.get_title() for ax in drawn["speed"].axes] == ["tokens/s", "MFU, %", "peak memory, GB"]
    assert all(b"<svg" in image_bytes(figure, "svg") for figure in drawn.values())


def test_bands_are_the_range_of_the_steps_of_a_point(tmp_path):
    path = write_records(tmp_path, steps=30)
    assert not draw_training(read_curves(path))["loss"].axes[0].collections
    (band,) = draw_training(read_curves(path, most=10))["loss"].axes[0].collections
    ends = band.get_paths()[0].get_extents()
    assert (ends.y0, ends.y1) == (pytest.approx(3.0 - 0.03 * 30), pytest.approx(3.0 - 0.03))


def test_a_run_of_an_older_version_has_fewer_figures(tmp_path):
    path = write_records(tmp_path, steps=5, without=("expert_load", "expert_entropy", "dead_experts", "router_margin",
        "router_cutoff_margin", "mfu", "peak_memory_bytes", "held_out_loss"))  # fmt: skip
    assert list(draw_training(read_curves(path))) == ["loss", "schedule", "speed"]
