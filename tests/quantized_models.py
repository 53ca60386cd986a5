"""Small models of transformers' face in every weight format, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from configurations import VOCAB_SIZE
from olmoe import OlmoeForCausalLM
from olmoe.model import set_backend
from olmoe.weights.checkpoint import open_source
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import Recipe
from packed_folders import WHOLE, plain_folder

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
BLOCKS = ("q8_0", "q5_0", "q4_0")  # which pack embeddings and head too
FORMATS = (*BITSANDBYTES, *BLOCKS)
IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(0))


class QuantizedModels:
    """Loads one and the same model in any format; its backend is torch, which computes what was decoded."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.plain = plain_folder(folder / "plain", **(WHOLE | changes))
        self._folder = folder

    def source(self, format: str) -> tuple[Path, dict[str, Any]]:
        """What `from_pretrained` takes for it."""
        if format in BITSANDBYTES:
            return self.plain, {"quantization_config": BitsAndBytesConfig(**BITSANDBYTES[format])}
        packed = self._folder / format
        if not packed.exists():
            pack(open_source(self.plain), packed, Recipe(format, format, {}))
        return packed, {}

    def load(self, format: str, dequantize: bool = False, dtype: torch.dtype = torch.float32, cls: Any = None) -> Any:
        """The model, or its dequantized copy."""
        folder, options = self.source(format)
        model = (cls or OlmoeForCausalLM).from_pretrained(folder, dtype=dtype, **options)
        if dequantize:
            model = model.dequantize()
        set_backend(model, "torch")
        return model


def stir(model: Any, std: float = 0.2, seed: int = 1) -> Any:
    """Change whatever is trained, by the same values in models of the same adapters; PEFT starts many at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Without gradients, in evaluation mode, in fp32."""
    set_backend(model, "torch")
    result: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return result


def trained(model: Any) -> dict[str, Any]:
    """Logits, and gradients of the loss by name."""
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return {"logits": output.logits} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
