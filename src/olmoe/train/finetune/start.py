"""The model that a fine-tuning run trains, as at its start, and how it is written and read again.

Either all weights are trained, in fp32, and written as an ordinary checkpoint; or adapters over frozen ones, plain or
packed, and only these are written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from olmoe import adapters
from olmoe.config import ModelConfig
from olmoe.errors import ConfigError
from olmoe.io.targets import folder_that_keeps, foreign_entries
from olmoe.io.tensor_file import SINGLE_NAME
from olmoe.model import CausalLM, DecoderLayer, set_backend
from olmoe.quant.formats import make_format
from olmoe.tokenizer import Tokenizer
from olmoe.train import recompute
from olmoe.train.finetune.config import AdapterConfig, FinetuneConfig, check_model
from olmoe.train.inheritance import start_folder
from olmoe.weights import checkpoint, export, generation
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.frozen import load_frozen
from olmoe.weights.generation import end_ids
from olmoe.weights.source import texts_of


@dataclass
class Start:
    """A checkpoint to fine-tune, before its weights are read."""

    folder: Path
    found: Checkpoint
    tokenizer: Tokenizer
    files: dict[str, str]  # what checkpoints hold of the tokenizer, by name

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.found.config


@dataclass(frozen=True)
class Trained:
    """The trained part of a model, and how it is written to a folder and read back."""

    parameters: nn.ParameterList
    write: Callable[[CausalLM, Path], None]
    read: Callable[[CausalLM, Path], None]


def open_start(config: FinetuneConfig) -> Start:
    """Find the checkpoint that a run starts from. Raises `UserError` for one that it cannot."""
    folder = start_folder(config.start, config.resolve(config.start))
    found = Checkpoint.open(folder)
    check_model(config, found.config)
    if found.layout is not None and config.adapter is None:
        raise ConfigError(
            f"run.initialize_from {str(folder)!r} is a packed checkpoint, whose weights cannot be trained; add an "
            "[adapter] to train beside them, or give the checkpoint that it was packed from."
        )
    if found.layout is not None and config.adapter is not None and config.adapter.pack is not None:
        raise ConfigError(f"adapter.pack packs weights, but those of {folder} are packed already; leave it out.")
    if config.adapter is not None and config.adapter.pack is not None:
        make_format(config.adapter.pack)  # or it is refused, before anything is read
    eos_ids = end_ids(folder, found.config)
    if not eos_ids:
        raise ConfigError(f"{folder} names no id that ends a text; set eos_token_id in its config.json.")
    tokenizer = Tokenizer.from_folder(folder, eos_ids=eos_ids, pad_id=found.config.pad_token_id)
    files = {name: text for name, text in texts_of(folder).items() if name in _TEXTS}
    if tokenizer.chat_template is None:  # what the model learns is also what others are to render
        files["chat_template.jinja"] = tokenizer.default_template
    if "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = tokenizer.transformers_config(found.config.max_position_embeddings)
    return Start(folder, found, tokenizer, files)


def load_model(start: Start, config: FinetuneConfig, device: torch.device) -> tuple[CausalLM, Trained]:
    """The model with the checkpoint's weights, ready to be trained."""
    settings = config.adapter
    if settings is not None:
        model = load_frozen(start.found.source(), settings.pack, device)
    else:
        model = start.found.load(dtype=torch.float32, device=device)
    trained = _whole(model) if settings is None else _adapted(model, start, config, settings)
    if config.recompute:
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            recompute.wrap(layer, "full")
    return model.train(), trained


def _whole(model: CausalLM) -> Trained:
    """All weights are trained."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    def read(model: CausalLM, path: Path) -> None:
        found = checkpoint.load(path, dtype=torch.float32)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), found.parameters(), strict=True):
                parameter.copy_(value)

    return Trained(nn.ParameterList(model.parameters()), export.write_model, read)


def _adapted(model: CausalLM, start: Start, config: FinetuneConfig, settings: AdapterConfig) -> Trained:
    """Adapters are trained, and the weights beside them stay."""
    rank, alpha = settings.rank, settings.alpha
    adapter = adapters.new_adapter(start.model_config, rank, alpha, settings.targets, config.run.seed)
    device = model.model.norm.weight.device
    adapter.factors = {n: adapters.Factors(a.to(device), b.to(device)) for n, (a, b) in adapter.factors.items()}
    adapters.adapt(model, adapter, torch.bfloat16 if settings.precision == "bf16" else None)
    # The kernels round activations where nothing needs a gradient, that is, in evaluation and in the first layer.
    set_backend(model, "torch")
    resolved = config.resolve(config.start)
    base = str(resolved.absolute()) if resolved.exists() else config.start

    def write(model: CausalLM, folder: Path) -> None:
        adapters.write_adapter(adapters.adapter_of(model, rank, alpha), folder, base)

    def read(model: CausalLM, folder: Path) -> None:
        saved = adapters.read_adapter(folder, start.model_config).factors
        with torch.no_grad():
            for name, pair in adapters.factors_of(model).items():
                for parameter, value in zip(pair, saved[name], strict=True):
                    parameter.copy_(value)

    factors = adapters.factors_of(model).values()
    return Trained(nn.ParameterList(factor for pair in factors for factor in pair), write, read)


def save_best(model: CausalLM, trained: Trained, folder: Path, files: dict[str, str]) -> None:
    """Write what is trained into `folder`, in place of what an earlier call wrote there; all else stays."""
    written = {*files, "config.json", generation.FILE_NAME, SINGLE_NAME, adapters.CONFIG_NAME, adapters.WEIGHTS_NAME}
    foreign = foreign_entries(folder, written, shards=True) if folder.is_dir() else []
    with folder_that_keeps(folder, foreign) as temporary:
        trained.write(model, temporary)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")


_TEXTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
