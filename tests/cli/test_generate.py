"""`olmoe generate`: the text and only the text on stdout, the rest on stderr, one sentence for bad input."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import make_model
from olmoe.cli.main import main
from olmoe.engine import llm as llm_module
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.io import hub
from olmoe.runner import Trace
from olmoe.weights import checkpoint, export

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file) -> Path:
    target = tmp_path_factory.mktemp("generate") / "model"
    export.save(make_model(), target, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
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
    for part in (
        "import ",
        "load ",
        f"prompt {expected.prompt_tokens} tokens at ",
        "generated 20 tokens at ",
        " MB",
        "finish reason length",
    ):
        assert part in line


def test_quiet_leaves_stderr_empty(capsys, folder):
    code, out, err = generate(capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "1", "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(PROMPT)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ([], {"max_new_tokens": 100}),
        (["--temperature", "1.3"], {"temperature": 1.3}),
        (["--top-k", "3"], {"top_k": 3}),
        (["--top-p", "0.2"], {"top_p": 0.2}),
        (["--min-p", "0.5"], {"min_p": 0.5}),
        (["--repetition-penalty", "1.9"], {"repetition_penalty": 1.9}),
        (["--presence-penalty", "0.5"], {"presence_penalty": 0.5}),
        (["--frequency-penalty", "0.25"], {"frequency_penalty": 0.25}),
        (["--max-new-tokens", "3"], {"max_new_tokens": 3}),
        (["--stop", "zebra", "--stop", "a"], {"stop": ["zebra", "a"]}),
        (["--ignore-eos"], {"ignore_eos": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_option_reaches_the_sampler(capsys, folder, llm, arguments, changes):
    defaults = {"temperature": 0.7, "top_p": 0.95, "seed": 5, "max_new_tokens": 25}
    drawn = ["--temperature", "0.7", "--top-p", "0.95"]
    limit = [] if "--max-new-tokens" in arguments else ["--max-new-tokens", str(changes.get("max_new_tokens", 25))]
    code, out, _ = generate(capsys, PROMPT, "--model", str(folder), "--seed", "5", *drawn, *limit, *arguments)
    (expected,) = llm.generate(PROMPT, SamplingParams(**(defaults | changes)))
    assert (code, out) == (0, f"{PROMPT}{expected.text}\n")


def test_the_defaults_are_those_of_sampling_params(capsys, monkeypatch, folder):
    seen = []
    stream = LLM.stream
    monkeypatch.setattr(LLM, "stream", lambda self, p, params, **o: seen.append(params) or stream(self, p, params, **o))
    assert generate(capsys, PROMPT, "--model", str(folder))[0] == 0
    assert seen == [SamplingParams()]
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, value in vars(SamplingParams()).items():
        if type(value) in (int, float):  # the others have no default that a sentence could say
            assert re.search(rf"--{name.replace('_', '-')} [^-]*\({value}\)", shown), name


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
    load = checkpoint.Checkpoint.load
    monkeypatch.setattr(checkpoint.Checkpoint, "load", lambda self, **o: loaded.append(o) or load(self, **o))
    options = ["--dtype", "bfloat16", "--threads", "3", "--device", "cpu"]
    assert generate(capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "2", *options)[0] == 0
    assert threads == [3]
    assert (loaded[0]["dtype"], loaded[0]["device"]) == (torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize(("quiet", "shown"), [([], True), (["--quiet"], False)])
def test_a_long_load_shows_a_bar_on_a_terminal(capsys, monkeypatch, folder, quiet, shown):
    load = checkpoint.Checkpoint.load

    def slowly(self, **options):
        time.sleep(1.1)
        options["progress"](1, 2)
        return load(self, **options | {"progress": None})

    monkeypatch.setattr(checkpoint.Checkpoint, "load", slowly)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, _, err = generate(capsys, PROMPT, "--model", str(folder), "--max-new-tokens", "2", *quiet)
    assert code == 0
    assert ("loading:  50%" in err) == shown


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
    export.save(make_model(), tmp_path / "model")
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


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "olmoe: interrupted\n"),
        (UserError("The disk is full."), 2, "olmoe: The disk is full.\n"),
    ],
)
def test_an_early_end_leaves_the_cursor_on_a_new_line(capsys, monkeypatch, folder, fault, code, said):
    def ended(self):
        yield " there was"
        raise fault

    monkeypatch.setattr(llm_module.Stream, "__iter__", ended)
    assert generate(capsys, PROMPT, "--model", str(folder)) == (code, f"{PROMPT} there was\n", said)


# ---- prompt files ----


def test_the_prompt_may_come_from_a_file_as_it_is(capsys, folder, llm, tmp_path):
    prompt, file = "Das Mädchen\r\n\tthe dog\n", tmp_path / "prompt.txt"
    options = ["--model", str(folder), "--max-new-tokens", "10"]
    expected = prompt + llm.generate(prompt, SamplingParams(max_new_tokens=10))[0].text + "\n"
    for content in (prompt.encode(), b"\xef\xbb\xbf" + prompt.encode()):  # a byte order mark is no text
        file.write_bytes(content)
        code, out, _ = generate(capsys, "--prompt-file", str(file), *options)
        assert (code, out) == (0, expected)


def test_a_byte_order_mark_on_stdin_is_no_text(capsys, monkeypatch, folder):
    outputs = []
    for source, content in (("-", b"\xef\xbb\xbfdog"), ("-", b"dog")):
        give_stdin(monkeypatch, content)
        outputs.append(generate(capsys, source, "--model", str(folder), "--max-new-tokens", "5")[1])
    give_stdin(monkeypatch, b"dog")
    outputs.append(generate(capsys, "--prompt-file", "-", "--model", str(folder), "--max-new-tokens", "5")[1])
    assert outputs[0] == outputs[1] == outputs[2]


def test_prompt_files_that_cannot_be_read_are_one_sentence(capsys, folder, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    for name, sentence in (
        ("nowhere", "There is no prompt file "),
        ("latin", "The prompt in "),
        ("empty", "The prompt is empty; give"),
        ("", "The prompt file "),
        ("latin/x", "The prompt file "),
        ("nul\0", "The prompt file "),
    ):
        code, out, err = generate(capsys, "--prompt-file", str(tmp_path / name), "--model", str(folder))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"olmoe: {sentence}")


# ---- chats ----


def test_a_chat_goes_through_the_template_and_shows_the_answer_alone(capsys, folder, llm):
    options = ["--model", str(folder), "--max-new-tokens", "12"]
    code, out, err = generate(capsys, PROMPT, "--chat", *options)
    (expected,) = llm.chat([{"role": "user", "content": PROMPT}], SamplingParams(max_new_tokens=12))
    assert expected.text != llm.generate(PROMPT, SamplingParams(max_new_tokens=12))[0].text
    assert (code, out) == (0, expected.text + "\n")
    assert f"prompt {expected.prompt_tokens} tokens" in err


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_an_empty_answer_says_why(capsys, caplog, tmp_path, tokenizer_file, llm, chat, quiet):
    prompt = [{"role": "user", "content": PROMPT}] if chat else PROMPT
    first = llm.generate(prompt if chat else [prompt], SamplingParams(max_new_tokens=1))[0].token_ids
    target = tmp_path / "model"
    files = {"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")}
    export.save(make_model(), target, extra_files=files)
    # The model's likeliest first token ends texts, but only as generation_config.json says: templates know the other.
    config = json.loads((target / "generation_config.json").read_text(encoding="utf-8"))
    ids = [config["eos_token_id"], *first]
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    code, out, _ = generate(capsys, PROMPT, "--model", str(target), *chat, *quiet)
    what = "answer" if chat else "continuation"
    assert (code, out) == (0, "\n" if chat else PROMPT + "\n")
    assert f"the {what} is empty: the model ended the text with its end-of-text token" in caplog.text


# ---- JSON ----


def test_json_has_all_of_a_completion(capsys, folder, llm):
    options = ["--model", str(folder), "--max-new-tokens", "9", "--ignore-eos", "--json"]
    for more, count in ([], 0), (["--logprobs", "3"], 3):
        code, out, _ = generate(capsys, PROMPT, *options, *more)
        facts = json.loads(out)
        params = SamplingParams(max_new_tokens=9, ignore_eos=True, logprobs=count)
        (expected,) = llm.generate(PROMPT, params)
        assert (code, out.count("\n")) == (0, 1)
        for name in ("text", "token_ids", "finish_reason", "prompt_tokens"):
            assert facts[name] == getattr(expected, name)
        assert facts["prompt"] == PROMPT
        for each, theirs in zip(facts["logprobs"], expected.logprobs, strict=True):
            assert (each["token_id"], each["logprob"]) == (theirs.token_id, theirs.logprob)
            assert {top["token_id"]: top["logprob"] for top in each["top"]} == theirs.top
        assert min(facts["timings"].values()) >= 0
        assert facts["timings"].keys() == {"import_seconds", "load_seconds", "prefill_seconds", "decode_seconds"}


def test_logprobs_need_json(capsys, folder):
    code, out, err = generate(capsys, PROMPT, "--model", str(folder), "--logprobs", "2")
    assert (code, out, err) == (2, "", "olmoe: --logprobs 2 needs --json, which shows them; add it.\n")


# ---- output files ----


def test_output_is_what_would_go_to_stdout(capsys, folder, tmp_path):
    options = [PROMPT, "--model", str(folder), "--max-new-tokens", "9"]
    for more in ([], ["--chat"]):
        _, expected, _ = generate(capsys, *options, *more)
        target = tmp_path / "new" / f"out{len(more)}.txt"
        code, out, err = generate(capsys, *options, *more, "--output", str(target))
        assert (code, out, target.read_text(encoding="utf-8")) == (0, "", expected)
        assert "finish reason length" in err
    code, out, _ = generate(capsys, *options, "--json", "--output", str(tmp_path / "out.json"))
    assert (code, out) == (0, "")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["finish_reason"] == "length"
    assert generate(capsys, *options, "--output", "-")[1].startswith(PROMPT)


def test_an_existing_file_is_replaced_only_if_told_so(capsys, folder, tmp_path, monkeypatch):
    target = tmp_path / "out.txt"
    target.write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    options = [PROMPT, "--model", str(folder), "--max-new-tokens", "3", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda *a, **o: pytest.fail("the model was loaded"))
        for place in (target, tmp_path / "dangling"):
            code, out, err = generate(capsys, *options, str(place))
            assert (code, out, err.count("\n")) == (2, "", 1)
            assert "exists already; choose another name, or replace it with --overwrite." in err
    assert target.read_text() == "precious"
    assert generate(capsys, *options, str(target), "--overwrite")[0] == 0
    assert target.read_text().startswith(PROMPT)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("", "--output needs the name of a file, not an empty one."),
        (".", " is not a regular file, so --output cannot replace it; choose another name."),
        (os.devnull, " is not a regular file, so --output cannot replace it; choose another name."),
        ("file/out.txt", " cannot be written, because "),
    ],
)
def test_places_that_cannot_be_written_are_refused_at_once(capsys, folder, tmp_path, monkeypatch, output, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(checkpoint, "load", lambda *a, **o: pytest.fail("the model was loaded"))
    code, out, err = generate(capsys, PROMPT, "--model", str(folder), "--output", output, "--overwrite")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    code, _, err = generate(capsys, PROMPT, "--model", str(folder), "--overwrite")
    assert (code, err) == (2, "olmoe: --overwrite is for the file of --output, which was not given; add it.\n")


def test_an_interrupt_leaves_no_file(capsys, monkeypatch, folder, tmp_path):
    def interrupted(self):
        yield " there was"
        raise KeyboardInterrupt

    monkeypatch.setattr(llm_module.Stream, "__iter__", interrupted)
    for more in ([], ["--json"], ["--trace", str(tmp_path / "trace")]):
        options = ["--model", str(folder), "--output", str(tmp_path / "out"), *more]
        assert generate(capsys, PROMPT, *options) == (130, "", "olmoe: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_trace_has_what_every_token_chose(capsys, folder, llm, tmp_path):
    options = [PROMPT, "--model", str(folder), "--max-new-tokens", "9", "--trace", str(tmp_path / "new" / "trace")]
    code, out, _ = generate(capsys, *options)
    (completion,) = llm.generate(PROMPT, SamplingParams(max_new_tokens=9))
    assert (code, out) == (0, PROMPT + completion.text + "\n")
    trace = Trace.open(tmp_path / "new" / "trace")
    assert trace.input_ids.tolist() == llm.tokenizer.encode(PROMPT) + completion.token_ids[:-1]
    assert "replace it with --overwrite." in generate(capsys, *options)[2]
    assert generate(capsys, *options, "--overwrite")[0] == 0
    message = generate(capsys, *options, "--overwrite", "--output", options[-1])[2]
    assert "give each a file of its own" in message


def test_a_router_policy_changes_the_text(capsys, tmp_path, folder):
    options = [PROMPT, "--model", str(folder), "--max-new-tokens", "8"]
    plain = generate(capsys, *options)[1]
    path = tmp_path / "policy.json"
    path.write_text("{}", encoding="utf-8")
    assert generate(capsys, *options, "--router-policy", str(path))[1] == plain
    path.write_text('{"ban": [{"expert": 0}, {"expert": 1}], "k": 1}', encoding="utf-8")
    assert generate(capsys, *options, "--router-policy", str(path))[1] != plain
    path.write_text('{"ban": [{"expert": 999}]}', encoding="utf-8")
    code, out, err = generate(capsys, *options, "--router-policy", str(path))
    assert (code, out) == (2, "")
    assert "the expert 999, but the model's are 0 to" in err
