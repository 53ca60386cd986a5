"""Recipes: which format each matrix of a packed model gets, and whether its codes are searched for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmoe.quant import PackedLayout


@dataclass(frozen=True)
class Recipe:
    """How a model is packed; `overrides` are those of `olmoe.quant.PackedLayout`."""

    name: str
    weight_format: str
    overrides: dict[str, str] = field(default_factory=dict)
    searches: bool = False  # choose codes by their effect, on calibration text if there is any
    summary: str = ""  # for help texts

    def layout(self) -> PackedLayout:
        """What the `config.json` of a folder packed this way says."""
        from olmoe.quant import PackedLayout

        return PackedLayout(self.weight_format, self.overrides, self.name)


_ENDS = {"model.embed_tokens": "q5_0", "lm_head": "q5_0"}
_HIGH = {"model.embed_tokens": "q8_0", "lm_head": "q8_0", "model.layers.*.self_attn.*": "q8_0"}
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", "q8_0", summary="8.5 bits per weight, hardly any loss"),
        Recipe(
            "int4",
            "q4_0",
            _ENDS,
            searches=True,
            summary="4.5 bits, embeddings and output head 5.5; codes chosen on calibration text",
        ),
        Recipe(
            "int4-high",
            "q4_0",
            _HIGH,
            searches=True,
            summary="int4 with all but the experts at 8.5 bits: a third of the loss, a quarter more bytes per token",
        ),
        Recipe("q4_0", "q4_0", summary="4.5 bits, plain rounding, for comparisons"),
    )
}
