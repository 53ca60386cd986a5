"""README's commands do what README says. Each command of its `bash` blocks is executed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe.io.hub import SHIPPED
from olmoe.train.config import load_config

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


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("make test", *PACKED, *LONG)])
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


@pytest.mark.parametrize("command", LONG)
def test_long_training_command_names_a_valid_configuration(command):
    """An hour of training is not repeated here; its configuration must load, and the command exist."""
    config = load_config(ROOT / command.split()[-1])
    assert config.model.num_parameters == 7_637_120


@pytest.mark.parametrize("path", re.findall(r"^([\w./-]+/|[\w./-]+\.(?:py|md|toml))\s{2,}", README, flags=re.MULTILINE))
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
