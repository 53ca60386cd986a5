"""Valid files of other writers are read; each kind of damage has its sentence."""

from __future__ import annotations

import contextlib
import re
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from gguf_files import write_tiny
from olmoe.errors import CheckpointError
from olmoe.weights.gguf.block_types import BY_NAME
from olmoe.weights.gguf.reader import GGUFFile
from olmoe.weights.gguf.writer import PlannedTensor, header
from sentences import refused

F32 = BY_NAME["F32"]


def file_of(metadata: dict | None = None, tensors: list[PlannedTensor] = (), data: int = 4096) -> bytes:
    head = header(metadata or {}, tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def test_files_of_the_gguf_package_are_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "olmoe")
    writer.add_custom_alignment(64)
    writer.add_uint8("u8", 200)
    writer.add_int64("i64", -(2**40))
    writer.add_float64("f64", 0.1)
    writer.add_array("ints", [1, 2, 3])
    writer.add_array("texts", ["a", "bc"])
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values[0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "x.gguf")
    assert (file.version, file.alignment) == (3, 64)
    assert {key: file.metadata[key] for key in ("u8", "i64", "f64", "texts")} == {
        "u8": 200, "i64": -(2**40), "f64": 0.1, "texts": ["a", "bc"],
    }  # fmt: skip
    assert list(file.metadata["ints"]) == [1, 2, 3]
    np.testing.assert_array_equal(file.rows("a").view(np.float32), values)
    np.testing.assert_array_equal(file.rows("a", 1).view(np.float32), values[1])
    np.testing.assert_array_equal(file.rows("b").view(np.float16), values[0])
    assert file.tensors["b"].start % 64 == 0


def test_version_2_is_laid_out_alike(tmp_path):
    path = write_tiny(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    data[4] = 2
    old, new = GGUFFile.from_bytes(bytes(data)), GGUFFile(path)
    assert (old.version, new.version) == (2, 3)
    assert old.tensors == new.tensors


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    file = GGUFFile(write_tiny(tmp_path / "x.gguf"))
    rows = file.rows("blk.0.ffn_up_exps.weight", 1)
    assert rows.base is not None
    assert not rows.flags.owndata
    assert not rows.flags.writeable
    assert rows.shape == (32, 18)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "file.gguf is not a GGUF file"),
        (b"GGU", "file.gguf is not a GGUF file"),
        (b"PK\x03\x04" + bytes(60), r"file.gguf is not a GGUF file \(it starts with b'PK"),
        (b"GGUF", r"file.gguf ends within its header \(at byte 4\)"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "is GGUF version 1; only versions 2 and 3"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(60), "is GGUF version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "is a big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "announces 9223372036854775808 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "announces 18446744073709551615 metadata keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(99), "a metadata key a length of"),
    ],
)
def test_damaged_beginnings_are_one_sentence(data, sentence):
    assert re.search(sentence, refused(lambda: GGUFFile.from_bytes(data), CheckpointError))


