"""README's commands do what README says. Each command of its `bash` blocks is executed here."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from olmoe.io.hub import SHIPPED
from olmoe.train.config import load_config
from ports import kept_port

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.sub(r"\s+#.*", "", line).strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.fixture
def environment(tmp_path):
    """A `VENV` for make that is this environment, set up already, and its commands on the PATH."""
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    for stamp in ("torch", "run", "dev"):
        (venv / stamp).touch()
    return os.environ | {"VENV": str(venv), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command, environment, cwd=ROOT):
    return subprocess.run(
        command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_readme_shows_commands():
    assert any(command.startswith("make generate") for command in COMMANDS)
    assert "make test" in COMMANDS


PACKED = [command for command in COMMANDS if "tiny-int4" in command]  # each needs what the one before it wrote
LONG = [command for command in COMMANDS if "configs/olmoe-tiny" in command]


# Those that go on until somebody ends them, and what somebody types.
ENDLESS = [command for command in COMMANDS if command.startswith(("olmoe serve", "olmoe chat"))]


def test_the_server_serves_until_it_is_stopped(environment):
    (command,) = [command for command in ENDLESS if command.startswith("olmoe serve")]
    with (
        kept_port() as port,
        subprocess.Popen(
            shlex.split(re.sub(r"--port \d+", f"--port {port}", command)),
            cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
        ) as server,
    ):  # fmt: skip
        try:
            lines = iter(server.stderr.readline, "")
            assert any(f"http://127.0.0.1:{port}/" in line for line in lines)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as page:
                assert b"<html" in page.read()
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def test_a_chat_answers(environment):
    (command,) = [command for command in ENDLESS if command.startswith("olmoe chat")]
    done = subprocess.run(
        f"echo Hello | {command}", shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("make test", *PACKED, *LONG, *ENDLESS)])
def test_command_runs(command, environment, tmp_path):
    cwd = ROOT
    if "train" in command:
        # Its output folder is in the checkout: run on a copy, so that tests leave nothing behind.
        for folder in ("configs", "examples"):
            (tmp_path / folder).mkdir()
            subprocess.run(["cp", "-r", f"{ROOT / folder}/.", str(tmp_path / folder)], check=True)
        cwd = tmp_path
    if command.startswith("git clone") or command.startswith("cd "):
        pytest.skip("the checkout is here already")
    if not SHIPPED.is_dir():
        pytest.skip("the shipped checkpoint is not there yet")
    done = run(command, environment, cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_packed_checkpoints_from_making_to_converting(environment, tmp_path):
    (tmp_path / "src").symlink_to(ROOT / "src")
    assert len(PACKED) >= 3
    for command in PACKED:
        done = run(command, environment, tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny.gguf").is_file()


def test_make_test_is_what_ci_runs(environment):
    plan = run("make --dry-run test", environment).stdout
    for tool in ("ruff check", "mypy", "lint-imports", "pytest"):
        assert tool in plan
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_a_long_training_command_is_shown():
    assert LONG == ["olmoe train configs/olmoe-tiny.toml"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("olmoe-tiny*.toml")), ids=lambda path: path.name)
def test_long_training_command_names_a_valid_configuration(path):
    """An hour of training is not repeated here; its configuration must load, and so must those of the later stages."""
    config = load_config(path)
    assert config.model.num_parameters == 7_637_120


TREE = re.findall(r"(?<![\w/.])[\w./-]+/(?= )", re.findall(r"```\n(src/.*?)```", README, flags=re.DOTALL)[-1])
LINKS = re.findall(r"\]\(([\w./-]+)\)", README) + re.findall(r"`((?:src|docs|benchmarks)/[\w./-]+)`", README)


def test_readme_is_short():
    assert len(README.splitlines()) <= 110
    assert len(TREE) >= 10


@pytest.mark.parametrize("path", sorted(set(LINKS)))
def test_what_readme_points_at_exists(path):
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", TREE)
def test_file_tree_names_files_that_exist(path):
    assert any(ROOT.rglob(path.rstrip("/").split("/")[-1])), path


def test_python_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    if not SHIPPED.is_dir():
        pytest.skip("the shipped checkpoint is not there yet")
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


# ---- the table of results ----


@pytest.fixture(scope="module")
def results_table():
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "scripts" / "results_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_committed_results_say(results_table):
    assert results_table.with_table(README, results_table.table()) == README, "run python scripts/results_table.py"


def test_another_table_is_noticed(results_table):
    forged = re.sub(r"(?<=\| decoding, int4 \| )[\d.]+ tokens/s", "99.9 tokens/s", README)
    assert forged != README
    assert results_table.with_table(forged, results_table.table()) == README


def test_every_result_has_an_id_of_its_own(results_table):
    keys = [row.key for row in results_table.ROWS]
    assert len(set(keys)) == len(keys)


def lines_with_shares(*shares):
    part = {"tokens_per_s": {"ours": 2.0, "peer": 1.0}, "ratio": {"best": 2.0}}
    return [{"parts": {"int4": {"decode_64": part | {"share_of_ceiling": share}}}, "at": share} for share in shares]


def test_nothing_above_its_ceiling_is_quoted(results_table):
    (row,) = [row for row in results_table.ROWS if row.key == "cpu_engines:int4.decode_64"]
    line, figure = results_table.newest(row, lines_with_shares(0.7, 0.8, 1.03))
    assert (line["at"], figure.share) == (0.8, 0.8)
    with pytest.raises(results_table.AboveCeiling, match=r"int4\.decode_64: all 2 measurements"):
        results_table.newest(row, lines_with_shares(1.2, 1.03))
    with pytest.raises(LookupError):
        results_table.newest(row, [])


# ---- the journal ----

JOURNAL = ROOT / "docs" / "journal"
ENTRIES = sorted(path.name for path in JOURNAL.glob("*.md") if path.name != "README.md")


def test_the_journals_index_names_every_entry_in_the_order_of_dates():
    index = (JOURNAL / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d-]+) \| \[.+\]\((.+)\) \| .+\. \|$", index, flags=re.MULTILINE)
    assert sorted(name for _, name in rows) == ENTRIES
    assert all(name.startswith(date) for date, name in rows)
    assert [date for date, _ in rows] == sorted(date for date, _ in rows)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_a_date_a_question_numbers_and_a_verdict(name):
    text = (JOURNAL / name).read_text(encoding="utf-8")
    assert re.match(rf"# .+\n{name[:10]}(?: to [\d-]+)?\n\n\*\*Question\.\*\* ", text)
    assert re.search(r"\n## Numbers\n.*\d.*\n## Verdict\n\S", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([\w.-]+\.md)\)", text):
        assert (JOURNAL / link).is_file(), link
