"""A stream can be read, abandoned, resumed and closed, and reports what became of its text."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from conftest import make_model
from olmoe.engine.engine import Engine
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.stream import Stream
from olmoe.weights import export

PARAMS = SamplingParams(max_new_tokens=25, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tokenizer) -> LLM:
    return LLM.from_parts(make_model(), tokenizer)


@pytest.fixture(scope="module")
def pieces(llm) -> list[str]:
    found = list(llm.stream("dog", PARAMS))
    assert len(found) > 8
    return found


def test_next_returns_one_part_after_the_other(llm, pieces):
    stream = llm.stream("dog", PARAMS)
    assert [next(stream) for _ in pieces] == pieces
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(stream)
        assert stream.completion == llm.generate("dog", PARAMS)[0]
    assert next(stream, None) is None


def test_a_loop_may_continue_where_another_or_next_stopped(llm, pieces):
    stream = llm.stream("dog", PARAMS)
    found = [next(stream)]
    for piece in stream:
        assert stream.completion is None
        found.append(piece)
        if len(found) == 4:
            break
    found.append(next(stream))
    assert stream.completion is None  # it grows again
    found += stream
    assert found == pieces
    assert stream.completion == llm.generate("dog", PARAMS)[0]
    assert list(stream) == []


def leave(stream: Stream, count: int) -> list[str]:
    found = []
    for piece in stream:
        found.append(piece)
        if len(found) == count:
            break
    return found


@pytest.mark.parametrize("count", [1, 3, 7])
def test_an_abandoned_stream_has_the_text_so_far(llm, pieces, count):
    stream = llm.stream("dog", PARAMS)
    assert leave(stream, count) == pieces[:count]
    completion, whole = stream.completion, llm.generate("dog", PARAMS)[0]
    assert (completion.finish_reason, completion.text) == ("cancelled", "".join(pieces[:count]))
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert 0 < len(completion.token_ids) < len(whole.token_ids)
    assert completion.prompt_tokens == whole.prompt_tokens


def test_a_stream_abandoned_at_its_last_part_is_complete(llm, pieces):
    stream = llm.stream("dog", PARAMS)
    assert leave(stream, len(pieces)) == pieces
    assert stream.completion == llm.generate("dog", PARAMS)[0]


def test_an_error_in_the_reader_abandons_the_stream(llm, pieces):
    stream = llm.stream("dog", PARAMS)

    def read() -> None:
        for _ in stream:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert (stream.completion.finish_reason, stream.completion.text) == ("cancelled", pieces[0])


def test_an_interrupt_in_the_model_keeps_the_text_so_far(llm, pieces, monkeypatch):
    stream = llm.stream("dog", PARAMS)
    found = [next(stream)]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found += stream
    assert found == pieces[:1]
    assert (stream.completion.finish_reason, stream.completion.text) == ("cancelled", pieces[0])


def test_close_ends_a_stream(llm, pieces):
    stream = llm.stream("dog", PARAMS)
    assert [next(stream), next(stream)] == pieces[:2]
    for _ in range(2):
        stream.close()
        assert (stream.completion.finish_reason, stream.completion.text) == ("cancelled", "".join(pieces[:2]))
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"


def test_a_stream_may_be_closed_before_the_first_part_and_after_the_last(llm):
    stream = llm.stream("dog", PARAMS)
    stream.close()
    assert list(stream) == []
    assert (stream.completion.finish_reason, stream.completion.text, stream.completion.token_ids) == (
        "cancelled",
        "",
        [],
    )
    stream = llm.stream("dog", PARAMS)
    list(stream)
    stream.close()
    assert stream.completion == llm.generate("dog", PARAMS)[0]


def test_leaving_a_with_block_closes_the_stream(llm, pieces):
    with llm.stream("dog", PARAMS) as stream:
        assert next(stream) == pieces[0]
    assert list(stream) == []
    assert stream.completion.finish_reason == "cancelled"


def test_a_stream_may_be_closed_from_another_thread_while_running(llm, monkeypatch):
    inside, closed = threading.Event(), threading.Event()
    decode = Engine.step

    def slow(*arguments):
        inside.set()
        assert closed.wait(60)
        return decode(*arguments)

    stream, found = llm.stream("dog", PARAMS), []
    found.append(next(stream))
    monkeypatch.setattr(Engine, "step", slow)
    reader = threading.Thread(target=lambda: found.extend(stream))
    reader.start()
    assert inside.wait(60)
    stream.close()
    closed.set()
    reader.join(60)
    assert not reader.is_alive()
    assert len(found) == 1
    assert stream.completion.finish_reason == "cancelled"


def test_closing_a_stream_frees_the_cache(llm):
    def caches() -> int:
        gc.collect()
        return sum(type(each).__name__ == "Engine" for each in gc.get_objects())

    before = caches()
    stream = llm.stream("dog", PARAMS)
    next(stream)
    assert caches() == before + 1
    stream.close()
    assert caches() == before


@pytest.mark.parametrize(
    "reading",
    ["next(stream)", "it = iter(stream); next(it)", "for _ in stream: break", "for _ in stream: raise SystemExit"],
)
def test_exiting_python_with_an_open_stream_prints_nothing(tmp_path, tokenizer_file, reading):
    text = tokenizer_file.read_text(encoding="utf-8")
    export.save(make_model(), tmp_path / "model", extra_files={"tokenizer.json": text})
    script = (
        "from olmoe import LLM, SamplingParams\n"
        f"stream = LLM({str(tmp_path / 'model')!r}).stream('dog', SamplingParams(max_new_tokens=50))\n{reading}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