def value(kind: int, payload: bytes) -> bytes:
    """A file with one metadata key of that type and payload."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + payload


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (value(13, bytes(64)), "'k' the unknown value type 13"),
        (value(7, b"\x02" + bytes(64)), "'k' the truth value 2"),
        (value(8, struct.pack("<Q", 2**40) + bytes(64)), "the value of 'k' a length of 1099511627776 bytes"),
        (value(8, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(64)), "the value of 'k' that is not UTF-8"),
        (value(9, struct.pack("<IQ", 9, 1) + bytes(64)), "nests arrays in 'k'"),
        (value(9, struct.pack("<IQ", 77, 1) + bytes(64)), "'k' values of the unknown type 77"),
        (value(9, struct.pack("<IQ", 8, 2**61) + bytes(64)), "announces 2305843009213693952 values for 'k'"),
        (value(9, struct.pack("<IQ", 0, 2**61) + bytes(64)), "announces 2305843009213693952 values for 'k'"),
        (value(9, struct.pack("<IQ", 7, 2) + b"\x01\x07" + bytes(64)), "'k' the truth value 7"),
        (file_of({"general.alignment": 0}), "general.alignment 0, which must be a power of two"),
        (file_of({"general.alignment": 48}), "general.alignment 48"),
        (file_of({"general.alignment": 2**31}), "general.alignment 2147483648"),
        (file_of({"general.alignment": "32"}), "general.alignment '32'"),
        (file_of({"general.alignment": True}), "general.alignment True"),
    ],
)
def test_damaged_metadata_are_one_sentence(data, sentence):
    assert sentence in refused(lambda: GGUFFile.from_bytes(data), CheckpointError)


def test_a_key_twice_is_refused():
    once = struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 5)
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + once * 2 + bytes(64)
    assert "holds the metadata key 'k' twice" in refused(lambda: GGUFFile.from_bytes(data), CheckpointError)


def described(name: bytes, sizes: list[int], kind: int, offset: int, data: int = 4096) -> bytes:
    tensor = struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (described(b"t", [], 0, 0), "'t' 0 dimensions"),
        (described(b"t", [1] * 5, 0, 0), "'t' 5 dimensions"),
        (described(b"t", [4, 0], 0, 0), "the impossible shape (0, 4)"),
        (described(b"t", [2**32, 2**32], 0, 0), "the impossible shape"),
        (described(b"t", [2**63, 2**63, 2**63, 4], 2, 0), "the impossible shape"),
        (described(b"t", [2**59], 0, 0), "ends before its tensor 't' does"),
        (described(b"t", [4], 16, 0), "stores tensor 't' as IQ2_XXS; only F32"),
        (described(b"t", [4], 99, 0), "stores tensor 't' as the unknown type 99"),
        (described(b"t", [33], 2, 0), "rows of 33 values, which are not whole blocks of 32"),
        (described(b"t", [4], 0, 4), "at offset 4, not a multiple of the alignment 32"),
        (described(b"t", [4], 0, 4096), "ends before its tensor 't' does"),
        (described(b"t", [4], 0, 2**64 - 32), "ends before its tensor 't' does"),
        (described(b"\xff", [4], 0, 0), "a tensor name that is not UTF-8"),
    ],
)
def test_damaged_descriptions_are_one_sentence(data, sentence):
    assert sentence in refused(lambda: GGUFFile.from_bytes(data), CheckpointError)


def test_a_name_twice_is_refused():
    data = file_of({}, [PlannedTensor("t", (8,), F32)] * 2)
    assert "holds tensor 't' twice" in refused(lambda: GGUFFile.from_bytes(data), CheckpointError)


def test_tensors_that_overlap_are_refused():
    data = file_of({}, [PlannedTensor("first", (16,), F32), PlannedTensor("other", (16,), F32)])
    last = data.rindex(struct.pack("<IQ", 0, 64))
    moved = data[:last] + struct.pack("<IQ", 0, 32) + data[last + 12 :]
    assert "lets tensors 'first' and 'other' overlap" in refused(lambda: GGUFFile.from_bytes(moved), CheckpointError)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    data = write_tiny(tmp_path / "x.gguf").read_bytes()
    whole = GGUFFile.from_bytes(data)
    end = max(t.start + t.num_bytes for t in whole.tensors.values())
    for length in (end - 1, end // 2, 2000):
        refused(lambda length=length: GGUFFile.from_bytes(data[:length]), CheckpointError)
    assert GGUFFile.from_bytes(data[:end]).tensors == whole.tensors


def test_missing_and_unreadable_paths_are_one_sentence(tmp_path):
    assert "There is no file" in refused(lambda: GGUFFile(tmp_path / "no.gguf"), CheckpointError)
    assert "cannot be read" in refused(lambda: GGUFFile(tmp_path), CheckpointError)
    (tmp_path / "empty.gguf").touch()
    assert "is not a GGUF file" in refused(lambda: GGUFFile(tmp_path / "empty.gguf"), CheckpointError)


def test_long_values_do_not_make_long_sentences():
    data = file_of({"general.alignment": "x" * 1000})
    assert len(refused(lambda: GGUFFile.from_bytes(data), CheckpointError)) < 400


def test_hostile_counts_take_no_memory():
    """Files of 64 KB that announce as much as their size lets them, and more."""
    filler = bytes(1 << 16)
    cases = [value(9, struct.pack("<IQ", 8, n) + filler) for n in (2**13, 2**20, 2**40)]
    cases += [b"GGUF" + struct.pack("<IQQ", 3, 1900, 0) + filler, b"GGUF" + struct.pack("<IQQ", 3, 0, 4000) + filler]
    tracemalloc.start()
    for data in cases:
        with contextlib.suppress(CheckpointError):  # 8,192 empty strings are possible
            GGUFFile.from_bytes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("error", [OSError(22, "Invalid argument"), AttributeError("madvise")], ids=["refused", "none"])
def test_systems_that_cannot_let_go_of_pages_read_all_the_same(tmp_path, error):
    class Map:
        def madvise(self, advice):
            raise error

    write_tiny(tmp_path / "tiny.gguf")
    file = GGUFFile(tmp_path / "tiny.gguf")
    file._map = Map()
    file.release()
