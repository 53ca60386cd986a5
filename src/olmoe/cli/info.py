"""Show a model's architecture, its exact parameter counts, and its bytes on disk and in memory."""

from __future__ import annotations

import argparse

RELEASED = "1b-7b"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe info`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="DIR|HUB_ID|CONFIG.json",
        help=f"a checkpoint, a config.json, or {RELEASED} for the released configuration (default: the shipped model)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--offline", action="store_true", help="use only what is on this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what `config.json` and the tensor headers say; no weight is read."""
    import json
    from pathlib import Path

    from olmoe import hub
    from olmoe.config import ModelConfig

    name = arguments.model
    stored_bytes = stored_dtypes = contents = None
    if name == RELEASED and not Path(name).exists():
        config = ModelConfig()
    elif name is not None and name.lower().endswith(".gguf"):
        from olmoe.gguf.source import GGUFSource

        source = GGUFSource(Path(name).expanduser())
        config = source.config
        stored_bytes = source.file.path.stat().st_size
        stored_dtypes = sorted({tensor.kind.name for tensor in source.file.tensors.values()})
    elif name is not None and Path(name).is_file():
        config = ModelConfig.from_file(name)
    else:
        folder = hub.resolve(
            hub.SHIPPED if name is None else name, revision=arguments.revision, local_files_only=arguments.offline
        )
        from olmoe import checkpoint, packed

        if packed.is_packed(folder):
            from olmoe.packing import contents_of

            config, contents = contents_of(folder)
            stored_bytes, stored_dtypes = contents.file_bytes, contents.formats
        else:
            config = ModelConfig.from_file(folder / "config.json")
            stored = checkpoint.read_headers(folder)
            checkpoint.plan(config, stored)
            stored_bytes = sum(file.stat().st_size for file in {tensor.file for tensor in stored.values()})
            stored_dtypes = sorted({tensor.dtype for tensor in stored.values()})
        name = name or "olmoe-tiny (shipped)"

    total, active = config.num_parameters, config.num_active_parameters
    facts = {
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
    if contents is not None:
        facts["packed"] = {"bits_per_weight": round(contents.bits_per_weight, 3), **contents.to_dict()}
    if arguments.json:
        print(json.dumps(facts))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for part, amount in value.items():
                if amount is not None:
                    print(f"  {part:<28} {_text(amount)}")
        else:
            print(f"{key:<30} {_text(value)}")
    return 0


def _text(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        # Ids and sizes of four digits read better without separators.
        return f"{value:,}" if value >= 10_000 else str(value)
    if isinstance(value, dict):  # one kind of packed tensors
        return f"{value['bytes']:,} bytes of {value['weights']:,} weights in {value['format']}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
