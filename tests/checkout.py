"""Refuses, when it is imported, to run the tests of one checkout on the code of another."""

from __future__ import annotations

import sys
from pathlib import Path

import olmoe


def foreign(tests: Path, package: Path) -> str | None:
    """Why the tests in this folder must not run on the package with this `__init__.py`; None where all is well.

    An editable install points at one checkout. Under the same environment a second one would test the first's code.
    """
    ours, theirs = tests.parent, package.parents[2]
    if not (ours / "src" / "olmoe").is_dir() or package.is_relative_to(ours):
        return None
    if not (theirs / "pyproject.toml").is_file():
        return None  # installed as a wheel, which somebody chose to test
    return (
        f"These are the tests of {ours}, but olmoe is imported from {theirs}; give this checkout an environment of its "
        f"own (make setup), or reinstall it here: pip install --editable {ours}"
    )


if problem := foreign(Path(__file__).resolve().parent, Path(olmoe.__file__).resolve()):
    sys.exit(problem)  # pytest shows a traceback of any other exception
