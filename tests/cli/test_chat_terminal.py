"""`olmoe chat` in a pseudo-terminal: keys, several lines, streaming, Ctrl-C, history."""

from __future__ import annotations

import json
import sys
import time

import pytest

from conftest import make_model
from olmoe.cli.chat_terminal import harmless
from olmoe.weights import export

if sys.platform == "win32":
    pytest.skip("no pseudo-terminals", allow_module_level=True)

from terminals import ALT_ENTER, CTRL_C, CTRL_D, ENTER, TAB, Terminal

# A slow model: a token takes long enough to press keys meanwhile.
CODE = """
import os, sys, time
from olmoe.engine.text_stream import TextStream
add = TextStream.add
def slow(self, token_id):
    with open(os.environ["TOKENS"], "a") as file:
        file.write("x")
    time.sleep({seconds})
    return add(self, token_id)
TextStream.add = slow
from olmoe.cli.main import main
sys.exit(main(["chat", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    target = tmp_path_factory.mktemp("chat") / "model"
    text = tokenizer_file.read_text(encoding="utf-8")
    export.save(make_model(max_position_embeddings=4096), target, extra_files={"tokenizer.json": text})
    return target


def chat(folder, tmp_path, *options: str, seconds: float = 0.0) -> Terminal:
    arguments = ["--model", str(folder), "--threads", "1", "--ignore-eos", *options]
    state = {"XDG_STATE_HOME": str(tmp_path / "state"), "TOKENS": str(tmp_path / "tokens")}
    return Terminal(CODE.format(seconds=seconds), arguments, state)


def saved(terminal: Terminal, path) -> list[dict[str, str]]:
    terminal.wait_for("tokens left")
    path.unlink(missing_ok=True)
    terminal.keys(f"/save {path}{ENTER}")
    terminal.wait_for("messages are in")
    return json.loads(path.read_text(encoding="utf-8"))


def wait_for_tokens(tmp_path, count: int) -> None:
    """Until the model has generated so many."""
    deadline = time.monotonic() + 60
    while not (tmp_path / "tokens").exists() or (tmp_path / "tokens").stat().st_size < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def leave(terminal: Terminal) -> None:
    terminal.wait_for("tokens left")
    terminal.keys(CTRL_D)
    assert terminal.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(folder, tmp_path):
    with chat(folder, tmp_path, "--max-new-tokens", "2000", seconds=0.02) as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"the dog{ENTER}")
        wait_for_tokens(tmp_path, 10)  # of 40 seconds
        terminal.keys(CTRL_C)
        terminal.wait_for("The answer was stopped; what it said stays", 10)
        messages = saved(terminal, tmp_path / "chat.json")
        assert [m["role"] for m in messages] == ["user", "assistant"]
        assert 0 < len(messages[1]["content"]) < 4000
        terminal.wait_for("tokens left")
        terminal.keys(CTRL_C)  # with no answer under way it leaves as little
        terminal.wait_for("Ctrl-D or /exit leaves")
        leave(terminal)


def test_ctrl_c_does_not_wait_for_the_first_token(folder, tmp_path):
    with chat(folder, tmp_path, seconds=60) as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"the dog{ENTER}")
        wait_for_tokens(tmp_path, 1)
        terminal.keys(CTRL_C)
        terminal.wait_for("The answer was stopped", 20)
        assert [m["role"] for m in saved(terminal, tmp_path / "chat.json")] == ["user", "assistant"]
        leave(terminal)


def test_answers_stream(folder, tmp_path):
    """The first tokens are shown long before the last one is there, which is never."""
    with chat(folder, tmp_path, "--max-new-tokens", "2000", seconds=0.05) as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"the dog{ENTER}")
        wait_for_tokens(tmp_path, 20)
        terminal.keys(CTRL_C)
        shown = terminal.wait_for("The answer was stopped")
        answer = saved(terminal, tmp_path / "chat.json")[1]["content"]
        assert answer.strip()
        assert answer.split()[0] in shown


def test_messages_of_several_lines(folder, tmp_path):
    with chat(folder, tmp_path, "--max-new-tokens", "3") as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"one{ALT_ENTER}two\\{ENTER}three{ENTER}")
        terminal.wait_for("cut after 3 tokens")
        terminal.wait_for("tokens left")
        terminal.keys(f"\x1b[200~four\nfive\x1b[201~{ENTER}")  # pasted
        terminal.wait_for("cut after 3 tokens")
        messages = saved(terminal, tmp_path / "chat.json")
        assert [m["content"] for m in messages if m["role"] == "user"] == ["one\ntwo\nthree", "four\nfive"]
        leave(terminal)


def test_commands_and_mistakes(folder, tmp_path):
    with chat(folder, tmp_path, "--max-new-tokens", "3", "--system", "Be brief.") as terminal:
        terminal.wait_for("OLMoE-Instruct's, the default")
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("tokens left")
        terminal.wait_for(r"\| /help")  # of the status line
        terminal.keys(f"/he{TAB}")
        terminal.wait_for("lp")
        terminal.keys(ENTER)
        terminal.wait_for("set the system prompt; without TEXT it shows the prompt")
        terminal.wait_for("tokens left")
        terminal.keys(f"/system{ENTER}")
        terminal.wait_for(r"The system prompt is: Be brief\.")
        terminal.wait_for("tokens left")
        terminal.keys(f"/bake{ENTER}")
        terminal.wait_for("There is no command '/bake'; /help lists them")
        terminal.wait_for("tokens left")
        terminal.keys(f"/set top_p 2{ENTER}")
        terminal.wait_for("top_p must be above 0 and at most 1, not 2.0")
        terminal.wait_for("tokens left")
        terminal.keys(f"/set temperature 0.5{ENTER}")
        terminal.wait_for("temperature is 0.5")
        terminal.wait_for("tokens left")
        terminal.keys(f"/exit{ENTER}")
        assert terminal.wait() == 0


def test_messages_are_remembered_unless_that_is_unwanted(folder, tmp_path):
    history = tmp_path / "state" / "olmoe" / "chat_history"
    with chat(folder, tmp_path, "--no-history") as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"/system one{ENTER}")
        terminal.wait_for("system prompt is")
        leave(terminal)
    assert not history.exists()
    with chat(folder, tmp_path) as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"/system two{ENTER}")
        terminal.wait_for("system prompt is")
        leave(terminal)
    assert "/system two" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0
    with chat(folder, tmp_path) as terminal:
        terminal.wait_for("tokens left")
        terminal.keys(f"\x1b[A{ENTER}")  # the arrow up
        terminal.wait_for("system prompt is: two")


def test_a_state_folder_that_cannot_be_written_is_no_obstacle(folder, tmp_path):
    (tmp_path / "state").write_text("a file", encoding="utf-8")
    with chat(folder, tmp_path) as terminal:
        leave(terminal)


def test_a_model_cannot_command_the_terminal():
    assert harmless("a\x1b[2Jb\rc\x9b\x07 ü\n\t") == "a\ufffd[2Jb\ufffdc\ufffd\ufffd ü\n\t"
