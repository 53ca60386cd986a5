"""What an edited model is made of: which original layer each of its layers is, and from which experts its own come.

Every edit of weights is a change to a `Blueprint`: pruning leaves experts out, merging averages some into one,
reordering and duplicating move existing ones. Nothing is read or computed before the blueprint is finished;
`olmoe.weights.edited` then reads a model through it. No torch.

Methods take expert numbers of the current blueprint, from 0; the blueprint itself stores those of the original.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olmoe.config import ModelConfig
from olmoe.errors import UserError, shown

SCHEMA = "olmoe-edit-1"
FILE_NAME = "olmoe_edit.json"


@dataclass(frozen=True)
class Mix:
    """One expert of an edited model: the average of `experts` of the original by `weights`, which sum to 1."""

    experts: tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, mixes: Sequence[Mix], load: Sequence[float]) -> Mix:
        """The average of all experts of several mixes, weighted by the original's `load`; evenly if that is zero."""
        experts = tuple(sorted(e for mix in mixes for e in mix.experts))
        total = sum(load[e] for e in experts)
        if total <= 0:
            return cls(experts, (1 / len(experts),) * len(experts))
        return cls(experts, tuple(load[e] / total for e in experts))


@dataclass(frozen=True)
class LayerPlan:
    """One layer of an edited model: the number `origin` of the original layer, and its experts."""

    origin: int
    experts: tuple[Mix, ...]


