"""`PackedSource`: a packed checkpoint folder that also gives its matrices as GGUF's blocks, undecoded."""

from __future__ import annotations

from pathlib import Path

from olmoe.quant.formats import BlockFormat
from olmoe.weights.gguf.block_types import Bytes
from olmoe.weights.source import FolderSource


class PackedSource(FolderSource):
    """A `FolderSource` over a packed folder that is a `BlockSource` too."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        assert self._packed is not None, f"{folder} is not packed"
        self._table, self._file = self._packed

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
        row = self._table[parameter]
        if not isinstance(row.format, BlockFormat):
            return None
        rows, columns = row.shape
        return row.format, (rows, columns)
