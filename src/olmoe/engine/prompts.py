"""Reading prompts: whatever a caller may pass to `LLM` becomes texts, lists of ids and chats, or a `UserError`."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olmoe.engine.request import in_batch
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError, shown
from olmoe.tokenizer import Tokenizer

# What a single prompt may be: a text; ids, as integers or an integer array; chat messages; an encoding with input_ids.
Prompt = str | Sequence[int] | np.ndarray | Tensor | Sequence[Mapping[str, Any]] | Mapping[str, Any]

_WHAT = "A prompt is a text, a list or array of integer ids, a list of chat messages, or an encoding with input_ids"


@dataclass(frozen=True)
class Chat:
    """Messages that the chat template turns into a prompt."""

    messages: list[Mapping[str, Any]]


Read = str | list[int] | Chat


def read_prompts(value: object) -> list[Read]:
    """One prompt or several, in any of the ways that `LLM.generate` documents.

    A one-dimensional array is one prompt, a two-dimensional array holds one per row. Raises `UserError` for anything
    else, with its index if there are several.
    """
    if isinstance(value, str):
        return [str(value)]
    if isinstance(value, Mapping):
        return list(_encoding_rows(value))
    if isinstance(value, np.ndarray | Tensor):
        listed = _listed(value)
        return read_prompts(listed) if _holds_texts(value) else list(_rows(value, listed))
    items = _items(value)
    if items and (_is_number(items[0]) or _is_message(items[0])):
        return [_single(items)]
    prompts = []
    for index, item in enumerate(items):
        try:
            prompts.append(_single(item))
        except UserError as error:
            raise in_batch(error, f"prompts[{index}]") from None
    return prompts


def read_prompt(value: object) -> Read:
    """The prompt of a stream. Raises `UserError` as `read_prompts` does, and for several."""
    prompts = read_prompts(value)
    if len(prompts) > 1:
        raise UserError(f"A stream continues one prompt, not {len(prompts)}; use generate for several.")
    return prompts[0] if prompts else []  # an empty prompt, refused as such


def read_chats(value: object) -> list[Chat]:
    """One conversation, or several. Raises `UserError` for anything that holds no messages."""
    items = _items(value)
    if items and isinstance(items[0], Mapping):
        return [_chat(items)]
    chats = []
    for index, item in enumerate(items):
        try:
            chats.append(_chat(_items(item)))
        except UserError as error:
            raise in_batch(error, f"prompts[{index}]") from None
    return chats or [_chat(items)]


def prompt_ids(prompt: Read, tokenizer: Tokenizer) -> list[int]:
    """The ids that the network is run on."""
    if isinstance(prompt, Chat):
        return tokenizer.encode_chat(prompt.messages)
    return tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def read_params(value: object, count: int) -> list[SamplingParams]:
    """Sampling parameters for `count` prompts: one for all, or one for each; None stands for the defaults."""
    if value is None or isinstance(value, SamplingParams):
        return [value or SamplingParams()] * count
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise UserError(
            f"Sampling parameters are a SamplingParams, or a list of one for each prompt, not {_typed(value)}."
        )
    given = list(value)
    for index, each in enumerate(given):
        if each is not None and not isinstance(each, SamplingParams):
            raise UserError(f"Sampling parameters are a SamplingParams, not {_typed(each)} (params[{index}]).")
    if len(given) != count:
        raise UserError(f"{len(given)} sampling parameters were given for {count} prompts.")
    return [each or SamplingParams() for each in given]


# ---- one prompt ----


def _single(value: object) -> Read:
    """One prompt of a batch, or a batch of one prompt."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return _only(_encoding_rows(value))
    if isinstance(value, np.ndarray | Tensor) and not _holds_texts(value):
        return _only(_rows(value, _listed(value)))
    items = _items(value)
    return _chat(items) if items and _is_message(items[0]) else _ids(items)


def _only(rows: list[list[int]]) -> list[int]:
    if len(rows) != 1:
        raise UserError(f"One of several prompts is one row of ids, not {len(rows)}; pass each row by itself.")
    return rows[0]


def _ids(items: list[Any]) -> list[int]:
    """Token ids, each an integer: neither a bool nor a float without a fraction is one."""
    if all(type(item) is int for item in items):
        return items
    ids = []
    for item in items:
        if isinstance(item, np.ndarray | Tensor) and item.ndim == 0:
            item = _listed(item)
        if isinstance(item, bool) or not isinstance(item, numbers.Integral):
            what = "Token ids are integers" if any(map(_is_number, items)) else _WHAT
            raise UserError(f"{what}, not {_typed(item)}.")
        ids.append(int(item))
    return ids


