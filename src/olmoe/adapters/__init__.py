"""Low-rank adapters (LoRA) for attention, experts and routers: as modules, in PEFT's files, merged, for llama.cpp."""

from olmoe.adapters.adapter import TARGETS, Adapter, Factors, new_adapter, targeted
from olmoe.adapters.files import CONFIG_NAME, WEIGHTS_NAME, base_of, is_adapter, read_adapter, write_adapter
from olmoe.adapters.merge import apply, merge
from olmoe.adapters.modules import adapt, adapter_of, factors_of

__all__ = [
    "CONFIG_NAME",
    "TARGETS",
    "WEIGHTS_NAME",
    "Adapter",
    "Factors",
    "adapt",
    "adapter_of",
    "apply",
    "base_of",
    "factors_of",
    "is_adapter",
    "merge",
    "new_adapter",
    "read_adapter",
    "targeted",
    "write_adapter",
]
