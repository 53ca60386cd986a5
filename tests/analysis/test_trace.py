"""Traces of texts: recorded in any parts they are what the routers chose."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from conftest import make_model
from olmoe.analysis.trace import Trace, TraceWriter, record
from olmoe.errors import UserError
from olmoe.runner import Batch, CacheView, Want, make_runner

DOCUMENTS = [[5 + (i * 7 + j) % 200 for j in range(length)] for i, length in enumerate((3, 90, 1, 40, 300))]


@pytest.fixture(params=["torch", "auto"])
def runner(request):
    return make_runner(make_model(num_key_value_heads=2, max_position_embeddings=128), request.param)


def writer_of(runner, path, **options) -> TraceWriter:
    config = runner.config
    return TraceWriter(
        path, layers=config.num_hidden_layers, experts=config.num_experts, top_k=config.num_experts_per_tok, **options
    )


def recorded(runner, path, documents=DOCUMENTS, **options) -> Trace:
    with writer_of(runner, path, **options) as writer:
        steps = list(record(runner, documents, writer))
    assert sum(steps) == sum(map(len, DOCUMENTS))
    return Trace.open(path)


def test_a_trace_is_what_routers_choose(runner, tmp_path, monkeypatch):
    whole = recorded(runner, tmp_path / "a", predictions=True)
    monkeypatch.setattr(type(runner), "chunk_tokens", 32)
    parts = recorded(runner, tmp_path / "b", predictions=True)
    assert whole.input_ids.tolist() == [i for document in DOCUMENTS for i in document]
    assert whole.starts.tolist() == [0, 3, 93, 94, 134, 262, 390]  # the longest has three windows
    np.testing.assert_array_equal(whole.expert_ids, parts.expert_ids)
    np.testing.assert_allclose(whole.weights, parts.weights, atol=2e-3)
    np.testing.assert_array_equal(whole.predicted_ids, parts.predicted_ids)
    ends = [*whole.starts[1:], len(whole)]
    for start, end in zip(whole.starts, ends, strict=True):
        ids = whole.input_ids[start:end].tolist()
        view = CacheView(runner.new_cache(1, len(ids)), np.zeros((1, 1), dtype=np.int32))
        output = runner.forward(Batch(ids, [len(ids)], [0]), view, Want(range(len(ids)), range(len(ids))))
        np.testing.assert_array_equal(whole.expert_ids[start:end], output.trace.expert_ids)
        np.testing.assert_allclose(whole.weights[start:end], output.trace.weights, atol=2e-3)
        np.testing.assert_array_equal(whole.predicted_ids[start:end], output.logits.argmax(-1))


def test_documents_may_be_arrays(runner, tmp_path):
    arrays = [np.array(document, dtype=np.int32) for document in DOCUMENTS]
    recorded(runner, tmp_path / "a", predictions=True)
    recorded(runner, tmp_path / "b", arrays, predictions=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_are_safetensors(runner, tmp_path):
    trace = recorded(runner, tmp_path / "trace.safetensors", metadata={"model": "m"})
    plain = load_file(tmp_path / "trace.safetensors")
    assert set(plain) == {"expert_ids", "weights", "input_ids", "starts"}
    np.testing.assert_array_equal(plain["expert_ids"], trace.expert_ids)
    assert isinstance(trace.expert_ids, np.memmap)
    assert (trace.metadata["model"], trace.experts, trace.predicted_ids) == ("m", runner.config.num_experts, None)


def test_nothing_is_left_of_a_recording_that_fails(runner, tmp_path):
    def broken():
        with writer_of(runner, tmp_path / "trace") as writer:
            next(record(runner, DOCUMENTS, writer))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_cut_files_are_refused(runner, tmp_path):
    recorded(runner, tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    for size in (4, 40, len(content) // 2, len(content) - 1):
        (tmp_path / "t").write_bytes(content[:size])
        with pytest.raises(UserError, match="is not a trace"):
            Trace.open(tmp_path / "t")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory")
def test_memory_is_that_of_a_part(tmp_path):
    """A trace of 2 million tokens (0.4 GB) is written and analysed in less than its own size."""
    code = f"""
import json, resource, numpy as np
from olmoe.analysis import metrics
from olmoe.analysis.trace import Trace, TraceWriter
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
random = np.random.default_rng(0)
ids = np.argsort(random.random((8192, 8, 64)), axis=2)[:, :, :8].astype(np.uint8)
with TraceWriter({str(tmp_path / "t")!r}, layers=8, experts=64, top_k=8) as writer:
    for _ in range(256):
        writer.append(ids, np.full(ids.shape, 0.1, dtype=np.float16), np.zeros(8192, dtype=np.int32))
trace = Trace.open({str(tmp_path / "t")!r})
metrics.load(trace.expert_ids, 64), metrics.balance(metrics.load(trace.expert_ids, 64, 1))
anonymous = [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")][0]
print(json.dumps([len(trace), base, anonymous]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokens, base, anonymous = json.loads(done.stdout)
    assert tokens == 2 * 2**20
    assert anonymous < base + 200_000
