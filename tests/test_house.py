"""The house rules that a machine can check."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import foreign

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests", "benchmarks", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < (400 if path.name == "network.py" else 501), f"{path} has {lines} lines: split it along a seam"


def test_no_file_is_called_utils():
    assert not [p for p in SOURCES if re.search(r"utils?|helpers?|misc", p.stem)]


def test_no_live_object_changes_its_class():
    assert [p for p in SOURCES if "src" in p.parts and "__class__ =" in p.read_text(encoding="utf-8")] == []


def test_modes_of_torch_are_set_so_that_an_interrupt_leaves_them_as_they_were():
    """Functions take the decorators of `olmoe.runtime`; torch's own are interrupted within."""
    theirs = re.compile(r"@torch\.(no_grad|inference_mode)\b|with torch\.inference_mode\(")
    source = [path for path in SOURCES if path.is_relative_to(ROOT / "src")]
    assert [path.name for path in source if theirs.search(path.read_text(encoding="utf-8"))] == []


def test_every_module_says_what_it_is():
    texts = {p: p.read_text(encoding="utf-8") for p in SOURCES if "tests" not in p.relative_to(ROOT).parts}
    assert [p for p, text in texts.items() if not text.startswith('"""')] == []


def test_tests_mirror_the_source():
    """A test file lies where its module does, as `test_<module>.py` or `test_<module>_<aspect>.py`.

    `test_ecosystem_<package>.py` are about what other packages do with our classes, `test_model_conformance.py` about
    what transformers expects of every model, `test_documentation.py` about a page of docs/; those about several modules
    are listed.
    """
    besides = {
        "test_deploy",
        "test_deploy_ray",
        "test_examples",
        "test_examples_routing",
        "test_house",
        "test_readme",
        "test_recipes",
        "ops/test_primitives",
        "ops/test_parity",
        "analysis/test_documentation",
        "hf/test_documentation",
        "train/finetune/test_documentation",
        "serve/test_documentation",
        "train/test_documentation",
    }
    astray = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        place = path.relative_to(ROOT / "tests").with_suffix("")
        modules = {"init", *(p.stem for p in (ROOT / "src" / "olmoe" / place.parent).glob("*.py"))}
        name = place.name.removeprefix("test_")
        known = any(name == module or name.startswith(f"{module}_") for module in modules)
        if not known and str(place) not in besides and not name.startswith("ecosystem_"):
            astray.append(str(place))
    assert astray == []


def test_no_path_of_one_machine_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    roots = "|".join(("work", "home", "root", "farm"))
    found = subprocess.run(
        ["git", "grep", "-nE", rf"(^|[^A-Za-z0-9_.$])/({roots})/[a-z]", "--", ".", ":!*.gz"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.stdout == ""


def test_no_conflict_of_a_merge_is_left():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(
        ["git", "grep", "-nE", "^(<{7}|>{7}) ", "--", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_changelog_and_version_agree():
    import olmoe

    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{olmoe.__version__}"' in pyproject
    assert f"## {olmoe.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_tests_of_one_checkout_refuse_the_code_of_another(tmp_path):
    """An editable install points at this checkout; under the same environment a second one would test our code."""
    second = tmp_path / "second"
    (second / "src" / "olmoe").mkdir(parents=True)
    (second / "src" / "olmoe" / "__init__.py").write_text("raise AssertionError('never imported')", encoding="utf-8")
    shutil.copytree(ROOT / "tests", second / "tests", ignore=shutil.ignore_patterns("data", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", second)
    command = [sys.executable, "-m", "pytest", "tests/test_init.py"]
    done = subprocess.run(command, cwd=second, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == (
        f"These are the tests of {second}, but olmoe is imported from {ROOT}; give this checkout an environment of its "
        f"own (make setup), or reinstall it here: pip install --editable {second}"
    )
    assert "passed" not in done.stdout


def test_a_wheel_may_be_tested_from_anywhere(tmp_path):
    installed = tmp_path / "lib" / "site-packages" / "olmoe" / "__init__.py"
    assert foreign(ROOT / "tests", installed) is None
    assert foreign(tmp_path / "copied" / "tests", ROOT / "src" / "olmoe" / "__init__.py") is None
    assert foreign(ROOT / "tests", ROOT / "src" / "olmoe" / "__init__.py") is None
