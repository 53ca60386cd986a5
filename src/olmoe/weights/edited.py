"""A model made from another by a blueprint: read through `EditedSource`, and written as an ordinary checkpoint.

Only the tensor being read is in memory. What is not merged is copied as stored: the values of an ordinary checkpoint in
their dtype, the blocks of a packed one bit for bit. A merged expert is averaged in fp32 and rounded once to the dtype
of its kind, or packed again in the format of its matrix. Its row of the router is the same average of rows.

Shapes legend: E experts, D hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmoe.io import targets
from olmoe.io.tensor_file import SINGLE_NAME
from olmoe.quant import PackedLayout
from olmoe.weights.blueprint import FILE_NAME, Blueprint, LayerPlan, Mix
from olmoe.weights.hf_folder import HFFolder
from olmoe.weights.names import layer_of, parameter_shapes
from olmoe.weights.packed_file import PackedFile
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES, Recipe
from olmoe.weights.table import TensorTable
from olmoe.weights.to_folder import to_folder, written_files

Progress = Callable[[int, int], None]

_ROUTER = ".mlp.gate.weight"


class EditedSource:
    """A `BlockSource`: the weights of `base` under their names in the edited model.

    `notes` record, for JSON, how the edit was made; they are stored with the blueprint in olmoe_edit.json.
    """

    def __init__(
        self, base: HFFolder | PackedFile, blueprint: Blueprint, notes: Mapping[str, Any] | None = None
    ) -> None:
        assert base.config == blueprint.original
        self.base, self.blueprint = base, blueprint
        self.config = blueprint.config
        self._notes = notes or {}

    @property
    def path(self) -> Path:
        """The original's folder."""
        return self.base.path

    def origin(self, parameter: str) -> tuple[str, LayerPlan | None]:
        """The original's name for a parameter, and the plan of its layer."""
        layer = layer_of(parameter)
        if layer is None:
            return parameter, None
        plan = self.blueprint.layers[layer]
        return parameter.replace(f"model.layers.{layer}.", f"model.layers.{plan.origin}.", 1), plan

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `WeightSource.read`."""
        name, plan = self.origin(parameter)
        if plan is not None and expert is not None:
            mix = plan.experts[expert]
            return _average([self.base.read(name, e) for e in mix.experts], mix)
        value = self.base.read(name)
        if plan is None or not parameter.endswith(_ROUTER):
            return value
        return torch.stack([_average([value[e] for e in mix.experts], mix) for mix in plan.experts])

    def files(self) -> dict[str, str]:
        """See `WeightSource.files`; the blueprint is one of them."""
        text = json.dumps(self.blueprint.to_dict() | dict(self._notes)) + "\n"
        return self.base.files() | {FILE_NAME: text}

    def stored_as(self, parameter: str, expert: int | None = None) -> tuple[str, ...]:
        """See `BlockSource.stored_as`: averaged weights, and those of an ordinary checkpoint, are not in blocks."""
        name, plan = self.origin(parameter)
        if not isinstance(self.base, PackedFile) or (plan and expert is not None and len(_mix(plan, expert)) > 1):
            return ("F32",)
        return self.base.stored_as(name)

    def blocks(self, parameter: str, expert: int | None = None) -> Any:
        """See `BlockSource.blocks`."""
        assert isinstance(self.base, PackedFile)
        name, plan = self.origin(parameter)
        if plan is not None and expert is not None:
            (expert,) = _mix(plan, expert)
        return self.base.blocks(name, expert)


def _mix(plan: LayerPlan, expert: int) -> tuple[int, ...]:
    return plan.experts[expert].experts


def _average(values: Sequence[Tensor], mix: Mix) -> Tensor:
    """The average of `values` with the weights of a mix, computed in fp32, in their own dtype."""
    if len(values) == 1:
        return values[0]
    total = torch.zeros(values[0].shape)
    for value, weight in zip(values, mix.weights, strict=True):
        total.add_(value.float(), alpha=weight)
    return total.to(values[0].dtype)


def write(source: EditedSource, target: Path, *, overwrite: bool = False, progress: Progress | None = None) -> None:
    """Write the edited model to the folder `target`, whole or not at all.

    An ordinary checkpoint becomes an ordinary one, tensor by tensor in its dtype; a folder of `olmoe quantize` becomes
    a packed one in the same formats; what `save_pretrained` stored in nf4, fp4 or int8 is decoded into an ordinary one
    in the dtype that it computes in (bf16 if it names none). `progress(done, total)` is called after each tensor.
    Raises `UserError` if `target` exists, or with `overwrite` if it holds anything but a model.
    """
    check_target(source, target, overwrite=overwrite)
    base = source.base
    if isinstance(base, HFFolder):
        dtypes = {name: base.parameter_dtypes[source.origin(name)[0]] for name in parameter_shapes(source.config)}
        to_folder(source, target, dtypes, progress, overwrite=overwrite)
    elif isinstance(base.layout, PackedLayout):
        pack(source, target, edited_recipe(source, base.layout), None, progress, overwrite=overwrite)
    else:
        to_folder(source, target, base.layout.compute_dtype or torch.bfloat16, progress, overwrite=overwrite)


def check_target(source: EditedSource, target: Path, *, overwrite: bool) -> None:
    """Raise what `write` raises for its target, before anything is computed."""
    packed = isinstance(source.base.layout, PackedLayout)
    names = {*(source.files() if packed else written_files(source)), SINGLE_NAME, "config.json"}
    targets.check_folder(target, names, overwrite=overwrite, shards=not packed, source=source.path)


def edited_recipe(source: EditedSource, layout: PackedLayout) -> Recipe:
    """How the edited model is packed: each matrix in the format of its original.

    Overrides may name layers, whose numbers change. Those that are still right are kept; where they are not, matrices
    are named one by one.
    """
    known = RECIPES.get(layout.recipe or "")
    recipe = Recipe(
        layout.recipe or layout.weight_format,
        layout.weight_format,
        dict(layout.overrides),
        searches=known is not None and known.searches,
    )
    exceptions = {}
    for name, row in TensorTable(source.config, layout).items():
        wanted = layout.name_of(source.origin(name)[0])
        matrix = len(row.shape) > 1 and not name.endswith(_ROUTER)
        if matrix and layout.name_of(name) != wanted:
            exceptions[name.removesuffix(".weight")] = wanted
    return replace(recipe, overrides=recipe.overrides | exceptions)
