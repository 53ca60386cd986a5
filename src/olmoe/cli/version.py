"""What `olmoe --version` prints: everything that decides how this installation computes."""

from __future__ import annotations

import platform

from olmoe import __version__


def version_text() -> str:
    """Versions of olmoe, Python and torch, and the instruction set that the C++ kernels use here."""
    lines = [f"olmoe {__version__}"]
    try:
        import torch

        from olmoe.ops import cpu
    except Exception as error:  # a broken torch must not keep its owner from seeing that it is
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        lines.append(f"torch: cannot be imported ({reason})")
    else:
        lines.append(f"torch {torch.__version__}")
        if cpu.available():
            others = [name for name in cpu.isas() if name != cpu.isa()]
            lines.append(f"C++ kernels: {cpu.isa()}" + (f" (also {', '.join(others)})" if others else ""))
        else:
            lines.append(f"C++ kernels: none ({cpu.unavailable()})")
    lines.append(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    return "\n".join(lines)
