"""The Python examples of docs/python.md run in order, and its table is correct."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from olmoe.engine.sampling_params import SamplingParams
from olmoe.io.hub import SHIPPED

PAGE = (Path(__file__).parent.parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
def test_examples_run_and_print_what_they_say(capsys):
    threads, namespace = torch.get_num_threads(), {}
    outputs = []
    try:
        for code in EXAMPLES:
            exec(compile(code, "docs/python.md", "exec"), namespace)
            outputs.append(capsys.readouterr().out)
            assert ("print" in code) == bool(outputs[-1].strip())
    finally:
        torch.set_num_threads(threads)
    assert len(outputs) == 8
    assert "' time' -0." in outputs[2]
    assert re.search(r"^length 0\.\d+", outputs[2], flags=re.MULTILINE)
    assert re.search(r"\.\ncancelled \d+\n$", outputs[3])
    for printed in re.findall(r"print\(error\)  # (.*)", EXAMPLES[4]):
        assert outputs[4] == printed + "\n"
    text, reason = outputs[5].strip().rsplit(maxsplit=1)
    assert (sorted(json.loads(text)), reason) == (["age", "name"], "stop")


def test_the_table_lists_every_parameter_and_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", PAGE, flags=re.MULTILINE))
    assert rows == {field.name: str(field.default) for field in fields(SamplingParams)}
