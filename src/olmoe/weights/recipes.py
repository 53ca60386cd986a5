"""Recipes: which format each matrix of a packed model gets, and whether its codes are searched for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from olmoe.config import ModelConfig
from olmoe.weights.names import EXPERTS, parameter_shapes

if TYPE_CHECKING:
    from olmoe.quant import PackedLayout, SavedLayout


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


@dataclass(frozen=True)
class BaseRecipe:
    """How a model is packed to train adapters over it: attention and experts, the rest in the dtype that it has."""

    name: str
    weight_format: str  # one of `olmoe.quant.FORMATS`
    double_quant: bool = False
    summary: str = ""
    searches: ClassVar[bool] = False

    def layout(self, config: ModelConfig) -> SavedLayout:
        """What `config.json` of a folder packed this way says. Raises `ConfigError` for an unknown format."""
        from olmoe.quant import SavedLayout, make_format

        format = make_format(self.weight_format, self.double_quant)
        names = frozenset(
            name
            for name, shape in parameter_shapes(config).items()
            if len(shape) > 1 and (".self_attn." in name or f".{EXPERTS}." in name) and format.fits(*shape[-2:])
        )
        return SavedLayout(self.weight_format, self.double_quant, None, names)


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
# For QLoRA; nothing but training computes with them at its full speed.
BASE_RECIPES = {
    recipe.name: recipe
    for recipe in (
        BaseRecipe("nf4", "nf4", summary="attention and experts in 4.5 bits as QLoRA has them, to train adapters over"),
        BaseRecipe("nf4-double", "nf4", double_quant=True, summary="nf4 with its scales packed too, 4.13 bits"),
    )
}
