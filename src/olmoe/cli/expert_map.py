"""Which experts an answer used, as text: one row per layer, one cell per expert, shaded by its share of tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# In even shares: from a quarter upwards, each step twice the one before.
SHADES = " ░▒▓█"
PLAIN_SHADES = " .:+#"  # for terminals that cannot show block characters
_STEPS = (0.25, 0.75, 1.5, 3.0)
_MARGIN = 4  # "15  " before the cells
_NAMED = 11  # "63: 100%" after them, and spaces


def expert_map(use: npt.NDArray[np.float64], width: int = 80, shades: str = SHADES) -> str:
    """A heat map of `use` (L, E), each expert's share of tokens. No line is wider than `width`, or than it needs to be.

    Where a terminal is too narrow for a cell each, neighbours share one, shaded by their mean. After the cells come
    the experts used most, as many as there is room for.
    """
    layers, experts = use.shape
    even = float(use.sum()) / (layers * experts)
    a_cell = 1
    while -(-experts // a_cell) > max(1, width - _MARGIN - _NAMED):
        a_cell += 1
    cells = -(-experts // a_cell)
    named = max(1, (width - _MARGIN - cells - 1) // _NAMED)
    about = f"{a_cell} experts a cell, a row a layer" if a_cell > 1 else f"experts 0 to {experts - 1}, a row a layer"
    lines = [f"{'':<{_MARGIN}}{about:<{cells}}  most used"]
    for layer, shares in enumerate(use):
        row = "".join(
            shades[sum(shares[i : i + a_cell].mean() >= step * even for step in _STEPS) if even else 0]
            for i in range(0, experts, a_cell)
        )
        order = np.argsort(-shares, kind="stable")[:named]
        most = " ".join(f"{f'{e}: {shares[e]:.0%}':<{_NAMED - 1}}" for e in order if shares[e] > 0)
        lines.append(f"{layer:>2}  {row}  {most}".rstrip(" ") if most else f"{layer:>2}  {row}")
    scale = ", ".join(f"{shades[i + 1]} from {step:g}" for i, step in enumerate(_STEPS))
    lines.append(f"an even share is {even:.1%} of the tokens; in even shares: {scale}")
    return "\n".join(lines)
