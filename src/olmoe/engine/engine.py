"""`Engine`: many requests at once over one runner and one pool of blocks, step by step.

A request's text depends on nothing but the request: not on what else is in progress, how its prompt was split, what the
prefix cache held, or whether it was preempted. With the kernels' runner this is exact to the bit.

Shapes legend: L layers, K experts per token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from olmoe.engine.block_pool import BlockPool
from olmoe.engine.new_request import new_request
from olmoe.engine.prompt_logprobs import prompt_logprobs
from olmoe.engine.request import Delta, FinishReason, Request, Routing, TokenLogprob
from olmoe.engine.sampler import Choice, Sampler
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.scheduler import Chunk, Scheduler
from olmoe.engine.scheduler import Sequence as Scheduled
from olmoe.engine.text_stream import TextStream
from olmoe.engine.token_mask import TokenMask
from olmoe.engine.tracing import OnTrace, Traced
from olmoe.errors import UserError
from olmoe.ops import AUTO
from olmoe.ops.cache import KEY_BLOCK
from olmoe.runner import Batch, CacheView, RouterTrace, Runner, Want, position_bytes
from olmoe.runner.policy_file import Policy
from olmoe.runtime import inference_mode
from olmoe.tokenizer import Tokenizer


class _Text:
    """A request in progress, with everything the engine keeps for it."""

    __slots__ = ("mask", "reported", "request", "scheduled", "stream", "traced")

    def __init__(self, request: Request, scheduled: Scheduled, stream: TextStream, mask: TokenMask | None) -> None:
        self.request, self.scheduled, self.stream, self.mask = request, scheduled, stream, mask
        self.reported = 0  # tokens of the prompt whose log-probabilities and routing have been noted
        self.traced = 0  # tokens passed to `on_trace`, or found in the prefix cache


class _Prompt(NamedTuple):
    """What a step computed of a prompt for the first time: rows of the batch; the first `scored` of them are scored."""

    text: _Text
    rows: range
    scored: int


class _Rows(NamedTuple):
    """Which rows of a batch need logits and routing, and for whom."""

    ends: list[int]  # rows after which a token is chosen, for the text at the same index in `choosing`
    choosing: list[_Text]
    prompts: list[_Prompt]
    scored: list[int]  # rows of `prompts` that need logits
    traced: dict[int, int]  # row -> its number in the trace
    done: list[_Text]  # those that wanted no more than their prompt scored


@dataclass(frozen=True)
class EngineStatistics:
    """What an engine holds now and has done so far. Queries and hits of the prefix cache are counted in tokens."""

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    prompt_tokens: int
    generation_tokens: int
    steps: int
    step_tokens: int  # of the last step
    step_seconds: float


class Engine:
    """Runs requests: `add` them, call `step` while it `has_work`, `abort` those that nobody waits for.

    All of it belongs to one thread, except `request` and `statistics`. The cache has a fixed number of blocks of
    `block_size` positions, as many as fit into `cache_bytes`; `max_rows` is the most requests that run at once, and
    `token_budget` the most tokens in a step (None: what the runner is fastest with). `token_bytes` is the size of a
    token's keys and values in it. `weights_id` keeps the prefix caches of different weights apart, should they ever be
    shared. `router_policy` is for requests that have none. `on_trace` is called in every step with what the routers
    chose for each token computed in it, once per token; `RequestTraces` writes that to a file.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        cache_bytes: int = 2**31,
        cache_dtype: torch.dtype | None = None,
        block_size: int = KEY_BLOCK,
        max_rows: int = 64,
        token_budget: int | None = None,
        prefix_cache: bool = True,
        backend: str = AUTO,
        weights_id: bytes = b"",
        router_policy: Policy | None = None,
        on_trace: OnTrace | None = None,
    ) -> None:
        """Raises `UserError` if `cache_bytes` have no room for a single block, or a policy does not fit the model."""
        self.runner, self.tokenizer, self.context_length = runner, tokenizer, context_length
        self.router_policy = router_policy
        self._policy = None if router_policy is None else router_policy.resolve(runner.config)
        self.token_bytes = position_bytes(runner.config, cache_dtype or runner.cache_dtype)
        blocks = cache_bytes // (self.token_bytes * block_size)
        if blocks < 1:
            raise UserError(
                f"A cache of {cache_bytes} bytes has no room for {block_size} tokens of {self.token_bytes} bytes; "
                "give it more."
            )
        self._cache = runner.new_cache(blocks, block_size, cache_dtype, block_size)
        budget = token_budget or runner.chunk_tokens
        dynamic = runner.config.rope.rope_type == "dynamic"  # keys depend on the current length of a text
        self._scheduler = Scheduler(
            BlockPool(blocks, block_size),
            max_rows=min(max_rows, budget),  # so that every decoding text has a turn in every step
            token_budget=budget,
            prefix_cache=prefix_cache and not dynamic,
            stepwise=dynamic,
        )
        self.pool_tokens = blocks * block_size
        self._sampler = Sampler(tokenizer.vocab_size, backend)
        self._ends = frozenset(tokenizer.eos_ids)
        self._texts: dict[Request, _Text] = {}
        self._news: list[Delta] = []
        self._root = hashlib.sha256(weights_id).digest()
        self._on_trace = on_trace
        self._steps = self._prompt_tokens = self._generation_tokens = self._step_tokens = 0
        self._step_seconds = 0.0

    # ---- requests ----

    def request(
        self, prompt_ids: list[int], params: SamplingParams, *, where: str = "", priority: int = 0, cache_salt: str = ""
    ) -> Request:
        """A request for `add`, by `new_request`. Changes nothing, and may be called from any thread.

        Raises `UserError` for a request that can never run, such as a text longer than the whole cache.
        """
        request = new_request(
            prompt_ids,
            params,
            self.runner.config,
            self.tokenizer,
            self.context_length,
            where=where,
            priority=priority,
            cache_salt=cache_salt,
            router_policy=self._policy,
        )
        if request.most_tokens > self.pool_tokens:
            raise UserError(
                f"The prompt's {len(prompt_ids)} tokens and {request.limit} new ones need more than the cache of "
                f"{self.pool_tokens} tokens; shorten them, or give the cache more memory."
            )
        return request

    def add(self, request: Request) -> None:
        """Queue a request made by `request`.

        Raises `UserError` for one that is in progress or has finished; an error leaves everything unchanged.
        """
        if request in self._texts or request.finish_reason is not None:
            raise UserError("This request was added before; make another.")
        params, vocab_size = request.params, self.tokenizer.vocab_size
        request.times.arrived = request.times.arrived or time.perf_counter()
        fresh = params.prompt_logprobs is not None or params.prompt_routing
        scheduled = Scheduled(request, self._chain(request), len(request.prompt_ids) if fresh else 0)
        mask = TokenMask(params, vocab_size, self._ends) if TokenMask.needed(params) else None
        stream = TextStream(self.tokenizer, params.stop, include_stop=params.include_stop)
        self._scheduler.add(scheduled)
        self._texts[request] = _Text(request, scheduled, stream, mask)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs.append(None)  # nothing comes before the first token

    def abort(self, request: Request) -> None:
        """Give up a request: its blocks are free at once, and `step` reports its end as "cancelled"."""
        text = self._texts.get(request)
        if text is not None:
            self._news.append(self._end(text, "cancelled", "", []))

    def cancel_all(self) -> None:
        """Mark every request as cancelled after an error or an interrupt within `step`; the engine is then of no use.

        Its scheduler may have been stopped halfway, and is not touched.
        """
        for request in self._texts:
            request.finish_reason, request.times.finished = "cancelled", time.perf_counter()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._texts or self._news)

    def __contains__(self, request: Request) -> bool:
        """Whether a request is in progress or waiting."""
        return request in self._texts

    def requests(self) -> list[Request]:
        """The requests that have not finished."""
        return list(self._texts)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""
        self._scheduler.pool.forget()

    def statistics(self) -> EngineStatistics:
        """The current numbers."""
        scheduler = self._scheduler
        return EngineStatistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks=scheduler.pool.blocks,
            blocks_used=scheduler.pool.used,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.queried_tokens,
            prefix_hits=scheduler.cached_tokens,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            steps=self._steps,
            step_tokens=self._step_tokens,
            step_seconds=self._step_seconds,
        )

    def check(self) -> None:
        """Assert that pool and scheduler are sound."""
        self._scheduler.check()

    # ---- a step ----

    @inference_mode
    def step(self) -> list[Delta]:
        """Run the next tokens through the network, and choose one for each text that has caught up -> what is new."""
        started = time.perf_counter()
        chunks = self._scheduler.schedule()
        if not chunks:
            return self.unreported()
        texts = [self._texts[chunk.sequence.request] for chunk in chunks]
        rows = self._rows(chunks, texts)
        if self._on_trace is not None:
            rows = rows._replace(traced={row: row for row in range(sum(chunk.tokens for chunk in chunks))})
        view = CacheView(self._cache, self._table(chunks))
        output = self.runner.forward(self._batch(chunks), view, Want([*rows.ends, *rows.scored], list(rows.traced)))
        self._scheduler.advance(chunks)
        if self._on_trace is not None and output.trace is not None:
            self._on_trace(list(_traced(chunks, texts, output.trace)))
        self._note_prompts(rows, output.logits[len(rows.ends) :], output.trace)
        self._choose(rows, output.logits[: len(rows.ends)], output.trace)
        self._account(chunks, started)
        return self.unreported()

    def unreported(self) -> list[Delta]:
        """What is new but was not returned by `step`: everything new, if a step has raised."""
        news, self._news = self._news, []
        return news

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        ids: list[int] = []
        for sequence, start, count in chunks:
            ids += sequence.ids[start : start + count]
        return Batch(
            ids,
            [chunk.tokens for chunk in chunks],
            [chunk.start for chunk in chunks],
            # The length of a prompt is known before its last chunk; the length of a text grows with every token.
            [max(chunk.sequence.prompt_length, chunk.start + chunk.tokens) for chunk in chunks],
            [chunk.sequence.request.policy for chunk in chunks],
        )

    @staticmethod
    def _table(chunks: Sequence[Chunk]) -> np.ndarray:
        table = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), dtype=np.int32)
        for row, chunk in zip(table, chunks, strict=True):
            row[: len(chunk.sequence.blocks)] = chunk.sequence.blocks
        return table

    @staticmethod
    def _rows(chunks: Sequence[Chunk], texts: Sequence[_Text]) -> _Rows:
        rows = _Rows([], [], [], [], {}, [])
        first = 0
        for chunk, text in zip(chunks, texts, strict=True):
            params, prompt_length = text.request.params, chunk.sequence.prompt_length
            end = min(chunk.start + chunk.tokens, prompt_length)
            if text.reported < end and (params.prompt_logprobs is not None or params.prompt_routing):
                new = range(first + max(text.reported - chunk.start, 0), first + end - chunk.start)
                # The row of its last token predicts the first token after the prompt.
                scored = 0 if params.prompt_logprobs is None else len(new) - (end == prompt_length)
                rows.prompts.append(_Prompt(text, new, scored))
                rows.scored.extend(new[:scored])
                if params.prompt_routing:
                    rows.traced.update(zip(new, range(len(rows.traced), len(rows.traced) + len(new)), strict=True))
                text.reported = end
            first += chunk.tokens
            if not chunk.complete:
                continue
            if text.request.limit == 0:
                rows.done.append(text)
                continue
            rows.ends.append(first - 1)
            rows.choosing.append(text)
            if params.routing:
                rows.traced.setdefault(first - 1, len(rows.traced))
        return rows

    def _note_prompts(self, rows: _Rows, logits: Tensor, trace: RouterTrace | None) -> None:
        """Log-probabilities and routing of the tokens of prompts that this step computed for the first time."""
        at = 0
        for text, new, scored in rows.prompts:
            request, params = text.request, text.request.params
            if params.prompt_logprobs is not None:
                begin = len(request.prompt_logprobs)
                given = request.prompt_ids[begin : begin + scored]
                request.prompt_logprobs += prompt_logprobs(
                    logits[at : at + scored], given, params.prompt_logprobs, self.tokenizer.vocab_size
                )
                at += scored
            if params.prompt_routing and trace is not None:
                request.prompt_routing += [_routing(trace, rows.traced[row]) for row in new]

    def _choose(self, rows: _Rows, logits: Tensor, trace: RouterTrace | None) -> None:
        for text in rows.done:
            self._news.append(self._end(text, "length", "", []))
        if not rows.choosing:
            return
        masks, errors = [], {}
        for text in rows.choosing:
            try:
                masks.append(None if text.mask is None else text.mask.next(len(text.request.token_ids)))
            except Exception as error:  # a failing grammar must end only its own request
                masks.append(None)
                errors[text] = _sentence(error, "grammar")
        choices = self._sampler.choose_rows(logits, [text.request for text in rows.choosing], masks)
        for row, text, choice in zip(rows.ends, rows.choosing, choices, strict=True):
            if text in errors:
                choice = Choice(-1, error=errors[text])
            routing = []
            if trace is not None and text.request.params.routing:
                routing.append(_routing(trace, rows.traced[row]))
            self._news.append(self._take(text, choice, routing))

    def _take(self, text: _Text, choice: Choice, routing: list[Routing]) -> Delta:
        """Add the chosen token to a text -> what is new."""
        request = text.request
        if choice.error is not None:
            request.error = choice.error
            return self._end(text, "error", "", [])
        request.token_ids.append(choice.token_id)
        text.scheduled.ids.append(choice.token_id)
        self._generation_tokens += 1
        logprobs: list[TokenLogprob] = []
        if choice.logprob is not None and choice.top is not None:
            logprobs = [TokenLogprob(choice.token_id, choice.logprob, choice.top)]
            request.logprobs += logprobs
        request.routing += routing
        if len(request.token_ids) == 1:
            request.times.first_token = time.perf_counter()
        try:
            new, reason = self._read(text, choice.token_id)
        except Exception as error:  # a failing grammar or detokenizer must end only its own request
            request.error = _sentence(error, "text")
            return self._end(text, "error", "", [choice.token_id], logprobs, routing)
        request.text += new
        if reason is not None:
            return self._end(text, reason, new, [choice.token_id], logprobs, routing)
        return Delta(request, new, [choice.token_id], logprobs, routing)

    def _read(self, text: _Text, token_id: int) -> tuple[str, FinishReason | None]:
        """What a chosen token adds to a text, and why the text ends with it."""
        request, stream = text.request, text.stream
        params = request.params
        if token_id in self._ends and not params.ignore_eos:
            return stream.finish(), "eos"
        if token_id in params.stop_token_ids:
            request.stop = token_id
            return stream.finish(), "stop"
        new = stream.add(token_id)
        if stream.stopped:
            request.stop = stream.stop_string
            return new, "stop"
        if text.mask is not None and text.mask.accept(token_id):
            return new + stream.finish(), "stop"
        if len(request.token_ids) >= request.limit:
            return new + stream.finish(), "length"
        return new, None

    def _end(
        self,
        text: _Text,
        reason: FinishReason,
        new: str,
        token_ids: list[int],
        logprobs: Sequence[TokenLogprob] = (),
        routing: Sequence[Routing] = (),
    ) -> Delta:
        request = text.request
        request.finish_reason, request.times.finished = reason, time.perf_counter()
        del self._texts[request]
        self._scheduler.remove(text.scheduled)
        return Delta(request, new, token_ids, list(logprobs), list(routing), reason, request.error)

    def _chain(self, request: Request) -> bytes:
        """The root of the request's chain of block hashes: whatever its keys and values depend on other than tokens."""
        policy = request.policy
        parts = [self._root, request.cache_salt.encode("utf-8", "surrogatepass")]
        if policy is not None:
            parts += policy.identity()
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()

    def _account(self, chunks: Iterable[Chunk], started: float) -> None:
        self._step_seconds = time.perf_counter() - started
        self._steps += 1
        self._step_tokens = 0
        for sequence, start, tokens in chunks:
            timings, times = sequence.request.timings, sequence.request.times
            self._step_tokens += tokens
            self._prompt_tokens += max(0, min(sequence.prompt_length, start + tokens) - start)
            if not times.scheduled:
                times.scheduled = started
                timings.queue_seconds = started - times.arrived
            if start + tokens > sequence.prompt_length:
                timings.decode_seconds += self._step_seconds
            else:
                timings.prefill_seconds += self._step_seconds


def _sentence(error: Exception, what: str) -> str:
    """Why a text ends with an error, in a sentence for the client."""
    return str(error) if isinstance(error, UserError) else f"The {what} cannot continue ({error})."


def _traced(chunks: Sequence[Chunk], texts: Sequence[_Text], trace: RouterTrace) -> Iterator[Traced]:
    """What a step computed of each text, except tokens computed before it was preempted. All rows are traced."""
    end = 0
    for (sequence, start, tokens), text in zip(chunks, texts, strict=True):
        end += tokens
        new = min(tokens, start + tokens - text.traced)
        if new > 0:
            text.traced = start + tokens
            rows = slice(end - new, end)
            ids = sequence.ids[text.traced - new : text.traced]
            yield Traced(
                text.request, text.traced - new, ids, trace.expert_ids[rows].numpy(), trace.weights[rows].numpy()
            )


def _routing(trace: RouterTrace, row: int) -> Routing:
    return Routing(trace.expert_ids[row].numpy(), trace.weights[row].numpy())
