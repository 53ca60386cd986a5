"""The examples of docs/analysis.md that trace do so, on the shipped checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from olmoe.analysis.trace import Trace
from olmoe.io.hub import SHIPPED

PAGE = Path(__file__).parent.parent.parent / "docs" / "analysis.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
@pytest.mark.parametrize(("tool", "files"), [("TraceWriter", {"stories", "more"}), ("record_routing", {"routing"})])
def test_tracing_examples(tool, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = [each for each in EXAMPLES if tool in each]
    exec(compile(example.replace('"allenai/OLMoE-1B-7B-0924"', repr(str(SHIPPED))), tool, "exec"), {})
    assert {path.stem for path in tmp_path.iterdir()} == files
    assert all(len(Trace.open(path)) > 20 for path in tmp_path.iterdir())
    assert capsys.readouterr().out
