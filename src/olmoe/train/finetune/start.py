"""The model that a fine-tuning run starts with, and how what it trains is written and read again.

Either all weights are trained, in fp32, and written as an ordinary checkpoint; or adapters over frozen ones, plain or
packed, and only these are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from olmoe import adapters
from olmoe.config import ModelConfig
from olmoe.errors import ConfigError
from olmoe.io.targets import folder_that_keeps, foreign_entries
from olmoe.io.tensor_file import SINGLE_NAME
from olmoe.model import CausalLM, set_backend, without_values
from olmoe.quant.formats import make_format
from olmoe.tokenizer import Tokenizer
from olmoe.train.finetune.config import AdapterConfig, FinetuneConfig, check_model
from olmoe.train.inheritance import start_folder
from olmoe.train.parallel import Shared, arrange, is_parallel
from olmoe.train.ranks import ALONE, Ranks
from olmoe.train.shards import assign, load_parameters, whole
from olmoe.weights import generation
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
    """The trained part of a model: all of it, or an adapter."""

    parameters: nn.ParameterList
    adapter: AdapterFiles | None = None


@dataclass(frozen=True)
class AdapterFiles:
    """Writes and reads a model's adapter. It is small, so every rank may hold it whole."""

    rank: int
    alpha: float
    base: str  # the model that it belongs to

    def collect(self, model: CausalLM) -> adapters.Adapter:
        """The adapter as it is now, whole; all ranks call it together."""
        found = adapters.adapter_of(model, self.rank, self.alpha)
        found.factors = {n: adapters.Factors(*(whole(part) for part in pair)) for n, pair in found.factors.items()}
        return found

    def write(self, adapter: adapters.Adapter, folder: Path) -> None:
        """Write it into an existing folder."""
        adapters.write_adapter(adapter, folder, self.base)

    def read(self, model: CausalLM, folder: Path) -> None:
        """Give a model the adapter in a folder, of which each rank keeps its part."""
        saved = adapters.read_adapter(folder, model.config).factors
        for name, pair in adapters.factors_of(model).items():
            for parameter, value in zip(pair, saved[name], strict=True):
                assign(parameter, value)


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
    if tokenizer.chat_template is None:  # others must render chats as the model learns them
        files["chat_template.jinja"] = tokenizer.default_template
    if "tokenizer_config.json" not in files:
        files["tokenizer_config.json"] = tokenizer.transformers_config(found.config.max_position_embeddings)
    return Start(folder, found, tokenizer, files)


def sharing(config: FinetuneConfig, model: ModelConfig) -> Shared:
    """How ranks share the fine-tuning of a model."""
    return Shared(model, config.batch, config.parallel, config.of_layers)


def load_model(
    start: Start, config: FinetuneConfig, device: torch.device, ranks: Ranks = ALONE
) -> tuple[CausalLM, Trained]:
    """The model with the checkpoint's weights, ready to be trained, sharded where there are several ranks.

    Packed weights are not sharded: each rank has all of them, and adapters beside them are.
    """
    settings, shared = config.adapter, sharing(config, start.model_config)
    is_shared = is_parallel(shared, ranks)
    is_packed = settings is not None and (settings.pack is not None or start.found.layout is not None)
    if is_shared and not is_packed:
        model = without_values(start.model_config)
    else:
        model = ranks.on_all(lambda: _read(start, settings, device))
    files = None
    if settings is None:
        model.requires_grad_(True)
    else:
        files = _adapt(model, start, config, settings, device)
    if is_shared:
        from olmoe.train.sharding import build_parallel

        model = build_parallel(shared, ranks, device, model)
        if not is_packed:
            stored = [
                (name.replace(".base.", "."), p)
                for name, p in model.named_parameters()
                if settings is None or not p.requires_grad
            ]
            ranks.on_all(lambda: load_parameters(stored, start.found.source()))
    else:
        for layer in model.model.layers:
            arrange(layer, shared)
    if settings is None:
        return model.train(), Trained(nn.ParameterList(model.parameters()))
    factors = [factor for pair in adapters.factors_of(model).values() for factor in pair]
    return model.train(), Trained(nn.ParameterList(factors), files)


def _read(start: Start, settings: AdapterConfig | None, device: torch.device) -> CausalLM:
    if settings is not None:
        return load_frozen(start.found.source(), settings.pack, device)
    return start.found.load(dtype=torch.float32, device=device)


def _adapt(
    model: CausalLM, start: Start, config: FinetuneConfig, settings: AdapterConfig, device: torch.device
) -> AdapterFiles:
    """Put adapters beside the weights, which are frozen; only the adapters are trained."""
    rank, alpha = settings.rank, settings.alpha
    adapter = adapters.new_adapter(start.model_config, rank, alpha, settings.targets, config.run.seed)
    adapter.factors = {n: adapters.Factors(a.to(device), b.to(device)) for n, (a, b) in adapter.factors.items()}
    adapters.adapt(model, adapter, torch.bfloat16 if settings.precision == "bf16" else None)
    # The kernels round activations where nothing needs a gradient, that is, in evaluation and in the first layer.
    set_backend(model, "torch")
    resolved = config.resolve(config.start)
    return AdapterFiles(rank, alpha, str(resolved.absolute()) if resolved.exists() else config.start)


def save_best(adapter: adapters.Adapter, to: AdapterFiles, folder: Path, files: dict[str, str]) -> None:
    """Write an adapter into `folder`, replacing what an earlier call wrote there; everything else is kept."""
    written = {*files, "config.json", generation.FILE_NAME, SINGLE_NAME, adapters.CONFIG_NAME, adapters.WEIGHTS_NAME}
    foreign = foreign_entries(folder, written, shards=True) if folder.is_dir() else []
    with folder_that_keeps(folder, foreign) as temporary:
        to.write(adapter, temporary)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")


_TEXTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
