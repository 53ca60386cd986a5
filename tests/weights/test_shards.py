"""Cutting weights into files."""

from __future__ import annotations

import json

from olmoe.weights.shards import cut, write_index


def test_what_fits_is_one_file_without_an_index(tmp_path):
    shards = cut({"a": 4, "b": 6}, 10)
    assert shards == {"model.safetensors": ["a", "b"]}
    write_index(tmp_path, shards, 10)
    assert list(tmp_path.iterdir()) == []


def test_files_are_full_before_the_next_and_a_large_tensor_has_its_own(tmp_path):
    shards = cut({"a": 4, "b": 7, "c": 3, "d": 99, "e": 1}, 10)
    assert shards == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["b", "c"],
        "model-00003-of-00004.safetensors": ["d"],
        "model-00004-of-00004.safetensors": ["e"],
    }
    write_index(tmp_path, shards, 114)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 114}
    assert index["weight_map"]["c"] == "model-00002-of-00004.safetensors"
    assert list(index["weight_map"]) == ["a", "b", "c", "d", "e"]


def test_no_tensor_is_one_empty_file():
    assert cut({}, 10) == {"model.safetensors": []}
