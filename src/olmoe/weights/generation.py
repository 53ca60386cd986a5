"""`generation_config.json`: which ids end and pad a generated text, if not the model's own. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError
from olmoe.io.json_file import read_optional_object

FILE_NAME = "generation_config.json"


def generation_text(config: ModelConfig) -> str:
    """The file's contents for a model that uses its own ids."""
    values = {
        "_from_model_config": True,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.to_dict()["eos_token_id"],
    }
    return json.dumps(values, indent=2) + "\n"


def end_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids that end a text, for a checkpoint folder: those in its generation_config.json, else the model's own."""
    value: Any = read_optional_object(folder / FILE_NAME, CheckpointError).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(ids) if ids and all(isinstance(i, int) for i in ids) else config.eos_token_ids
