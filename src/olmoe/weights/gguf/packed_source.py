"""`PackedSource`: a packed checkpoint folder that also gives its matrices as GGUF's blocks, undecoded."""

from __future__ import annotations

from pathlib import Path

from olmoe.quant import PackedModule
from olmoe.quant.formats import BlockFormat
from olmoe.weights.gguf.block_types import Bytes
from olmoe.weights.source import FolderSource


class PackedSource(FolderSource):
    """A `FolderSource` over a packed folder that is a `BlockSource` too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        assert self._packed is not None, f"{folder} is not packed"
        self._model, self._file = self._packed

    def stored_as(self, parameter: str) -> tuple[str, ...]:
        """The name of the type in which a parameter is stored: Q8_0, Q5_0, Q4_0, or a floating one."""
        found = self._packing(parameter)
        return (self._file.entries[parameter].dtype if found is None else found[0].name.upper(),)

    def blocks(self, parameter: str, expert: int | None = None) -> Bytes:
        """A packed matrix in GGUF's layout, the same values: (R, bytes of a row)."""
        found = self._packing(parameter)
        assert found is not None, f"{parameter} is plain"
        form, (rows, columns) = found
        stored = self._file.tensor(parameter)
        blocks: Bytes = form.to_gguf(stored if expert is None else stored[expert], rows, columns).contiguous().numpy()
        return blocks

    def _packing(self, parameter: str) -> tuple[BlockFormat, tuple[int, int]] | None:
        """Format, rows and columns of a packed matrix."""
        owner, _, leaf = parameter.rpartition(".")
        module = self._model.get_submodule(owner)
        if not isinstance(module, PackedModule) or leaf not in module.formats:
            return None
        form = module.formats[leaf]
        return (form, module.shapes[leaf]) if isinstance(form, BlockFormat) else None
