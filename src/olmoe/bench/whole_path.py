"""Decoding as users get it, next to bare steps: from a text through tokenizer, network and sampling back to text.

The two alternate in one process, so that other load on the machine affects both.
"""

from __future__ import annotations

import itertools
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from typing import Any

from olmoe.bench.speed import Measured
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.tokenizer import Tokenizer

_WARM_UP = 4


def stand_in_tokenizer(vocab_size: int, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """A byte-level tokenizer with that many ids for a model without one: single bytes, then short words."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = (
        "".join(letters) for n in itertools.count(2) for letters in itertools.product(string.ascii_lowercase, repeat=n)
    )
    entries = itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), words)
    backend = Backend(
        models.BPE(vocab={entry: i for i, entry in enumerate(itertools.islice(entries, vocab_size))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_ids=[i for i in eos_ids if i < vocab_size])


class WholePath:
    """An `LLM` timed as its user sees it, on prompts of `context` tokens."""

    def __init__(self, llm: LLM, context: int, params: SamplingParams) -> None:
        self._llm, self._params = llm, params
        self._random, self._context = random.Random(1), context

    def prompt(self) -> list[int]:
        """The ids of a random text, as many as the context asks for."""
        tokenizer = self._llm.tokenizer
        drawn = [self._random.randrange(tokenizer.vocab_size) for _ in range(self._context)]
        ids = tokenizer.encode(tokenizer.decode(drawn)) or drawn
        return list(itertools.islice(itertools.cycle(ids), self._context))

    def decode(self, steps: int) -> float:
        """Tokens per second of `steps` steps after the prompt; all time except the prompt's own counts."""
        values = {**vars(self._params), "max_new_tokens": steps + 1, "ignore_eos": True, "stop": ()}
        prompt, params = self.prompt(), SamplingParams(**values)
        started = time.perf_counter()
        stream = self._llm.stream(prompt, params)
        for _ in stream:
            pass
        seconds = time.perf_counter() - started - stream.statistics.prefill_seconds
        assert stream.statistics.decode_tokens == steps
        return steps / seconds


def measure_whole_path(
    measured: Measured,
    whole: WholePath,
    *,
    context: int,
    decode: int,
    rounds: int,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, float]:
    """Tokens per second of `decode` steps after `context` tokens, bare and through the whole path, in turn.

    They are medians over `rounds`; the ratio is the median of the rounds' ratios. `progress(done, total)` is called
    after each turn. Raises `UserError` for numbers below 1.
    """
    if min(context, decode, rounds) < 1:
        raise UserError("Context, decode and rounds must be at least 1.")
    running = measured.sequences(1, context + decode + 1)
    measured.prefill(running, context)
    measured.decode(running)
    whole.decode(_WARM_UP)
    bare_rates, whole_rates = [], []
    for number in range(rounds):
        running.lengths = [context]
        bare_rates.append(decode / sum(measured.decode(running) for _ in range(decode)))
        progress(2 * number + 1, 2 * rounds)
        whole_rates.append(whole.decode(decode))
        progress(2 * number + 2, 2 * rounds)
    return {
        "bare_tokens_per_second": statistics.median(bare_rates),
        "whole_tokens_per_second": statistics.median(whole_rates),
        "ratio": statistics.median(w / b for w, b in zip(whole_rates, bare_rates, strict=True)),
    }
