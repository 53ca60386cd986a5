"""Token files of other programs and widths: read correctly or refused."""

from __future__ import annotations

import numpy as np
import pytest

from configurations import VOCAB_SIZE
from olmoe.errors import ConfigError
from olmoe.train.config import load_config
from olmoe.train.data import Mixture, open_tokens, prepare
from olmoe.train.foreign_tokens import WIDTHS
from olmoe.train.loop import train
from sentences import refused
from training_runs import read_metrics, write_run

EOS = VOCAB_SIZE - 1
IDS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 301)


def read(path, tokenizer_file, dtype=None) -> list[int]:
    file = prepare(path, tokenizer_file, path.parent / "tokens", EOS, dtype=dtype)
    tokens = open_tokens(file, VOCAB_SIZE)
    window = Mixture([(tokens, 1.0)], 10, seed=0).window(0)
    assert window.dtype == np.int64
    assert file.tokens == len(tokens)
    return tokens.tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "uint64", "int64", ">u2", ">i8"])
def test_a_numpy_header_gives_the_type_of_ids(dtype, tmp_path, tokenizer_file):
    np.save(tmp_path / "x.npy", IDS.astype(dtype))
    assert read(tmp_path / "x.npy", tokenizer_file) == IDS.tolist()
    np.save(tmp_path / "rows.npy", IDS[:300].astype(dtype).reshape(20, 15))  # one window per row
    assert read(tmp_path / "rows.npy", tokenizer_file) == IDS[:300].tolist()


@pytest.mark.parametrize("suffix", [".npy", ".bin", ""])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "uint64", "int64", ">u2", ">u4"])
def test_the_configuration_gives_the_type_of_raw_ids(dtype, suffix, tmp_path, tokenizer_file):
    path = tmp_path / f"x{suffix}"
    IDS.astype(dtype if dtype[0] == ">" else np.dtype(dtype).newbyteorder("<")).tofile(path)
    assert read(path, tokenizer_file, dtype) == IDS.tolist()


@pytest.mark.parametrize("count", [8, 301, 300])
@pytest.mark.parametrize(("dtype", "told"), [("<u4", "uint32"), ("<i4", "uint32"), ("<i8", "int64"), ("<u8", "int64")])
def test_raw_ids_of_another_width_are_refused_by_name(dtype, told, count, tmp_path, tokenizer_file):
    (1 + IDS[:count] % 300).astype(dtype).tofile(tmp_path / "x.npy")
    message = refused(lambda: read(tmp_path / "x.npy", tokenizer_file), ConfigError)
    assert f'dtype = "{told}"' in message


def test_raw_ids_of_another_width_are_refused_in_large_vocabularies_too(tmp_path, tokenizer_file):
    """With 100,352 ids the upper half of a uint32 is 0 or 1, so both halves are valid ids."""
    ids = np.random.default_rng(0).integers(0, 100_352, 500)
    for dtype, told in (("<u4", "uint32"), (">u4", ">u4")):
        ids.astype(dtype).tofile(tmp_path / "x.npy")
        message = refused(lambda: prepare(tmp_path / "x.npy", tokenizer_file, tmp_path, EOS), ConfigError)
        assert f'dtype = "{told}"' in message
        file = prepare(tmp_path / "x.npy", tokenizer_file, tmp_path, EOS, dtype=told)
        assert open_tokens(file, 100_352).tolist() == ids.tolist()
    IDS.astype(">u2").tofile(tmp_path / "y.npy")
    assert "set dtype beside its path" in refused(lambda: read(tmp_path / "y.npy", tokenizer_file), ConfigError)


def test_zeros_alone_do_not_reveal_a_width(tmp_path, tokenizer_file):
    ids = np.zeros(400, "<u2")
    ids[::7] = 5
    ids.tofile(tmp_path / "x.npy")
    assert read(tmp_path / "x.npy", tokenizer_file) == ids.tolist()


def test_types_that_cannot_be_ids_are_refused(tmp_path, tokenizer_file):
    path = tmp_path / "x.npy"

    def sentence(dtype=None):
        return refused(lambda: read(path, tokenizer_file, dtype), ConfigError)

    np.save(path, IDS.astype("float32"))
    assert "float32" in sentence()
    np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
    assert "cannot be read" in sentence()
    np.save(path, IDS.astype("uint32"))
    assert "declares its ids as uint32" in sentence("uint16")
    assert read(path, tokenizer_file, "uint32") == IDS.tolist()
    np.save(path, np.asfortranarray(IDS[:300].reshape(20, 15)))
    assert "columns" in sentence()
    np.save(path, np.array([3]))
    assert "1 ids" in sentence()
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in sentence()
    (IDS - 400).astype("int32").tofile(path)
    assert "id -" in sentence("int32")
    (IDS % 200).astype("uint8").tofile(path)
    assert "bytes, which is not" in sentence("uint32")
    for dtype in ("float32", "words", "bool", ""):
        assert WIDTHS[0] in sentence(dtype)


def test_a_run_on_wider_ids_equals_one_on_narrow_ids(tmp_path, tokenizer_file):
    losses = []
    for name, dtype in (("a", "uint16"), ("b", "uint32")):
        data = {"train": [{"path": "x.bin", "dtype": dtype}], "valid": [{"path": "y.npy"}]}
        config = write_run(tmp_path / name, tokenizer_file, data=data, schedule={"total_tokens": 256})
        IDS.astype(dtype).tofile(tmp_path / name / "x.bin")
        np.save(tmp_path / name / "y.npy", IDS.astype(dtype))
        train(load_config(config), show_progress=False)
        records = read_metrics(tmp_path / name / "out")
        losses.append([r["cross_entropy"] for r in records if "cross_entropy" in r])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.parametrize(("written", "said"), [("<u4", "uint16"), ("<i8", "uint32"), (">u4", ">u2"), ("<i8", "int32")])
def test_reading_ids_at_half_their_width_is_refused(written, said, tmp_path, tokenizer_file):
    """Every second id would be 0, even if declared so; ids that only look like it are read as declared."""
    IDS.astype(written).tofile(tmp_path / "x.npy")
    message = refused(lambda: read(tmp_path / "x.npy", tokenizer_file, said), ConfigError)
    assert f"does not hold {np.dtype(said)} ids" in message
    assert "set dtype =" in message
    sparse = np.zeros(400, "<u2")
    sparse[::2] = np.arange(200)
    sparse[3] = 7
    sparse.tofile(tmp_path / "y.npy")
    assert read(tmp_path / "y.npy", tokenizer_file, "uint16") == sparse.tolist()
