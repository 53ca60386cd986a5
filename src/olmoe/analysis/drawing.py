"""How figures look, and how they become files.

matplotlib is imported when one is drawn, and used without its global state, so that a program's own figures are left
alone. Colours can be told apart by colour-blind readers, and in grey on paper.
"""

from __future__ import annotations

import importlib.util
import io
import re
from typing import Any, Literal

import numpy.typing as npt

from olmoe.errors import UserError

# For lines and bars: Okabe and Ito's colours, in an order whose greys differ.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7a5195", "#8c8c00", "#444444")
GREY = "#555555"
COLOUR_MAP = "cividis"
_WIDTH = 7.2  # inches: the width of a page
STYLE: Any = {  # Any: its type in matplotlib names every setting, of its newest version
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "olmoe",  # the same numbers give the same file
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}


def require_matplotlib(otherwise: str = "") -> None:
    """Raise `UserError` if figures cannot be drawn; `otherwise` says what else can be done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"The figures of a report need matplotlib, which is not installed; install olmoe[analysis]{otherwise}."
        )


def image_bytes(figure: Any, kind: Literal["png", "svg"] | str) -> bytes:
    """A figure as a file."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    if kind != "svg":
        return buffer.getvalue()
    text = re.sub(r'(?<= d=")[^"]+', lambda found: _shorter(found[0]), buffer.getvalue().decode())
    return re.sub(r"\n\s+", "\n", text).encode()


def _shorter(path: str) -> str:
    """An SVG path rounded to a hundredth of a point, which halves its size: a page holds thousands."""
    parts, at = [], ["", ""]
    for line in path.strip().split("\n"):
        command, *numbers = line.split()
        point = [re.sub(r"(\.\d\d)\d+", r"\1", number) for number in numbers]
        if command == "L" and point[0] == at[0]:
            parts.append(f"V{point[1]}")
        elif command == "L" and point[1] == at[1]:
            parts.append(f"H{point[0]}")
        else:
            parts.append(command + " ".join(point))
        at = point[-2:] or ["", ""]
    return "".join(parts)


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, npt.NDArray[Any]]:
    """A figure of a page's width, `height` inches high, and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def short(name: str, most: int = 14) -> str:
    """A name as a label, shortened and escaped: matplotlib reads dollar signs as mathematics."""
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 1]}…"
