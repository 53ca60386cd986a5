"""Make what docs/analysis.md shows of the shipped model's routing: the report, its numbers and the pictures.

    python scripts/routing_report.py ../shared/corpus/valid

FOLDER holds one text for each domain (books.txt, code.txt, …). Written are docs/reports/olmoe-tiny.html, the numbers
beside it, rounded so that the file stays small, and docs/images/routing. The page's words are held to these numbers by
tests/analysis/test_documentation.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from olmoe.analysis.analyze import METRICS, REPORT, analyze
from olmoe.cli.main import main as olmoe
from olmoe.io.atomic import write_text

DOCS = Path(__file__).parent.parent / "docs"
PAGE, NUMBERS, PICTURES = DOCS / "reports" / "olmoe-tiny.html", DOCS / "reports" / "olmoe-tiny.json", DOCS / "images"
MODEL = "olmoe-tiny"
TOKENS = 20_000
# By domain, the file in FOLDER.
TEXTS = {
    "books": "books.txt",
    "code": "code.txt",
    "law": "law.txt",
    "mathematics": "math.txt",
    "reference": "reference.txt",
    "speeches": "speeches.txt",
    "fairy tales": "stories_fairytaleqa.txt",
    "small stories": "stories_tinystories.txt",
}
# What the page shows; the report has the rest.
SHOWN = ("domains-top-k", "vocabulary", "vocabulary-experts", "coactivation", "token-shares", "flow", "before-after")


def main() -> None:
    """Analyse, and copy what is kept into docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the texts, one a domain")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary, tqdm(unit="token", unit_scale=True) as bar:
        packed, out = Path(temporary) / f"{MODEL}-int4", Path(temporary) / "routing"
        if olmoe(["quantize", MODEL, str(packed), "--format", "int4"]) != 0:
            raise SystemExit("olmoe quantize failed")

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        texts = {name: folder / file for name, file in TEXTS.items()}
        found = analyze(MODEL, texts, out, against=packed, tokens=TOKENS, figures=True, progress=progress)
        assert json.loads((out / METRICS).read_text(encoding="utf-8")) == found
        write_text(NUMBERS, json.dumps(rounded(found), separators=(",", ":")) + "\n")
        shutil.copy(out / REPORT, PAGE)
        (PICTURES / "routing").mkdir(parents=True, exist_ok=True)
        for name in SHOWN:
            smaller = min(
                (out / f"figure-{name}.{kind}" for kind in ("png", "svg")), key=lambda path: path.stat().st_size
            )
            shutil.copy(smaller, PICTURES / "routing" / f"{name}{smaller.suffix}")


def rounded(value: Any) -> Any:
    """The same with five decimals, of which the page quotes three at most."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
