"""The `olmoe` command as a whole: start-up, exit codes, closed pipes and interrupts."""

from __future__ import annotations

import errno
import importlib
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import olmoe
from conftest import make_model
from olmoe.cli.main import COMMANDS, main
from olmoe.cli.version import version_text
from olmoe.errors import CheckpointError
from olmoe.ops import cpu
from olmoe.weights import export

COMMAND = [sys.executable, "-m", "olmoe.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # buffers that cannot be written are what some of these tests are about
LIMIT = 120  # seconds after which a process counts as hung


def start(*arguments: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT}
    # A process started in the background of a script inherits that interrupts are ignored.
    return subprocess.Popen(
        [*COMMAND, *arguments],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **(pipes | options),
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tokenizer_file) -> Path:
    """A checkpoint that has no EOS and a context too long to fill."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    model = make_model(max_position_embeddings=30_000, eos_token_id=None)
    export.save(model, folder, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        ["generate", "--no-such-option"],
        ["generate", "x", "--temperature", "-1"],
        ["info", "1b-7b"],
    ],
    ids=" ".join,
)
def test_answers_that_need_no_network_import_none_of_its_libraries(arguments):
    script = (
        "import sys\nfrom olmoe.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', *({'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"
    assert done.stdout + done.stderr != "HEAVY\n"  # it did answer


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_explains_and_succeeds(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: olmoe")
    assert shown.err == ""
    if arguments == ["--help"]:
        assert all(name in shown.out and summary in shown.out for name, summary in COMMANDS.items())


def test_version_names_all_that_decides_how_it_computes(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert (first, second) == (f"olmoe {olmoe.__version__}", f"torch {torch.__version__}")
    assert third == f"C++ kernels: {cpu.isa()} (also {', '.join(cpu.isas()[1:])})" or not cpu.available()
    assert fourth.startswith(f"Python {platform.python_version()}, ")


def test_version_without_kernels_and_without_torch_says_so(capsys, absent, monkeypatch):
    assert "C++ kernels: none (the C++ kernels are not installed (" in version_text()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "\ntorch: cannot be imported (" in version_text()


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["info", "1b-7b"], ["generate", ""]], ids=" ".join)
def test_the_package_runs_as_a_module(arguments):
    environment = ENVIRONMENT | {"COLUMNS": "80"}
    ours, theirs = (
        subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, env=environment, timeout=LIMIT)
        for name in ("olmoe", "olmoe.cli.main")
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)
    assert ours.stdout + ours.stderr


def test_no_command_shows_the_help_and_fails(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: olmoe")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "x", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["dance"], "invalid choice: 'dance'"),
        (["generate"], "required: PROMPT"),
        (["generate", "x", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["generate", "x", "--top-k", "1.5"], "invalid int value: '1.5'"),
        (["generate", "x", "--seed"], "expected one argument"),
        (["train"], "required: CONFIG.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_lines_that_do_not_parse_exit_with_2(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert complaint in shown.err


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["generate", "x", "--no-such-option"], "usage: olmoe generate "),
        (["generate", "x", "y"], "usage: olmoe generate "),
        (["generate"], "usage: olmoe generate "),
        (["generate", "x", "--prompt-file", "y"], "usage: olmoe generate "),
        (["info", "--no-such-option"], "usage: olmoe info "),
        (["train", "x", "y", "z"], "usage: olmoe train "),
        (["--quiet", "convert", "a", "b", "--nope", "generate"], "usage: olmoe convert "),
        (["quantize", "a"], "usage: olmoe quantize "),
        (["--no-such-option", "info"], "usage: olmoe [-h] "),
        (["--no-such-option"], "usage: olmoe [-h] "),
        (["dance"], "usage: olmoe [-h] "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_show_the_usage_of_their_command(capsys, arguments, usage):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(usage)


@pytest.mark.parametrize("option", ["verbose", "quiet"])
@pytest.mark.parametrize("name", COMMANDS)
def test_verbose_and_quiet_stand_before_the_command_or_after_it(monkeypatch, name, option):
    seen = []
    monkeypatch.setattr(
        importlib.import_module(f"olmoe.cli.{name}"), "run", lambda a: seen.append(vars(a)[option]) or 0
    )
    files = {"generate": 1, "train": 1, "sft": 1, "dpo": 1, "batch": 2, "convert": 2, "quantize": 2, "upcycle": 2}
    files |= {"plot": 1, "experiment": 1, "average": 3}
    rest = {command: ["x", "y", "z"][: files.get(command, 0)] for command in COMMANDS}
    rest["edit"] = ["x", "y"]
    rest["analyze"] = ["x", "--text", "name=file", "--output", "y"]
    rest["policy"] = ["x", "--domain", "name"]
    rest["eval"] = ["x", "--tasks", "y"]
    flag = f"--{option}"
    for arguments in (
        [flag, name, *rest[name]],
        [name, flag, *rest[name]],
        [name, *rest[name], flag],
        [flag, name, flag, *rest[name]],
    ):
        assert main(arguments) == 0
    assert main([name, *rest[name]]) == 0
    assert seen == [True, True, True, True, False]


def fail_with(monkeypatch, error: BaseException) -> None:
    def run(arguments):
        raise error

    monkeypatch.setattr(importlib.import_module("olmoe.cli.info"), "run", run)


def test_user_errors_are_their_sentence_and_2(monkeypatch, capsys):
    fail_with(monkeypatch, CheckpointError("The moon is full; wait."))
    assert main(["info"]) == 2
    assert capsys.readouterr() == ("", "olmoe: The moon is full; wait.\n")


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "olmoe: interrupted\n")


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(5, "ours"), ValueError("ours")], ids=repr)
def test_bugs_of_ours_keep_their_traceback(monkeypatch, error):
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match="ours"):
        main(["info"])


def test_a_file_that_may_not_grow_is_one_sentence(monkeypatch, capsys):
    fail_with(monkeypatch, OSError(errno.EFBIG, "File too large"))
    monkeypatch.setattr("olmoe.cli.main._discard_stdout", lambda: None)
    assert main(["info"]) == 2
    sentence = (
        "olmoe: There is no more room (File too large), so the output is incomplete; free some space and try again.\n"
    )
    assert capsys.readouterr() == ("", sentence)


def test_a_full_disk_behind_stdout_is_one_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    for arguments in (["info", "1b-7b"], ["info", "1b-7b", "--json"]):
        with open("/dev/full", "w") as full:
            process = start(*arguments, stdout=full)
            errors = process.communicate(timeout=LIMIT)[1].decode()
        assert process.returncode == 2
        assert errors == "olmoe: The disk is full, so the output is incomplete; free some space and try again.\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["info", "1b-7b"]], ids=" ".join)
def test_a_reader_that_has_left_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*arguments, stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=LIMIT)[1] == b""
    assert process.returncode == 0


def test_a_reader_that_leaves_while_text_streams_is_no_error(endless):
    process = start("generate", "Once upon a time", "--model", str(endless), "--max-new-tokens", "20000")
    assert process.stdout.read(5) == b"Once "
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=LIMIT) == 0
    assert errors == ""


def test_an_interrupt_while_text_streams_ends_it_without_a_traceback(endless):
    process = start("generate", "Once", "--model", str(endless), "--max-new-tokens", "20000")
    assert process.stdout.read(5)[:4] == b"Once"
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert errors.decode() == "olmoe: interrupted\n"
    assert text.endswith(b"\n")


def test_warnings_and_verbose_choices_go_to_stderr(endless):
    options = ["--model", str(endless), "--max-new-tokens", "2", "--quiet"]
    process = start("--verbose", "generate", "dog", *options)
    text, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert text.startswith(b"dog")
    assert "olmoe: device: " in errors.decode()
    assert b"olmoe: " not in text


def test_closed_standard_streams_are_no_crash(endless):
    script = 'exec 0<&- 1>&-; exec "$@"'
    for arguments, code, complaint in (
        (["info", "1b-7b"], 0, ""),
        (["generate", "-", "--model", str(endless)], 2, "olmoe: The prompt was to come from stdin, which is closed; "),
    ):
        done = subprocess.run(
            ["sh", "-c", script, "sh", *COMMAND, *arguments], stderr=subprocess.PIPE, env=ENVIRONMENT, timeout=LIMIT
        )
        assert done.returncode == code
        assert done.stderr.decode().startswith(complaint)
        assert b"Traceback" not in done.stderr


def test_a_terminal_that_lacks_characters_shows_others():
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    process = start("info", "1b-7b", env=environment)
    assert process.communicate(timeout=LIMIT)[1] == b""
    script = "import sys; from olmoe.cli.main import main; main(['info', '1b-7b', '--json']); print('é→')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=LIMIT)
    assert done.stdout.endswith(b"??\n")
