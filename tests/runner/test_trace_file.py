"""Trace files: written in any parts and any order of windows, read by mapping, and refused when broken."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from configurations import small_config
from olmoe.errors import UserError
from olmoe.runner import Trace, TraceWriter, trace_file
from sentences import refused

L, K, E = 2, 3, 9


def writer_of(path, **options) -> TraceWriter:
    return TraceWriter(path, **{"layers": L, "experts": E, "top_k": K} | options)


def tokens(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What so many tokens chose, their weights and ids."""
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((count, L, E)), axis=2)[:, :, :K].astype(np.int16)
    return chosen, random.random((count, L, K)).astype(np.float32), random.integers(0, 50, count)


def same(one: Trace, other: Trace) -> None:
    assert one.metadata == other.metadata
    for name in ("expert_ids", "weights", "input_ids", "starts", "predicted_ids"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.fixture(params=["file", "memory"])
def path(request, tmp_path):
    return tmp_path / "new" / "trace" if request.param == "file" else None


@pytest.mark.parametrize("part", [1, 5, 1 << 14])
def test_windows_in_turn_are_written_one_after_the_other(path, tmp_path, monkeypatch, part):
    monkeypatch.setattr(trace_file, "_PART", part)
    texts = [tokens(count, seed) for seed, count in enumerate((7, 1, 12))]
    with writer_of(tmp_path / "whole", predictions=True, metadata={"model": "m"}) as whole:
        for chosen, weights, ids in texts:
            whole.start()
            whole.append(chosen, weights, ids, ids + 1)
    with writer_of(path, predictions=True, metadata={"model": "m"}) as writer:
        windows = [writer.start() for _ in texts]
        for first in range(0, 12, 2):  # two tokens of each in turn, the last window first
            for window in reversed(windows):
                chosen, weights, ids = (values[first : first + 2] for values in texts[window])
                writer.append(chosen, weights, ids, ids + 1, window=window)
    assert writer.tokens == 20
    same(writer.trace, whole.trace)
    assert list(writer.trace.windows()) == [slice(0, 7), slice(7, 8), slice(8, 20)]
    if path is not None:
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()


def test_windows_without_a_token_are_none(path):
    with writer_of(path) as writer:
        first, _, last = (writer.start() for _ in range(3))
        writer.append(*tokens(2), window=last)
        writer.append(*tokens(1), window=first)
        writer.append(*tokens(0), window=first)
    assert writer.trace.starts.tolist() == [0, 1]


def test_more_and_fewer_experts_than_usual(path):
    chosen, weights, ids = tokens(4)
    with writer_of(path) as writer:
        writer.append(chosen[:, :, :1], weights[:, :, :1], ids)
        wide = [
            np.concatenate([values, np.full_like(values, none)], axis=2)
            for values, none in ((chosen, -1), (weights, 0))
        ]
        writer.append(*wide, ids)
        with pytest.raises(UserError, match="chose 6 experts, but the trace has room for 3"):
            writer.append(np.concatenate([chosen, chosen], axis=2), np.concatenate([weights, weights], axis=2), ids)
    assert writer.trace.expert_ids[:4, 0].tolist() == [[e, 255, 255] for e in chosen[:, 0, 0]]
    assert (writer.trace.weights[:4, :, 1:] == 0).all()
    np.testing.assert_array_equal(writer.trace.expert_ids[4:], chosen)


def test_a_writer_for_a_model(tmp_path):
    config = small_config()
    for options in ({}, {"top_k": 3}):
        writer = TraceWriter.of(config, tmp_path / "t", **options)
        assert (writer.layers, writer.top_k) == (
            config.num_hidden_layers,
            options.get("top_k", config.num_experts_per_tok),
        )
        with writer:
            pass
        assert writer.trace.experts == config.num_experts


def test_places_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "not a writable folder" in refused(lambda: writer_of(tmp_path / "file" / "t"))
    assert "not a regular file" in refused(lambda: writer_of(tmp_path))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with writer_of(tmp_path / "t") as writer:
        monkeypatch.setattr(writer, "_files", {name: type("Full", (), {"write": full})() for name in writer._files})
        assert "The disk is full" in refused(lambda: writer.append(*tokens(1)))
        monkeypatch.undo()


@pytest.mark.parametrize("named", [True, False])
def test_a_trace_is_there_once_its_block_has_ended_well(tmp_path, named):
    def record(error: type[BaseException] | None) -> TraceWriter:
        with (
            pytest.raises(error) if error else contextlib.nullcontext(),
            TraceWriter(tmp_path / "t" if named else None, layers=1, experts=4, top_k=1) as writer,
        ):
            writer.append(np.zeros((2, 1, 1), dtype=int), np.ones((2, 1, 1)), [1, 2])
            assert "after the with block" in refused(lambda: writer.trace)
            if error:
                raise error
        return writer

    assert len(record(None).trace) == 2
    failed = record(KeyError)  # whose file would be the one of before
    assert "or its block has failed" in refused(lambda: failed.trace)


def test_many_experts_need_two_bytes(tmp_path):
    for experts, dtype in ((255, np.uint8), (256, np.uint16)):
        with TraceWriter(tmp_path / "t", layers=1, experts=experts, top_k=2) as writer:
            writer.append(np.array([[[experts - 1, -1]]], dtype=np.int16), np.array([[[0.5, 0.0]]]), [7])
        trace = Trace.open(tmp_path / "t")
        assert trace.expert_ids.dtype == dtype
        assert trace.expert_ids[0, 0].tolist() == [experts - 1, np.iinfo(dtype).max]


def test_an_empty_trace(tmp_path):
    with TraceWriter(tmp_path / "t", layers=2, experts=4, top_k=2):
        pass
    assert len(Trace.open(tmp_path / "t")) == 0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a trace"),
        (b"\xff" * 100, "is not a trace"),
        ((2).to_bytes(8, "little") + b"{}", "is not a trace of olmoe \\(its format is None"),
        ((4).to_bytes(8, "little") + b"[[]]", "is not a trace"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path, content, sentence):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        Trace.open(tmp_path / "t")
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        Trace.open(tmp_path / "none")


def test_cut_files_are_refused(tmp_path):
    with writer_of(tmp_path / "t") as writer:
        writer.start()
        writer.append(*tokens(20))
    content = (tmp_path / "t").read_bytes()
    for size in (4, 40, len(content) // 2, len(content) - 1):
        (tmp_path / "t").write_bytes(content[:size])
        with pytest.raises(UserError, match="is not a trace"):
            Trace.open(tmp_path / "t")
