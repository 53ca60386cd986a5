"""`olmoe chat` without a terminal: each line a message, answers on stdout, all else on stderr."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
import torch

from adapter_cases import random_adapter
from conftest import make_model
from olmoe.adapters import Factors, write_adapter
from olmoe.cli.main import main
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.weights import export

PARAMS = SamplingParams(max_new_tokens=5, ignore_eos=True)
OPTIONS = ["--max-new-tokens", "5", "--ignore-eos"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    target = tmp_path_factory.mktemp("chat") / "model"
    text = tokenizer_file.read_text(encoding="utf-8")
    export.save(make_model(max_position_embeddings=256), target, extra_files={"tokenizer.json": text})
    return target


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder)


@pytest.fixture
def chat(capsys, monkeypatch, folder):
    def run(content: str | bytes, *options: str) -> tuple[int, str, str]:
        data = content.encode() if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        capsys.readouterr()
        code = main(["chat", "--model", str(folder), *OPTIONS, *options])
        return code, *capsys.readouterr()

    return run


def answers(llm, *questions: str, system: str | None = None) -> list[str]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        texts.append(llm.generate(llm.tokenizer.encode_chat(messages), PARAMS)[0].text)
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_each_line_is_a_message_and_stdout_has_the_answers(chat, llm):
    code, out, err = chat("the dog\n\nthe ball\\\nand more", "--quiet", "--system", "Be brief.")
    expected = answers(llm, "the dog", "the ball\nand more", system="Be brief.")
    assert (code, out, err) == (0, "".join(f"{text}\n" for text in expected), "")


def test_remarks_go_to_stderr_and_the_template_is_named_once(chat):
    code, out, err = chat("the dog\nthe ball\n")
    assert code == 0
    assert "cut after" not in out
    assert err.count("The chat template is OLMoE-Instruct's, the default") == 1
    assert err.count("The answer was cut after 5 tokens; /set max_new_tokens 10 allows more.") == 2


def test_two_slashes_begin_a_message_with_one(chat, llm):
    code, out, _ = chat("//system\n", "--quiet")
    assert (code, out) == (0, answers(llm, "/system")[0] + "\n")


def test_a_chat_is_saved_and_loaded(chat, llm, tmp_path):
    first, second = answers(llm, "the dog", "the ball")
    path = tmp_path / "a chat.json"
    code, out, err = chat(f"the dog\n/save '{path}'\n", "--quiet")
    assert (code, out, err) == (0, f"{first}\n", f"2 messages are in {path}.\n")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": first},
    ]
    assert chat("the ball\n", "--quiet", "--load", str(path))[:2] == (0, f"{second}\n")
    assert chat(f"/load '{path}'\nthe ball\n/save\n", "--quiet")[:2] == (0, f"{second}\n")
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 4


def test_a_file_is_replaced_only_when_asked_for(chat, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("mine", encoding="utf-8")
    code, out, err = chat(f"/save {path}\nthe dog\n", "--quiet")
    assert (code, out) == (2, "")
    assert err == f"olmoe: {path} exists already; choose another name, or replace it with --overwrite.\n"
    assert path.read_text(encoding="utf-8") == "mine"
    assert chat(f"/save --overwrite {path}\n", "--quiet")[0] == 0
    assert json.loads(path.read_text(encoding="utf-8")) == []


def test_settings_reach_the_sampler_and_are_checked(chat, llm, monkeypatch):
    seen = []
    stream = LLM.stream
    monkeypatch.setattr(LLM, "stream", lambda self, p, params: seen.append(params) or stream(self, p, params))
    code, _, err = chat(
        "/set max-new-tokens 2\n/set temperature 1.5\n/set seed 3\n/set stop zebra\n/set ignore_eos true\n"
        '/set logit_bias {"5": -1}\nthe dog\n/set seed default\n/set\n',
        "--quiet",
    )
    assert code == 0
    (params,) = seen
    assert (params.max_new_tokens, params.temperature, params.seed, params.ignore_eos) == (2, 1.5, 3, True)
    assert params.stop[0] == "zebra"
    assert params.logit_bias == {5: -1.0}
    listed = dict(line.split(None, 1) for line in err.splitlines()[-14:])
    assert listed["temperature"] == "1.5"
    assert listed["seed"] == "none"
    assert listed["stop"] == '["zebra"]'


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/bake", "There is no command '/bake'; /help lists them."),
        ("/set wings 2", "There is no setting 'wings'; /set alone lists them."),
        ("/set grammar 2", "There is no setting 'grammar'; /set alone lists them."),
        ("/set top_k", "/set top_k needs a value; for example /set temperature 0.7."),
        ("/set top_k many", "top_k must be a whole number, not 'many'."),
        ("/set temperature -1", "temperature must be at least 0, not -1.0."),
        ("/save", "/save needs the name of one file, not 0; put quotes around a name with spaces."),
        ("/save a b", "/save needs the name of one file, not 2; put quotes around a name with spaces."),
        ("/save 'a", '"\'a" cannot be read (No closing quotation); close its quotes.'),
        ("/load no-such-file.json", "There is no file 'no-such-file.json'; check its name."),
        ("/load .", ". cannot be read (Is a directory); give another file."),
        ("/undo", "Nothing has been asked yet; write a message first."),
        ("/retry", "Nothing has been asked yet; write a message first."),
        ("/experts", "There is no answer whose experts are known; ask something first."),
    ],
)
def test_a_mistake_is_one_sentence_and_ends_a_piped_chat(chat, line, sentence):
    code, out, err = chat(f"{line}\nthe dog\n", "--quiet")
    assert (code, out, err) == (2, "", f"olmoe: {sentence}\n")


def test_retry_undo_and_reset(chat, llm):
    dog, ball = answers(llm, "the dog"), answers(llm, "the ball")
    code, out, err = chat("the dog\n/retry\n/undo\nthe ball\n/reset\nthe dog\n/exit\nthe ball\n", "--quiet")
    assert (code, out) == (0, "".join(f"{text}\n" for text in (*dog, *dog, *ball, *dog)))
    assert err.splitlines() == [
        "With temperature 0.0 the answer stays the same; /set temperature 0.7 gives others.",
        "Taken back: the dog",
        "The chat starts again.",
    ]


def test_what_is_left_of_the_context_is_said_and_a_full_one_is_refused(chat):
    code, out, err = chat("the dog " * 20 + "\nthe ball\n" + "the dog " * 60 + "\n", "--max-new-tokens", "90")
    assert code == 2
    assert out.count("\n") >= 1
    assert "of 256 tokens of the context are left; /reset starts again." in err or "cut by the end of the" in err
    assert "nothing was sent; start again with /reset" in err.splitlines()[-1]


def test_a_wrong_file_is_named_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    assert main(["chat", "--model", "no-such-model", "--load", "no-such-file.json"]) == 2
    assert capsys.readouterr().err == "olmoe: There is no file 'no-such-file.json'; check its name.\n"


def test_a_device_is_not_read_to_its_end(capsys, monkeypatch):
    if not os.path.exists("/dev/zero"):
        pytest.skip("needs a device without end")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    assert main(["chat", "--model", "no-such-model", "--load", "/dev/zero"]) == 2
    assert capsys.readouterr().err == "olmoe: /dev/zero is a device; give a file that /save wrote.\n"


def test_what_is_no_unicode_is_saved_as_it_was_loaded(chat, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text('[{"role": "user", "content": "a\\ud83d"}]', encoding="utf-8")
    code, _, _ = chat(f"/load {old}\n/save {new}\n", "--quiet")
    assert code == 0
    assert json.loads(new.read_text(encoding="utf-8")) == json.loads(old.read_text(encoding="utf-8"))


def test_stdin_that_is_not_utf_8_is_one_sentence(chat):
    code, out, err = chat(b"caf\xe9\n", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("olmoe: Line 1 of stdin is not UTF-8 (")


def test_a_closed_stdin_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat"]) == 2
    assert capsys.readouterr().err.startswith("olmoe: The messages come from a terminal or from stdin")


def test_experts_of_the_last_answer_are_drawn(chat, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    code, _, err = chat("the dog\n/experts\n", "--quiet")
    assert code == 0
    head, first, second, scale = err.splitlines()
    assert head == "    experts 0 to 7, a row a layer  most used"
    for number, row in enumerate((first, second)):
        assert row.startswith(f"{number:>2}  ")
        # Three experts a token, so the shares of all eight sum to three.
        shares = [int(word.rstrip("%")) for word in row[12:].split() if word.endswith("%")]
        assert shares == sorted(shares, reverse=True)
        assert 295 <= sum(shares) <= 305
    assert scale.startswith("an even share is 37.5% of the tokens")


def test_an_adapters_chat_template_is_used(chat, folder, llm, tmp_path):
    adapter = random_adapter(llm.config)
    adapter.factors = {name: Factors(a, torch.zeros_like(b)) for name, (a, b) in adapter.factors.items()}
    write_adapter(adapter, tmp_path, str(folder))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}", encoding="utf-8")
    code, out, err = chat("the dog", "--adapter", str(tmp_path))
    assert (code, out) == (0, llm.generate("the dog", PARAMS)[0].text + "\n")
    assert "OLMoE-Instruct's" not in err
    assert "OLMoE-Instruct's" in chat("the dog")[2]
