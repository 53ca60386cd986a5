"""C++ kernels for inference on a CPU: single operations on plain tensors, and on packed matrices.

`extension` finds the compiled module or says why there is none, `functional` registers the backend "cpu" of
`olmoe.ops`, `packed` multiplies with matrices of int4 and int8 blocks in place, `four_bit` encodes
and decodes NF4 and FP4. The sources are in `csrc/`.
Nothing is loaded before the first use.
"""

from __future__ import annotations

from olmoe.ops.cpu.extension import available, isa, isas, set_isa, unavailable

__all__ = ["available", "isa", "isas", "set_isa", "unavailable"]
