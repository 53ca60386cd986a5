"""What a run reads: text -> token files -> one deterministic sequence of windows, and the tokenizer of it all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from olmoe.errors import ConfigError
from olmoe.io.text_file import read_text
from olmoe.runtime import allow_open_files, log
from olmoe.tokenizer import Tokenizer
from olmoe.train.config import TrainConfig
from olmoe.train.data import (
    Mixture,
    TokenFile,
    Tokens,
    is_token_file,
    open_tokens,
    plain_text,
    read_documents,
    sample_sha256,
    sha256,
)
from olmoe.train.inheritance import derive_eos
from olmoe.train.sources import SourceFiles, find_files, names_of, open_sources, prepare_files
from olmoe.train.vocabulary import train_vocabulary


@dataclass(frozen=True)
class RunData:
    """The opened data of a run: the `mixture` that it trains on, and the token files that it is measured on."""

    mixture: Mixture
    train_files: list[TokenFile]
    held_out: list[tuple[TokenFile, Tokens]]
    measured: list[tuple[TokenFile, Tokens]]
    tokenizer_path: Path
    tokenizer_files: dict[str, str]  # what checkpoints hold of the tokenizer, by name
    is_shared_out: bool = False  # whether sources have weights, or an epoch takes a share of several files

    def fingerprint(self) -> dict[str, Any]:
        """What must not change about the data of a resumed run; `TrainConfig.fingerprint` has the rest."""
        files = [*self.train_files, *(file for file, _ in self.held_out)]
        # The second way; runs whose windows are the same in both do not say.
        drawing = {"drawing": 2} if self.is_shared_out else {}
        return drawing | {
            "texts": {file.name: file.source_sha256 or file.tokens for file in files},
            "templates": {file.name: file.template_sha256 for file in files if file.template_sha256},
            "token_samples": {file.name: sample_sha256(file) for file in files if not file.source_sha256},
            "measured": [file.name for file, _ in self.measured],
            "tokenizer": sha256(self.tokenizer_path),
        }


def open_data(config: TrainConfig, recorded: list[str]) -> tuple[TrainConfig, RunData]:
    """Find, tokenize and open what a configuration names; also the configuration, its end of text from the tokenizer.

    `recorded` are the names that a resumed run gave its files when it started. Raises `UserError` for data that cannot
    be used.
    """
    groups = find_files(config)
    names = names_of(groups, recorded)
    tokenizer_path = config.resolve(config.tokenizer.path)
    _ensure_tokenizer(config, tokenizer_path, groups["train"])
    if not config.eos_is_written:
        config = replace(config, model=derive_eos(tokenizer_path, config.model))
    eos_id = _eos_id(config, tokenizer_path)
    tokens_folder, vocab_size = config.resolve(config.data.tokens_folder), config.model.vocab_size
    prepared = {
        group: prepare_files(files, tokenizer_path, tokens_folder, eos_id, names) for group, files in groups.items()
    }
    train_files, valid_files, measured_files = (list(chain.from_iterable(prepared[group])) for group in groups)
    allow_open_files(len(train_files) + len(valid_files) + len(measured_files))
    length = config.data.sequence_length
    sources = open_sources(groups["train"], prepared["train"], vocab_size, length)
    return config, RunData(
        mixture=Mixture(sources, length, config.run.seed, vocab_size),
        train_files=train_files,
        held_out=[(file, open_tokens(file, vocab_size)) for file in valid_files],
        measured=[(file, open_tokens(file, vocab_size)) for file in measured_files],
        tokenizer_path=tokenizer_path,
        tokenizer_files=_tokenizer_files(config, tokenizer_path),
        is_shared_out=any(source.weight is not None for source in config.data.train)
        or any(len(streams) > 1 and repeat % 1 for streams, repeat in sources),
    )


def _ensure_tokenizer(config: TrainConfig, path: Path, files: list[SourceFiles]) -> None:
    """Train the tokenizer on the training texts if its file does not exist and a size is given."""
    if path.is_file():
        return
    if config.tokenizer.vocab_size is None:
        raise ConfigError(f"There is no tokenizer {path}; set tokenizer.vocab_size to train one.")
    texts = [path for found in files for path in found.paths if not is_token_file(path, found.source.dtype)]
    log.info("training a tokenizer of %d entries on %d files", config.tokenizer.vocab_size, len(texts))
    train_vocabulary(
        (plain_text(document) for text in texts for document in read_documents(text)), config.tokenizer.vocab_size, path
    )


def _tokenizer_files(config: TrainConfig, path: Path) -> dict[str, str]:
    """What the run's checkpoints hold of the tokenizer: its file, and how transformers is to read it."""
    files = {"tokenizer.json": read_text(path)}
    if path.name == "tokenizer.json":
        beside = (path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja"))
        files |= {other.name: read_text(other) for other in beside if other.is_file()}
    if "tokenizer_config.json" not in files:
        ids = {"eos_ids": config.model.eos_token_ids, "pad_id": config.model.pad_token_id}
        tokenizer = Tokenizer.from_file(path, chat_template=files.get("chat_template.jinja"), **ids)
        files["tokenizer_config.json"] = tokenizer.transformers_config(config.model.max_position_embeddings)
    return files


def _eos_id(config: TrainConfig, tokenizer_path: Path) -> int:
    """The id that ends documents. Raises `ConfigError` if tokenizer and model do not fit each other."""
    size = Tokenizer.from_file(tokenizer_path).vocab_size
    if size != (config.tokenizer.vocab_size or size):
        raise ConfigError(
            f"{tokenizer_path} has {size} ids, but tokenizer.vocab_size is {config.tokenizer.vocab_size}; "
            f"set that to {size}, or remove the file to train a new one."
        )
    if size > config.model.vocab_size:
        raise ConfigError(
            f"The tokenizer has {size} ids, but model.vocab_size is only {config.model.vocab_size}; raise it."
        )
    if config.model.eos_token_ids[0] >= size:
        raise ConfigError(
            f"model.eos_token_id {config.model.eos_token_ids[0]} is not an id of {tokenizer_path} ({size} ids)."
        )
    return config.model.eos_token_ids[0]
