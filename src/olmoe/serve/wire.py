"""What is reported about tokens, as it goes over the wire: log-probabilities in three shapes, routing, usage."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from olmoe.engine.request import Routing, TokenLogprob
from olmoe.serve.chat_run import Usage
from olmoe.tokenizer import IncrementalDetokenizer, Tokenizer

# JSON has no infinity; the protocol writes this for a probability of 0.
_LEAST = -9999.0


def usage_dict(usage: Usage) -> dict[str, Any]:
    """The usage of a call, in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    r"""The text of one token; bytes that are not whole characters are written as OpenAI does, `bytes:\xe2\x80`.

    Different tokens thus have different texts, as needed for the keys of a dictionary.
    """
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if logprob > _LEAST else _LEAST


# ---- chat ----


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """`choices[i].logprobs` of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        content = tokenizer.token_bytes(token_id)
        text = content.decode("utf-8", errors="replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(content)}

    return {
        "content": [
            entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*pair) for pair in each.top.items()]}
            for each in logprobs
        ]
    }


def prompt_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` in vLLM's shape: for each token of the prompt, a mapping from ids to what is known about them.

    `rank` is None for a token that is not among the likeliest ones requested.
    """
    entries: list[dict[str, Any] | None] = []
    for each in logprobs:
        if each is None:
            entries.append(None)
            continue
        ranks = {token_id: rank for rank, token_id in enumerate(each.top, 1)}
        known = {each.token_id: each.logprob, **each.top}
        entries.append(
            {
                str(token_id): {
                    "logprob": finite(logprob),
                    "rank": ranks.get(token_id),
                    "decoded_token": token_text(tokenizer, token_id),
                }
                for token_id, logprob in known.items()
            }
        )
    return entries


# ---- completions ----


class LegacyLogprobs:
    """`choices[i].logprobs` of a completion, token by token: `text_offset` continues from one part to the next.

    The likeliest tokens at a position include the token itself.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top, self._offset = tokenizer, top, 0
        self._detokenizer = IncrementalDetokenizer(tokenizer)

    def prompt(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], text: str) -> dict[str, Any]:
        """Those of an echoed prompt, whose text is `text`; its first token has none."""
        part = self.part([each or TokenLogprob(i, 0.0, {}) for i, each in zip(ids, logprobs, strict=True)])
        for place, each in enumerate(logprobs):
            if each is None:
                part["token_logprobs"][place] = part["top_logprobs"][place] = None
        self._offset, self._detokenizer = len(text), IncrementalDetokenizer(self._tokenizer)
        return part

    def skip(self, text: str) -> None:
        """Continue after a text that has none."""
        self._offset += len(text)

    def part(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Those of the next tokens."""
        tokens, offsets, tops = [], [], []
        for each in logprobs:
            tokens.append(token_text(self._tokenizer, each.token_id))
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.add(each.token_id))
            top = dict(list(each.top.items())[: self._top])
            top.setdefault(each.token_id, each.logprob)
            tops.append({token_text(self._tokenizer, i): finite(value) for i, value in top.items()})
        return {
            "tokens": tokens,
            "token_logprobs": [finite(each.logprob) for each in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two parts of one `logprobs`."""
    return second if first is None else {name: first[name] + second[name] for name in second}


# ---- routing ----


def routing(entries: Sequence[Routing], experts: int) -> dict[str, Any] | None:
    """The experts of tokens, packed: ids and weights of shape (tokens, layers, k) in base64.

    Ids are bytes, or 16 bits where a byte is too small; their largest value stands for no expert, where a policy chose
    fewer. Weights are in half precision.
    """
    if not entries:
        return None
    dtype = "<u2" if experts > 255 else "u1"
    ids = np.stack([entry.expert_ids for entry in entries]).astype(dtype)
    weights = np.stack([entry.weights for entry in entries]).astype("<f2")
    tokens, layers, k = ids.shape
    return {
        "tokens": tokens,
        "layers": layers,
        "k": k,
        "dtype": "uint16" if experts > 255 else "uint8",
        "experts": base64.b64encode(ids.tobytes()).decode("ascii"),
        "weights": base64.b64encode(weights.tobytes()).decode("ascii"),
    }
