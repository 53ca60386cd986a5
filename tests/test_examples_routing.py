"""The examples of looking inside: scripts that patch routers, and a notebook from a trace to figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from olmoe.io.hub import SHIPPED

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "routing.ipynb"

pytestmark = pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")


def printed(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / "interpretability" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    source = Path(__file__).read_text(encoding="utf-8")
    scripts = [path.name for path in (EXAMPLES / "interpretability").iterdir() if path.is_file()]
    assert scripts
    assert [name for name in scripts if f'"{name}"' not in source] == []


def shares(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d)%", line)]


def test_hooks():
    out = printed("hooks.py", "The king and the queen had a")
    read, moved, table, stories = out.split("\n\n")
    assert len(read.splitlines()) == 1 + 7  # a line a token
    weights = [int(weight) for weight in re.findall(r"\(\s*(\d+)%\)", read.splitlines()[-1])]
    assert weights == sorted(weights, reverse=True)
    last = re.findall(r"(\d+) \(", read.splitlines()[-1])
    moves = {expert: float(value) for expert, value in re.findall(r"(\d+): (\d\.\d+)", moved)}
    assert len(moves) == 8
    assert list(moves)[:4] == last  # which the token chose, in their order
    assert min(moves.values()) >= 0
    most = max(moves, key=lambda expert: moves[expert])
    assert f"without {most}:" in table
    rows = [shares(line) for line in table.splitlines()[1:]]
    assert all(len(row) == 3 for row in rows)
    assert any(row[0] != row[1] for row in rows)  # a patched router decides otherwise
    assert any(row[0] != row[2] for row in rows)
    assert sum(row[0] for row in rows) <= 100.5
    assert re.search(r"^  as it is: (['\"]).+\1$", stories, re.MULTILINE)


def test_nnsight():
    pytest.importorskip("nnsight", reason="nnsight is not installed")
    out = printed("nnsight_routing.py", "The king and the queen had a")
    first, choices, rests, without, stories = out.split("\n\n")
    assert first.startswith("'The king and the queen had a' goes on with ")
    assert len(choices.splitlines()) == 1 + 6
    values = {
        (layer, expert): float(value)
        for layer, row in enumerate(rests.splitlines()[1:])
        for expert, value in re.findall(r"expert (\d+): ([+-]\d\.\d+)", row)
    }
    assert len(values) == 4 * 3
    layer, most = max(values, key=lambda place: values[place])
    assert without.startswith(f"Without expert {most} of layer {layer}: ")
    before, after = map(float, re.search(r"(-\d+\.\d+) -> (-\d+\.\d+) nats", without).groups())
    assert after < before  # it did rest on that expert
    assert shares(first)[0] == pytest.approx(100 * 2.718281828**before, rel=0.02)
    assert f"without expert {most}: " in stories


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook, kind):
    return [each for cell in notebook.cells if cell.cell_type == "code" for each in cell.outputs if kind in each]


def test_the_notebook_runs_from_trace_to_figure(notebook, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")
    again = notebook.copy()
    for cell in again.cells:
        if cell.cell_type == "code":
            cell["outputs"], cell["execution_count"] = [], None
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    nbclient.NotebookClient(again, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    text = "".join(each["text"] for each in outputs(again, "text"))
    figures = [each for each in outputs(again, "data") if "image/png" in each["data"]]
    assert len(figures) == 2
    assert "each token goes to 8 of 64 experts" in text
    # The expert that code singles out reads code, and code suffers most without it.
    rows = re.findall(r"^(\w+) .*\(\s*([+-]\d+\.\d)%\).*\(\s*([+-]\d+\.\d)%\)$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == {"novels", "speeches", "countries", "code"}
    for column, least in ((1, 1), (2, 5)):
        change = {row[0]: float(row[column]) for row in rows}
        assert max(change, key=lambda name: change[name]) == "code"
        assert change["code"] > least


def test_the_notebook_is_one_that_people_can_read(notebook):
    """Each code cell stands after prose, and what it printed and drew is kept, small, and of no certain machine."""
    assert NOTEBOOK.stat().st_size < 200_000
    before = None
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert before == "markdown", cell.source
            assert all(each.output_type != "error" for each in cell.outputs)
        before = cell.cell_type
    assert len([each for each in outputs(notebook, "data") if "image/png" in each["data"]]) == 2
    assert not re.search(r"/(work|home|root|tmp|Users)/", "".join(cell.source for cell in notebook.cells))
    assert not re.search(r"/(work|home|root|tmp|Users)/", "".join(str(each) for each in outputs(notebook, "text")))
