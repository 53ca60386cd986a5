"""docs/evaluation.md: its blocks run as they stand there, and its tables name what there is."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")

from olmoe.cli.main import _parse
from olmoe.evaluate import OlmoeLM
from olmoe.io.hub import SHIPPED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash|yaml)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "examples" / "eval", tmp_path / "examples" / "eval")
    return tmp_path


@pytest.mark.parametrize(("language", "code"), [block for block in BLOCKS if block[0] != "yaml"])
def test_blocks(folder, language, code):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    environment = os.environ | {"PATH": path, "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--output" in code:
        assert (folder / "int4.json").is_file()
        assert (folder / "int4.samples.next_sentence.jsonl").is_file()


def test_the_yaml_is_that_of_the_example():
    ((_, block),) = [block for block in BLOCKS if block[0] == "yaml"]
    example = (ROOT / "examples" / "eval" / "next_sentence.yaml").read_text("utf-8")
    assert all(line in example for line in block.splitlines())


def test_the_tables_name_all_options_and_arguments(capsys):
    with pytest.raises(SystemExit):
        _parse(["eval", "--help"])
    there = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    first = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
    named = set(re.findall(r"--[a-z][a-z-]+", " ".join(first)))
    assert named == there - {"--help", "--verbose", "--quiet"}
    arguments = {name for cell in first for name in re.findall(r"`([a-z_]+)`", cell)}
    assert set(inspect.signature(OlmoeLM).parameters) - {"show_progress"} <= arguments