@dataclass(frozen=True)
class Blueprint:
    """An edited model, as layers and experts of the model with the configuration `original`.

    Raises `UserError` for what no checkpoint can be: layers with different numbers of experts, or with none at all.
    """

    original: ModelConfig
    layers: tuple[LayerPlan, ...]
    top_k: int
    normalize_top_k: bool

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("No layer would be left; name at least one.")
        first = len(self.layers[0].experts)
        for number, layer in enumerate(self.layers):
            if len(layer.experts) != first:
                raise UserError(
                    f"Layer {number} would have {len(layer.experts)} experts and layer 0 {first}, but config.json has "
                    "one number for all layers; leave out the same number in each."
                )
        if not first:
            raise UserError("No expert would be left; leave out fewer.")

    @classmethod
    def unchanged(cls, config: ModelConfig) -> Blueprint:
        """The original itself."""
        experts = tuple(Mix((e,)) for e in range(config.num_experts))
        layers = tuple(LayerPlan(i, experts) for i in range(config.num_hidden_layers))
        return cls(config, layers, config.num_experts_per_tok, config.norm_topk_prob)

    @property
    def num_experts(self) -> int:
        """How many experts each layer has."""
        return len(self.layers[0].experts)

    @property
    def config(self) -> ModelConfig:
        """The edited model's configuration. Raises `UserError` if a token is to choose more experts than there are."""
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"Each token is to choose {self.top_k} experts, but a layer has {self.num_experts}; give a --top-k "
                f"from 1 to {self.num_experts} (in Python, top_k), or leave out fewer experts."
            )
        return dataclasses.replace(
            self.original,
            num_hidden_layers=len(self.layers),
            num_experts=self.num_experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=self.normalize_top_k,
        )

    # ---- edits ----

    def without(self, experts: Sequence[Collection[int]]) -> Blueprint:
        """Leave out experts, given by layer."""

        def kept(number: int, mixes: tuple[Mix, ...]) -> tuple[Mix, ...]:
            gone = _checked(experts[number], number, len(mixes))
            return tuple(mix for e, mix in enumerate(mixes) if e not in gone)

        return self._changed(kept)

    def merged(self, groups: Sequence[Sequence[Sequence[int]]], load: Sequence[Sequence[float]]) -> Blueprint:
        """Average the experts of each group into one, which takes the place of the first of them.

        `groups` are by layer; groups of one expert may be omitted. `load` (original layers, experts) weighs them.
        """

        def averaged(number: int, mixes: tuple[Mix, ...]) -> tuple[Mix, ...]:
            found = dict(enumerate(mixes))
            _checked([e for group in groups[number] for e in group], number, len(mixes))
            for group in groups[number]:
                mix = Mix.of([mixes[e] for e in group], load[self.layers[number].origin])
                for e in group:
                    del found[e]
                found[min(group)] = mix
            return tuple(found[e] for e in sorted(found))

        return self._changed(averaged)

    def reordered(self, orders: Sequence[Sequence[int]]) -> Blueprint:
        """Put the experts of each layer in another order: the one with the number `orders[layer][0]` first."""

        def moved(number: int, mixes: tuple[Mix, ...]) -> tuple[Mix, ...]:
            order = orders[number]
            if len(order) != len(mixes):
                raise UserError(
                    f"The order of layer {number} names {len(order)} experts, but the layer has {len(mixes)}; name "
                    "each of them once."
                )
            _checked(order, number, len(mixes))
            return tuple(mixes[e] for e in order)

        return self._changed(moved)

    def with_layers(self, numbers: Sequence[int]) -> Blueprint:
        """These layers in this order; one that is named several times occurs several times."""
        for number in numbers:
            self._check_layer(number)
        return dataclasses.replace(self, layers=tuple(self.layers[number] for number in numbers))

    def with_copies(self, numbers: Collection[int]) -> Blueprint:
        """Each of these layers twice: its copy follows it."""
        for number in numbers:
            self._check_layer(number)
        return self.with_layers([i for i in range(len(self.layers)) for _ in range(2 if i in set(numbers) else 1)])

    def with_routing(self, top_k: int | None = None, normalize_top_k: bool | None = None) -> Blueprint:
        """Change the number of experts per token, or whether probabilities are divided by their sum; None keeps it."""
        return dataclasses.replace(
            self,
            top_k=self.top_k if top_k is None else top_k,
            normalize_top_k=self.normalize_top_k if normalize_top_k is None else normalize_top_k,
        )

    def _changed(self, change: Callable[[int, tuple[Mix, ...]], tuple[Mix, ...]]) -> Blueprint:
        layers = (dataclasses.replace(each, experts=change(i, each.experts)) for i, each in enumerate(self.layers))
        return dataclasses.replace(self, layers=tuple(layers))

    def _check_layer(self, number: int) -> None:
        if not 0 <= number < len(self.layers):
            raise UserError(f"There is no layer {number}; the model's are 0 to {len(self.layers) - 1}.")

    # ---- to and from JSON ----

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an expert is its number or, if several were merged, `[[number, weight], ...]`."""

        def written(mix: Mix) -> int | list[list[float]]:
            pairs = zip(mix.experts, mix.weights, strict=True)
            return mix.experts[0] if len(mix.experts) == 1 else [[e, w] for e, w in pairs]

        return {
            "schema": SCHEMA,
            "layers": [{"from": each.origin, "experts": list(map(written, each.experts))} for each in self.layers],
            "top_k": self.top_k,
            "normalize_top_k": self.normalize_top_k,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], original: ModelConfig) -> Blueprint:
        """Read what `to_dict` gave. Raises `UserError` for anything else, and for a blueprint of another model."""
        if raw.get("schema") != SCHEMA:
            raise UserError(f"it has the schema {shown(raw.get('schema'))}, not {SCHEMA!r}.")

        def read(value: Any) -> Mix:
            pairs = [(value, 1.0)] if isinstance(value, int) else [(int(e), float(w)) for e, w in value]
            if not pairs or not all(0 <= e < original.num_experts for e, _ in pairs):
                raise ValueError(value)
            return Mix(tuple(e for e, _ in pairs), tuple(w for _, w in pairs))

        try:
            layers = tuple(LayerPlan(int(each["from"]), tuple(map(read, each["experts"]))) for each in raw["layers"])
            found = cls(original, layers, int(raw["top_k"]), bool(raw["normalize_top_k"]))
        except (KeyError, TypeError, ValueError):
            found = None
        if found is None or not all(0 <= each.origin < original.num_hidden_layers for each in found.layers):
            raise UserError("it is not an edit of the original that it is compared with.")
        return found


def _checked(experts: Collection[int], layer: int, count: int) -> set[int]:
    """Numbers of experts as a set. Raises `UserError` for one that does not exist or is named twice."""
    found: set[int] = set()
    for expert in experts:
        if not 0 <= expert < count:
            raise UserError(f"Layer {layer} has no expert {expert}; its experts are 0 to {count - 1}.")
        if expert in found:
            raise UserError(f"Expert {expert} of layer {layer} is named twice; name it once.")
        found.add(expert)
    return found
