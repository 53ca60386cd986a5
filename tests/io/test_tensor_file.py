"""safetensors files of our own writer, by the library's reader and ours; and what ours refuses."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mutated_files import mutate
from olmoe.errors import CheckpointError
from olmoe.io.tensor_file import TensorFile, TensorWriter

VALUES = {
    "codes": torch.arange(128, dtype=torch.uint8).view(2, 64),
    "wide": torch.randn(3, 5),
    "half": torch.randn(7).half(),
    "brain": torch.randn(4, 3).bfloat16(),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}
SHAPES = {name: (tuple(value.shape), value.dtype) for name, value in VALUES.items()}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    with TensorWriter(path, SHAPES, {"format": "pt"}) as writer:
        for name, value in reversed(VALUES.items()):  # in any order
            writer.write(name, value)
    return path


def test_the_library_and_our_reader_give_back_what_was_written(file):
    ours = TensorFile(file)
    assert ours.metadata == {"format": "pt"}
    assert list(ours.entries) == list(VALUES)
    with safe_open(file, framework="pt") as theirs:
        assert set(theirs.keys()) == set(VALUES)
        for name, value in VALUES.items():
            for other in (ours.tensor(name), theirs.get_tensor(name)):
                assert other.dtype == value.dtype
                assert torch.equal(other, value)


def test_data_starts_at_a_cache_line_and_values_are_views(file):
    ours = TensorFile(file)
    assert ours.entries["codes"].start % 64 == 0
    first, second = ours.tensor("codes"), ours.tensor("codes")
    assert first.data_ptr() == second.data_ptr()
    first[0, 0] = 77  # a private page: others and the file stay as they were
    assert TensorFile(file).tensor("codes")[0, 0] == 0
    assert ours.entries["brain"].start % 4 == 2  # an odd place, where a copy is made
    assert torch.equal(ours.tensor("brain"), VALUES["brain"])


def test_pieces_in_any_order(tmp_path):
    value = torch.arange(12, dtype=torch.float32).view(3, 4)
    with TensorWriter(tmp_path / "f", {"x": ((3, 4), torch.float32)}, {}) as writer:
        for row in (2, 0, 1):
            writer.write("x", value[row], row * 16)
    assert torch.equal(TensorFile(tmp_path / "f").tensor("x"), value)


def test_a_forgotten_or_too_long_tensor_is_a_bug_of_the_caller(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"without all their values: \['y'\]"),
        TensorWriter(tmp_path / "f", {"x": ((2,), torch.float32), "y": ((2,), torch.float32)}, {}) as writer,
    ):
        writer.write("x", torch.zeros(2))
    with (
        pytest.raises(AssertionError, match="more bytes than x has"),
        TensorWriter(tmp_path / "f", {"x": ((2,), torch.float32)}, {}) as writer,
    ):
        writer.write("x", torch.zeros(3))


def test_files_of_the_library_are_read(tmp_path):
    values = {name: value for name, value in VALUES.items() if value.numel()}
    save_file(values, tmp_path / "f")
    ours = TensorFile(tmp_path / "f")
    assert all(torch.equal(ours.tensor(name), value) for name, value in values.items())


def header(**tensors):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, **tensors}


def raw_file(contents, data=b"\0" * 8):
    text = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return len(text).to_bytes(8, "little") + text + data


CASES = {
    "nothing": (b"", "truncated or not a safetensors file"),
    "seven bytes": (b"\0" * 7, "truncated or not a safetensors file"),
    "another magic": (b"GGUF" + b"\3\0\0\0" * 8, "truncated or not a safetensors file"),
    "a header beyond the end": ((2**62).to_bytes(8, "little") + b"{}", "truncated or not a safetensors file"),
    "not JSON": (raw_file(b"{'a'"), "header of .* is damaged"),
    "not UTF-8": (raw_file(b"\xff\xfe"), "header of .* is damaged"),
    "deep nesting": (raw_file(b"[" * 100_000), "header of .* is damaged"),
    "endless digits": (raw_file(b'{"a": ' + b"9" * 10_000 + b"}"), "header of .* is damaged"),
    "a name twice": (raw_file(b'{"a": 1, "a": 1}'), "a name occurs twice"),
    "a list": (raw_file([]), "not a JSON object"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "metadata of .* are not texts"),
    "an entry without shape": (raw_file({"a": {"dtype": "F32"}}), "not described as in safetensors"),
    "an unknown dtype": (raw_file(header(a={"dtype": "F8", "shape": [8], "data_offsets": [0, 8]})), "as 'F8'; only"),
    "a dtype that is no text": (raw_file(header(a={"dtype": [], "shape": [8], "data_offsets": [0, 8]})), "only F32"),
    "a negative size": (raw_file(header(a={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})), "impossible"),
    "a true size": (raw_file(header(a={"dtype": "U8", "shape": [True], "data_offsets": [0, 1]})), "impossible"),
    "nine dimensions": (raw_file(header(a={"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]})), "impossible"),
    "sizes whose product overflows": (
        raw_file(header(a={"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 8]})), "but 8 bytes",
    ),
    "offsets backwards": (raw_file(header(a={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]})), "outside"),
    "offsets beyond the end": (raw_file(header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]})), "outside"),
    "three offsets": (raw_file(header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]})), "outside"),
    "a shape of another size": (raw_file(header(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 8]})), "8 bytes"),
    "two tensors in one place": (
        raw_file(header(b={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})), "does not start where",
    ),
    "a gap": (
        raw_file(header(b={"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}), b"\0" * 16), "does not start where",
    ),
    "bytes after the end": (raw_file(header(), b"\0" * 9), "but its header describes"),
    "truncated data": (raw_file(header(), b"\0" * 7), "outside the file"),
}  # fmt: skip


@pytest.mark.parametrize(("contents", "sentence"), CASES.values(), ids=CASES)
def test_files_that_are_not_what_they_say_are_refused(tmp_path, contents, sentence):
    path = tmp_path / "f"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        TensorFile(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file .*f; check that the checkpoint folder is complete"):
        TensorFile(tmp_path / "f")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFile(tmp_path)


def test_mutated_files_are_refused_or_read_within_their_bounds(file, tmp_path):
    raw = file.read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    rng, path, refused = random.Random(0), tmp_path / "mutated", 0
    for _ in range(10_000):
        path.write_bytes(mutate(raw, text, rng))
        try:
            opened = TensorFile(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017  (not every case is refused)
            refused += 1
            continue
        for name in opened.entries:
            tensor = opened.tensor(name)
            assert tensor.numel() == 0 or tensor.float().flatten()[-1] is not None  # the last value is read
    assert 5_000 < refused < 10_000
