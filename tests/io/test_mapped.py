"""What was read of a mapped file is given back to the system, and there again when it is read once more."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from olmoe.io.mapped import forget


def resident() -> int:
    """Bytes of this process that come from files."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory")
def test_pages_are_given_back(tmp_path):
    size = 64 << 20
    np.arange(size // 8).tofile(tmp_path / "numbers")
    mapped = np.memmap(tmp_path / "numbers", dtype=np.int64, mode="r", shape=(size // 64, 8))
    whole, before = int(mapped.sum()), resident()
    forget(mapped[5:, 2:])  # a part of it stands for all
    assert resident() < before - size // 2
    assert int(mapped.sum()) == whole == (size // 8) * (size // 8 - 1) // 2


def test_other_arrays_stay_as_they_are():
    for array in (np.arange(5), np.arange(5)[::2], np.frombuffer(b"abcd", dtype=np.uint8), np.zeros(0)):
        copy = array.copy()
        forget(array)
        np.testing.assert_array_equal(array, copy)