def _items(value: object) -> list[Any]:
    """The items of a list, a generator or anything else that has an order."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise UserError(f"{_WHAT}, not {_typed(value)}; decode bytes first.")
    if isinstance(value, str | Mapping | set | frozenset) or not isinstance(value, Iterable):
        raise UserError(f"{_WHAT}, not {_typed(value)}.")
    if isinstance(value, np.ndarray | Tensor):
        listed = _listed(value)
        return listed if isinstance(listed, list) else [listed]
    try:
        iterator = iter(value)
    except TypeError:  # other libraries' arrays raise only here
        raise UserError(f"{_WHAT}, not {_typed(value)}.") from None
    return list(iterator)


def _is_number(item: object) -> bool:
    """Whether it can only be meant as an id, valid or not."""
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim == 0
    return isinstance(item, numbers.Number | np.bool_)


# ---- chats ----


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and "role" in item


def _chat(items: list[Any]) -> Chat:
    for item in items:
        if not _is_message(item):
            example = '{"role": "user", "content": "Hello"}'
            raise UserError(f"A chat is a list of messages such as {example}, but this one holds {_typed(item)}.")
    return Chat(items)


# ---- encodings and arrays ----


def _encoding_rows(encoding: Mapping[str, Any]) -> list[list[int]]:
    """The ids in what a transformers tokenizer returns, without those that its attention_mask hides (the padding)."""
    if "input_ids" not in encoding:
        hint = "; put the message into a list" if "role" in encoding else ""
        raise UserError(f"{_WHAT}, not a dict of {', '.join(map(str, encoding)) or 'nothing'}{hint}.")
    rows = _nested(encoding["input_ids"])
    if encoding.get("attention_mask") is None:
        return rows
    kept = _mask(encoding["attention_mask"])
    if [len(row) for row in kept] != [len(row) for row in rows]:
        raise UserError("input_ids and attention_mask differ in shape; take both from one call of the tokenizer.")
    return [[i for i, keep in zip(row, keeps, strict=True) if keep] for row, keeps in zip(rows, kept, strict=True)]


def _nested(value: object) -> list[list[int]]:
    """Rows of ids, from an array, a list, or a list of rows."""
    if isinstance(value, np.ndarray | Tensor):
        return _rows(value, _listed(value))
    items = _items(value)
    nested = bool(items) and not _is_number(items[0])
    return [_ids(_items(item)) for item in items] if nested else [_ids(items)]


def _mask(value: object) -> list[list[Any]]:
    """Rows of zeros and ones, whatever type they have."""

    def plain(item: object) -> Any:
        return _listed(item) if isinstance(item, np.ndarray | Tensor) else item

    listed = plain(value)
    rows = [plain(row) for row in listed] if isinstance(listed, list | tuple) else [listed]
    if not rows or not isinstance(rows[0], list | tuple):
        rows = [rows]
    flags = [[plain(item) for item in row] if isinstance(row, list | tuple) else [row] for row in rows]
    strange = [item for row in flags for item in row if not _is_number(item) or item not in (0, 1)]
    if strange:
        raise UserError(f"An attention_mask has a 0 or a 1 for each id, not {_typed(strange[0])}.")
    return flags


def _rows(array: np.ndarray | Tensor, listed: Any) -> list[list[int]]:
    """The rows of an integer array of one or two dimensions, whose values are `listed`."""
    if array.ndim not in (1, 2):
        raise UserError(
            f"An array of token ids has one dimension, or two for several prompts, not shape {tuple(array.shape)}."
        )
    if isinstance(array, Tensor):
        whole = not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
    else:
        whole = array.dtype.kind in "iuO"
    if not whole and 0 not in array.shape:  # an empty array has whatever type its maker defaults to
        raise UserError(f"Token ids are integers, not an array of {str(array.dtype).removeprefix('torch.')}.")
    return [_ids(row) for row in (listed if array.ndim == 2 else [listed])]


def _listed(array: np.ndarray | Tensor) -> Any:
    """Its values as Python objects. Raises `UserError` for a tensor without values, such as one on the meta device."""
    try:
        return array.tolist()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"A tensor of token ids cannot be read ({reason}); pass a dense one, or a list.") from None


def _holds_texts(array: np.ndarray | Tensor) -> bool:
    """Whether it is numpy's array of strings, or of objects, which may be anything."""
    return isinstance(array, np.ndarray) and array.ndim > 0 and array.dtype.kind in "UO"


def _typed(value: object) -> str:
    """A value and its type, for messages."""
    return "None" if value is None else f"{' '.join(shown(value).split())} ({type(value).__name__})"
