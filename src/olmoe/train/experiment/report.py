"""Writing the results of an experiment into its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from olmoe.io.atomic import atomic_file, write_text
from olmoe.train.experiment.definition import Experiment
from olmoe.train.experiment.results import collect
from olmoe.train.experiment.runs import Run
from olmoe.train.experiment.table import markdown

RESULTS, TABLE, FIGURE = "results.json", "results.md", "loss.png"


def write_report(experiment: Experiment, runs: Sequence[Run], output: Path, *, figure: bool = True) -> str:
    """Write the results of the finished runs, their tables and their figure into `output`; the tables.

    Raises `UserError` if no run is finished.
    """
    results = collect(experiment, runs)
    text = markdown(results)
    write_text(output / RESULTS, json.dumps(results, indent=1) + "\n")
    write_text(output / TABLE, text)
    if figure:
        from olmoe.train.experiment.figure import png

        with atomic_file(output / FIGURE) as temporary:
            temporary.write_bytes(png(results))
    return text
