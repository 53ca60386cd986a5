"""The heat map of experts: shades by share, and it fits the terminal."""

from __future__ import annotations

import numpy as np
import pytest

from olmoe.cli.expert_map import PLAIN_SHADES, expert_map


def test_shades_follow_the_shares():
    use = np.array([[1.0, 0.5, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0], [0.0] * 7 + [1.0]])  # an even share is 0.175
    head, first, second, scale = expert_map(use, 80, PLAIN_SHADES).splitlines()
    assert head == "    experts 0 to 7, a row a layer  most used"
    assert first.startswith(" 0  #+:.      0: 100%    1: 50%     2: 20%     3: 10%")
    assert second == " 1         #  7: 100%"
    assert "even share is 17.5% of the tokens" in scale


def test_equal_shares_have_equal_shades():
    row = expert_map(np.full((1, 8), 0.25), 80, PLAIN_SHADES).splitlines()[1]
    assert row.startswith(" 0  ::::::::  0: 25%")


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("experts", [8, 64, 128])
def test_it_fits_the_terminal(width, experts):
    use = np.random.default_rng(0).random((16, experts))
    lines = expert_map(use, width).splitlines()
    assert len(lines) == 18
    assert max(map(len, lines[1:17])) <= width
    if experts == 64 and width >= 80:
        assert "experts 0 to 63" in lines[0]  # a cell each
    assert all(": " in line for line in lines[1:17])  # at least one expert is named


def test_neighbours_share_a_cell_where_it_is_narrow():
    use = np.zeros((1, 64))
    use[0, 62:] = 0.5
    head, row, _ = expert_map(use, 40, PLAIN_SHADES).splitlines()
    assert "3 experts a cell" in head
    assert row == " 0  " + " " * 20 + "##  62: 50%"


def test_an_answer_without_experts_is_blank():
    assert expert_map(np.zeros((1, 4)), 80, PLAIN_SHADES).splitlines()[1] == " 0      "
