"""benchmarks/cpu_engines.py on a small model: whole paths of ours and of llama.cpp. No seconds are asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe.cli.main import main
from packed_folders import WHOLE, packed_folder

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "cpu_engines.py"


def compared(folder: Path, *options: object) -> dict:
    """The line of JSON of a run on a packed folder."""
    command = [sys.executable, PROGRAM, "--parts", "whole", "--int4", folder, "--config", folder / "config.json"]
    numbers = ["--context", 5, "--whole-steps", 6, "--whole-rounds", 2, "--threads", 1, "--results", "-"]
    done = subprocess.run(
        [str(part) for part in (*command, *numbers, *options)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not PROGRAM.is_file(), reason="not a checkout")
def test_ours_alone(tmp_path):
    facts = compared(packed_folder(tmp_path / "packed", "int4", **WHOLE))
    assert facts["whole"] == {"rounds": 2, "steps": 6, "sampling": {"temperature": 0.8, "top_p": 0.95, "top_k": 40}}
    assert list(facts["parts"]["whole"]["whole_5"]["tokens_per_s"]) == ["ours"]
    assert facts["parts"]["whole"]["whole_5"]["tokens_per_s"]["ours"] > 0


@pytest.mark.skipif(not PROGRAM.is_file(), reason="not a checkout")
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_llama_cpp_by_its_reader_and_by_its_own_timings(tmp_path, tokenizer_file):
    folder, gguf = packed_folder(tmp_path / "packed", "int4", tokenizer_file, **WHOLE), tmp_path / "Q4_0.gguf"
    assert main(["convert", str(folder), str(gguf), "--quiet"]) == 0
    facts = compared(folder, "--gguf", gguf, "--llama-python", sys.executable)
    for name in ("whole_5", "whole_5_own_timings"):
        result = facts["parts"]["whole"][name]
        assert set(result["tokens_per_s"]) == {"ours", "llama.cpp Q4_0"}
        assert min(result["tokens_per_s"].values()) > 0
        assert set(result["ratio"]) == {"llama.cpp Q4_0", "best"}
    assert "xllamacpp" in facts["engines"]["llama.cpp Q4_0"]
