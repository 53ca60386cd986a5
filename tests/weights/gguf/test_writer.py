"""Files as the `gguf` package reads them, and the promises of streaming."""

from __future__ import annotations

import errno

import gguf
import numpy as np
import pytest
import torch

from olmoe.errors import UserError
from olmoe.weights.gguf.block_types import BY_NAME
from olmoe.weights.gguf.encode import encode
from olmoe.weights.gguf.reader import GGUFFile
from olmoe.weights.gguf.writer import PlannedTensor, write

METADATA = {
    "general.architecture": "olmoe",
    "a.uint": 7,
    "a.int": -7,
    "a.float": 0.1,
    "a.true": True,
    "a.text": "naïve 日本",
    "a.texts": ["x", "", "日本"],
    "a.numbers": np.array([-1, 2, 3], np.int32),
    "a.halves": np.array([0.5, 1.5], np.float32),
    "a.flags": np.array([True, False]),
    "a.none": [],
}
SHAPES = {"first": ((3, 5), "F32"), "second": ((2, 4, 32), "Q8_0"), "third": ((7,), "F16")}


def data_of(name: str) -> np.ndarray:
    shape, kind = SHAPES[name]
    weights = torch.arange(torch.Size(shape).numel()).view(shape) / 7
    return encode(name, weights, BY_NAME[kind])


@pytest.fixture
def path(tmp_path):
    tensors = [PlannedTensor(name, shape, BY_NAME[kind]) for name, (shape, kind) in SHAPES.items()]
    write(tmp_path / "x.gguf", METADATA, tensors, map(data_of, SHAPES))
    return tmp_path / "x.gguf"


def test_the_gguf_package_reads_the_same(path):
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        if key in ("a.none",):
            assert found in ([], None)
        elif isinstance(value, float):
            assert found == np.float32(value)
        else:
            assert found == (value.tolist() if isinstance(value, np.ndarray) else value)
    for tensor in reader.tensors:
        shape, kind = SHAPES[tensor.name]
        assert (tuple(tensor.shape[::-1]), tensor.tensor_type.name) == (shape, kind)
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(-1), data_of(tensor.name).reshape(-1))


def test_our_reader_reads_the_same(path):
    file = GGUFFile(path)
    for key, value in METADATA.items():
        found = file.metadata[key]
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found, value)
            assert found.dtype == value.dtype
        else:
            assert found == (np.float32(value) if isinstance(value, float) else value)
    for name in SHAPES:
        np.testing.assert_array_equal(file.rows(name), data_of(name))
        assert file.tensors[name].start % 32 == 0


def test_pieces_of_any_size_give_the_same_file(path, tmp_path):
    tensors = [PlannedTensor(name, shape, BY_NAME[kind]) for name, (shape, kind) in SHAPES.items()]
    bytewise = (data_of(name).reshape(-1)[i : i + 1] for name in SHAPES for i in range(data_of(name).size))
    write(tmp_path / "y.gguf", METADATA, tensors, bytewise)
    assert (tmp_path / "y.gguf").read_bytes() == path.read_bytes()


def test_nothing_is_left_when_the_data_fail(tmp_path):
    def data():
        yield data_of("first")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x.gguf", {}, [PlannedTensor("first", (3, 5), BY_NAME["F32"])] * 2, data())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path):
    def data():
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    with pytest.raises(UserError, match=r"The disk is full: .*x\.gguf was not written"):
        write(tmp_path / "x.gguf", {}, [PlannedTensor("first", (3, 5), BY_NAME["F32"])], data())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [1, -1])
def test_too_many_or_too_few_bytes_are_a_bug_of_ours(tmp_path, wrong):
    pieces = [np.zeros(60 + wrong, np.uint8)]
    with pytest.raises((AssertionError, StopIteration, RuntimeError)):
        write(tmp_path / "x.gguf", {}, [PlannedTensor("first", (3, 5), BY_NAME["F32"])], pieces)
    assert list(tmp_path.iterdir()) == []
