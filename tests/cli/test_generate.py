"""`olmoe generate`: the text and only the text on stdout, the rest on stderr, one sentence for bad input."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from conftest import make_model
from olmoe import checkpoint, hub
from olmoe.cli.main import main
from olmoe.engine import llm as llm_module
from olmoe.engine.llm import LLM
from olmoe.engine.request import SamplingParams

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file) -> Path:
    target = tmp_path_factory.mktemp("generate") / "model"
    checkpoint.save(make_model(), target, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
    return target


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder)


def generate(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["generate", *arguments])
    return code, *capsys.readouterr()


def give_stdin(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_stdout_is_prompt_and_continuation_and_nothing_else(capsys, folder, llm):
    code, out, err = generate(
        capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "20", "--temperature", "0", "--ignore-eos"
    )
    (expected,) = llm.generate(PROMPT, SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert (code, out) == (0, f"{PROMPT}{expected.text}\n")
    (line,) = err.splitlines()
    for part in ("import ", "load ", f"prompt {expected.prompt_tokens} tokens at ", "generated 20 tokens at ", " MB"):
        assert part in line


def test_quiet_leaves_stderr_empty(capsys, folder):
    code, out, err = generate(capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "1", "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {"max_new_tokens": 100}),  # defaults but for the context of the test model
        (["--temperature", "1.3"], {"temperature": 1.3}),
        (["--top-k", "3"], {"top_k": 3}),
        (["--top-p", "0.2"], {"top_p": 0.2}),
        (["--min-p", "0.5"], {"min_p": 0.5}),
        (["--repetition-penalty", "1.9"], {"repetition_penalty": 1.9}),
        (["--max-new-tokens", "3"], {"max_new_tokens": 3}),
        (["--stop", "zebra", "--stop", "a"], {"stop": ["zebra", "a"]}),
        (["--ignore-eos"], {"ignore_eos": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_option_reaches_the_sampler(capsys, folder, llm, arguments, changes):
    defaults = {"temperature": 0.7, "top_p": 0.95, "seed": 5, "max_new_tokens": 25}
    limit = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", str(changes.get("max_new_tokens", 25))]
    code, out, _ = generate(capsys, PROMPT, "--model", str(folder), "--seed", "5", *limit, *arguments)
    (expected,) = llm.generate(PROMPT, SamplingParams(**(defaults | changes)))
    assert (code, out) == (0, f"{PROMPT}{expected.text}\n")


def test_text_streams_piece_by_piece(monkeypatch, folder):
    class Recorder(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += bool(self.getvalue())

    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    assert main(["generate", PROMPT, "--model", str(folder), "--max-new-tokens", "20", "--seed", "1", "--quiet"]) == 0
    assert recorder.flushed > 8


def test_the_prompt_may_come_from_stdin_as_it_is(capsys, monkeypatch, folder, llm):
    prompt = "Das Mädchen\r\n\tthe dog\n"
    give_stdin(monkeypatch, prompt.encode())
    code, out, _ = generate(capsys, "-", "--model", str(folder), "--max-new-tokens", "10", "--temperature", "0")
    assert (code, out) == (0, prompt + llm.generate(prompt, SamplingParams(max_new_tokens=10))[0].text + "\n")


def test_a_prompt_that_looks_like_an_option_follows_two_dashes(capsys, folder):
    code, out, _ = generate(capsys, "--model", str(folder), "--max-new-tokens", "1", "--", "--seed")
    assert code == 0
    assert out.startswith("--seed")


def test_without_a_model_the_shipped_one_is_used(capsys, monkeypatch, folder, llm):
    monkeypatch.setattr(hub, "SHIPPED", folder)
    code, out, _ = generate(capsys, PROMPT, "--max-new-tokens", "10", "--temperature", "0")
    assert (code, out) == (0, PROMPT + llm.generate(PROMPT, SamplingParams(max_new_tokens=10))[0].text + "\n")


@pytest.mark.skipif(not hub.SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
def test_the_shipped_checkpoint_tells_a_story(capsys):
    code, out, err = generate(capsys, PROMPT, "--max-new-tokens", "30", "--seed", "1", "--ignore-eos")
    assert code == 0
    assert out.startswith(PROMPT)
    assert sum(word in out for word in (" the ", " a ", " was ", " and ", " to ")) >= 2
    assert "generated 30 tokens" in err


def test_dtype_threads_and_device_are_passed_on(capsys, monkeypatch, folder):
    threads, loaded = [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda *a, **o: loaded.append(o) or load(*a, **o))
    options = ["--dtype", "bfloat16", "--threads", "3", "--device", "cpu"]
    assert generate(capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "2", *options)[0] == 0
    assert threads == [3]
    assert (loaded[0]["dtype"], loaded[0]["device"]) == (torch.bfloat16, torch.device("cpu"))


def test_hub_options_are_passed_on(capsys, monkeypatch, folder):
    seen = []
    monkeypatch.setattr(llm_module.hub, "resolve", lambda name, **options: seen.append((name, options)) or folder)
    options = ["--model", "owner/name", "--revision", "fp32", "--offline", "--max-new-tokens", "1"]
    assert generate(capsys, PROMPT, *options)[0] == 0
    name, given = seen[0]
    assert (name, given["revision"], given["local_files_only"]) == ("owner/name", "fp32", True)


def test_a_text_cut_by_the_context_is_a_warning(capsys, folder, caplog):
    code, out, _ = generate(capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "1000", "--stop", "zzz")
    assert code == 0
    assert out.startswith(PROMPT)
    assert "of 1000 new tokens fit the context of 128" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([PROMPT, "--model", "no-such-model"], "There is no folder 'no-such-model', and the hub model"),
        ([PROMPT, "--model", "./no/such/folder"], "There is no folder './no/such/folder', and it is not a hub id"),
        ([PROMPT, "--model", __file__], f"{__file__} is a file; give the folder"),
        ([PROMPT, "--temperature", "-0.5"], "temperature must be at least 0, not -0.5."),
        ([PROMPT, "--temperature", "nan"], "temperature must be at least 0, not nan."),
        ([PROMPT, "--top-k", "-1"], "top_k must be at least 0"),
        ([PROMPT, "--top-p", "0"], "top_p must be above 0 and at most 1, not 0.0."),
        ([PROMPT, "--min-p", "2"], "min_p must be between 0 and 1, not 2.0."),
        ([PROMPT, "--repetition-penalty", "0"], "repetition_penalty must be above 0, not 0.0."),
        ([PROMPT, "--seed", "-1"], "seed must be between 0 and"),
        ([PROMPT, "--stop", ""], "stop must be made of non-empty strings"),
        ([PROMPT, "--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0."),
        ([""], "The prompt is empty; give at least one character."),
        (["dog " * 200], "The prompt has "),
        (["caf\udce9"], "The text is not valid Unicode: character 3 is the lone surrogate U+DCE9;"),
        ([PROMPT, "--dtype", "int8"], "Unknown dtype 'int8'; use auto, float32, bfloat16 or float16."),
        ([PROMPT, "--device", "quantum"], "Unknown device 'quantum'; use auto, cpu, cuda or cuda:N."),
        ([PROMPT, "--device", "meta"], "Device 'meta' is not supported; use"),
        ([PROMPT, "--threads", "0"], "The number of threads must be "),
        ([PROMPT, "--revision", "main"], "A revision ('main') was given, but "),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_2(capsys, folder, arguments, sentence):
    model = [] if "--model" in arguments else ["--model", str(folder)]
    code, out, err = generate(capsys, *arguments, *model)
    assert (code, out) == (2, "")
    assert err.startswith(f"olmoe: {sentence}")
    assert err.endswith(".\n")
    assert err.count("\n") == 1


def test_a_folder_without_a_tokenizer_or_a_config_is_one_sentence(capsys, tmp_path):
    checkpoint.save(make_model(), tmp_path / "model")
    for missing in ("tokenizer.json", "config.json"):
        (tmp_path / "model" / missing).unlink(missing_ok=True)
        code, out, err = generate(capsys, PROMPT, "--model", str(tmp_path / "model"))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("olmoe: There is no ")
        assert f"{missing}; a checkpoint folder needs a {missing}." in err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "The prompt is empty"), (b"caf\xe9 au lait", "The prompt on stdin is not UTF-8 (")],
)
def test_bad_stdin_is_one_sentence_and_2(capsys, monkeypatch, folder, content, sentence):
    give_stdin(monkeypatch, content)
    code, out, err = generate(capsys, "-", "--model", str(folder))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"olmoe: {sentence}")


def test_an_interrupt_leaves_the_cursor_on_a_new_line(capsys, monkeypatch, folder):
    def interrupted(self):
        yield " there was"
        raise KeyboardInterrupt

    monkeypatch.setattr(llm_module.Stream, "__iter__", interrupted)
    assert generate(capsys, PROMPT, "--model", str(folder)) == (130, f"{PROMPT} there was\n", "olmoe: interrupted\n")
