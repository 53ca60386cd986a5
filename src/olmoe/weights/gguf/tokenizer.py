"""The tokenizer in GGUF's metadata: `tokenizer.json` to `tokenizer.ggml.*` and back, with the same ids. No torch.

llama.cpp's byte-level BPE (`tokenizer.ggml.model` gpt2, `pre` olmo) splits text as GPT-2 does, then merges by rank. It
does not apply NFC normalisation, so text with decomposed accents may get other ids there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from olmoe.errors import TokenizerError, shown
from olmoe.weights.gguf.reader import Value

# Kinds of tokens, llama.cpp's `llama_token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PREFIX = "tokenizer.ggml."
# Names of pre-tokenizers for which llama.cpp uses GPT-2's pattern. OLMoE's own is olmo.
GPT2_PATTERNS = ("olmo", "gpt-2", "mpt")
# More vocabulary rows than this are refused before anything of that size is built.
MAX_TOKENS = 1 << 22

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def to_metadata(tokenizer_json: str, vocab_size: int, chat_template: str | None = None) -> dict[str, Value]:
    """The `tokenizer.*` keys for a `tokenizer.json`; ids up to `vocab_size` without a token become unused `[PADn]`.

    Raises `TokenizerError` if the file is broken, is not a byte-level BPE with GPT-2's pattern (llama.cpp would give
    other ids), or has more tokens than the model.
    """
    try:
        contents = json.loads(tokenizer_json)
        _check_pipeline(contents)
        model, added = contents["model"], contents.get("added_tokens") or []
        ids: dict[str, int] = dict(model["vocab"])
        merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        kinds = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in added}
        ids |= {token["content"]: token["id"] for token in added}
        largest = max(ids.values(), default=-1)
        well_formed = min(ids.values(), default=0) >= 0 and len(set(ids.values())) == len(ids)
        well_formed = well_formed and all(len(pair) == 2 and " " not in "".join(pair) for pair in merges)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"The tokenizer.json is broken ({type(error).__name__}: {error}).") from None
    if not well_formed:
        raise TokenizerError(
            "The tokenizer.json gives an id twice or holds merges with spaces; it cannot be converted."
        )
    if largest >= vocab_size:
        raise TokenizerError(
            f"The tokenizer has ids up to {largest}, but the model has only {vocab_size} vocabulary rows; "
            "the two do not belong together."
        )
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], np.full(vocab_size, UNUSED, np.int32)
    for text, index in ids.items():
        tokens[index], types[index] = text, kinds.get(text, NORMAL)
    metadata: dict[str, Value] = {
        f"{PREFIX}model": "gpt2",
        f"{PREFIX}pre": "olmo",
        f"{PREFIX}tokens": tokens,
        f"{PREFIX}token_type": types,
        f"{PREFIX}merges": [" ".join(pair) for pair in merges],
        f"{PREFIX}add_bos_token": False,
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata


def _check_pipeline(contents: Any) -> None:
    """Refuse a tokenizer whose behaviour GGUF's description would not capture."""
    model = contents["model"]
    stages = {
        "model": model.get("type") == "BPE"
        and not any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"))
        and not any(model.get(key) for key in ("dropout", "ignore_merges")),
        "normalizer": (contents.get("normalizer") or {}).get("type", "NFC") == "NFC",
        "pre_tokenizer": _is_gpt2_split(contents.get("pre_tokenizer")),
    }
    for stage, fits in stages.items():
        if not fits:
            raise TokenizerError(
                f"The tokenizer's {stage} differs from OLMoE's byte-level BPE, so llama.cpp would give other ids; "
                "it cannot be written to GGUF."
            )


def _is_gpt2_split(stage: Any) -> bool:
    return (
        isinstance(stage, dict)
        and stage.get("type") == "ByteLevel"
        and stage.get("use_regex", True) is True
        and not stage.get("add_prefix_space", True)
    )


def to_tokenizer_json(metadata: Mapping[str, Value], vocab_size: int) -> str:
    """The `tokenizer.json` that `tokenizer.ggml.*` describes, without the unused tokens that pad the vocabulary.

    Raises `TokenizerError` if the keys are missing, malformed or contradictory, or describe another kind of tokenizer.
    """
    _check_kind(metadata)
    tokens, merges = _strings(metadata, "tokens"), _strings(metadata, "merges")
    if not 0 < len(tokens) <= min(vocab_size, MAX_TOKENS):
        raise TokenizerError(f"The GGUF file lists {len(tokens)} tokens for a model with {vocab_size} vocabulary rows.")
    types = metadata.get(f"{PREFIX}token_type")
    if types is None:
        types = np.full(len(tokens), NORMAL, np.int32)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise TokenizerError(f"The GGUF file's {PREFIX}token_type is not one number for each of {len(tokens)} tokens.")
    vocab: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    for index, (text, kind) in enumerate(zip(tokens, types.tolist(), strict=True)):
        if kind == UNUSED:
            continue
        if kind not in (NORMAL, CONTROL, USER_DEFINED):
            raise TokenizerError(f"The GGUF file gives token {index} the type {kind}, which byte-level BPE lacks.")
        if text in vocab or not text:
            raise TokenizerError(f"The GGUF file's token {index} is empty or listed twice ({shown(text)}).")
        vocab[text] = index
        if kind != NORMAL:
            special = kind == CONTROL
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
            added.append({"id": index, "content": text, **flags, "special": special})
    pairs = [merge.split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or "".join(pair) not in vocab or pair[0] not in vocab or pair[1] not in vocab:
            raise TokenizerError(f"The GGUF file's merge {shown(merge)} does not join two tokens into a third.")
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": pairs,
        },
    }
    return json.dumps(contents, ensure_ascii=False) + "\n"


def chat_template(metadata: Mapping[str, Value]) -> str | None:
    """The chat template of the file, if it has one."""
    template = metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _check_kind(metadata: Mapping[str, Value]) -> None:
    for key, allowed in (("model", ("gpt2",)), ("pre", GPT2_PATTERNS)):
        value = metadata.get(f"{PREFIX}{key}", allowed[0] if key == "pre" else None)
        if value not in allowed if isinstance(value, str) else True:
            raise TokenizerError(
                f"The GGUF file has {PREFIX}{key} {shown(value)}; OLMoE's byte-level BPE is {' or '.join(allowed)}."
            )


def _strings(metadata: Mapping[str, Value], key: str) -> list[str]:
    value = metadata.get(f"{PREFIX}{key}")
    if not isinstance(value, list):
        raise TokenizerError(f"The GGUF file lacks {PREFIX}{key}, so it has no usable tokenizer; convert it again.")
    return value
