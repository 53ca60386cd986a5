"""Show a model's architecture, its exact parameter counts, and its bytes on disk and in memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmoe.config import ModelConfig
    from olmoe.weights.contents import Packed

RELEASED = "1b-7b"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe info`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="DIR|HUB_ID|CONFIG.json",
        help="a checkpoint, a config.json, a .gguf file, olmoe-tiny (the shipped model, the default), or "
        f"{RELEASED} for the released configuration; weights are not downloaded",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what `config.json` and the tensor headers say; no weights are read."""
    import json

    name, config, stored_bytes, stored_dtypes, contents = _read(arguments)
    total, active = config.num_parameters, config.num_active_parameters
    facts: dict[str, Any] = {
        "model": name,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "expert_width": config.intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "rope": {"type": config.rope.rope_type, "theta": config.rope.rope_theta, "factor": config.rope.factor},
        "clip_qkv": config.clip_qkv,
        "tied_embeddings": config.tie_word_embeddings,
        "parameters": {"total": total, "active": active, **config.parameter_counts()},
        "bytes": {
            "on_disk": stored_bytes,
            "stored_as": stored_dtypes,
            "float32": 4 * total,
            "bfloat16": 2 * total,
            # keys and values of every layer
            "kv_cache_per_token_bfloat16": 2 * 2 * config.num_hidden_layers * config.kv_heads * config.head_dim,
        },
    }
    facts["gigabytes"] = _gigabytes(config)
    if contents is not None:
        facts["packed"] = {"bits_per_weight": round(contents.bits_per_weight, 3), **contents.to_dict()}
    if arguments.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if key == "gigabytes":
            print(_table(value, config))
        elif isinstance(value, dict):
            print(f"{key}:")
            for part, amount in value.items():
                if amount is not None:
                    print(f"  {part:<28} {_text(amount)}")
        else:
            print(f"{key:<30} {_text(value)}")
    return 0


def _read(
    arguments: argparse.Namespace,
) -> tuple[str, ModelConfig, int | None, list[str] | None, Packed | None]:
    """Name, architecture, bytes on disk, how they are stored, and the contents of a packed folder."""
    from pathlib import Path

    from olmoe.config import ModelConfig
    from olmoe.io import hub

    name = arguments.model
    if name is not None and name.lower().endswith(".gguf"):
        from olmoe.weights.gguf.source import GGUFSource

        source = GGUFSource(Path(name).expanduser())
        kinds = sorted({tensor.kind.name for tensor in source.file.tensors.values()})
        return name, source.config, source.file.path.stat().st_size, kinds, None
    if name is not None and Path(name).expanduser().is_file():
        return name, ModelConfig.from_file(Path(name).expanduser()), None, None, None
    if name is not None and hub.is_released(name) and not (arguments.revision or _is_cached(name)):
        return name, ModelConfig(), None, None, None
    if name is None:
        name, folder = "olmoe-tiny (shipped)", hub.resolve(hub.SHIPPED, revision=arguments.revision)
    else:
        folder = hub.resolve_config(name, revision=arguments.revision, local_files_only=arguments.offline)
    if folder.is_file():
        return name, ModelConfig.from_file(folder), None, None, None
    from olmoe.weights.checkpoint import Checkpoint
    from olmoe.weights.contents import contents_of

    opened = Checkpoint(folder)
    if opened.layout is not None:
        contents = contents_of(opened)
        return name, opened.config, contents.file_bytes, contents.formats, contents
    return name, opened.config, opened.num_bytes, opened.dtypes, None


def _is_cached(name: str) -> bool:
    """Whether the weights of a hub model are in the local cache."""
    from olmoe.errors import CheckpointError
    from olmoe.io import hub

    if "/" not in name:  # one of our short names, which the hub does not know
        return False
    try:
        return any(hub.resolve(name, local_files_only=True).glob("*.safetensors"))
    except CheckpointError:
        return False


def _gigabytes(config: ModelConfig) -> dict[str, dict[str, float]]:
    """The size of a model in every format: its weights, and the keys and values of a whole context."""
    from olmoe.weights.sizes import sizes

    found: dict[str, dict[str, float]] = {}
    for name, size in sizes(config).items():
        cache = size.cache_per_token * _context(config)
        found[name] = {"weights": size.weights / 1e9, "cache": cache / 1e9, "total": (size.weights + cache) / 1e9}
    return found


def _context(config: ModelConfig) -> int:
    return int(config.max_position_embeddings * config.rope.factor)


def _table(gigabytes: dict[str, dict[str, float]], config: ModelConfig) -> str:
    """The sizes by format as text."""
    title = f"GB by format, cache of {_context(config):,} tokens:"
    lines = [f"{title:<42} {'weights':>9} {'cache':>9} {'together':>9}"]
    for name, parts in gigabytes.items():
        lines.append(f"  {name:<40} " + " ".join(f"{value:>9.3g}" for value in parts.values()))
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        # Ids, and sizes of four digits, read better without separators.
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, dict):  # one kind of packed tensors
        return f"{value['bytes']:,} bytes of {value['weights']:,} weights in {value['format']}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
