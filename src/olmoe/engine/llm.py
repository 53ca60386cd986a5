"""`LLM`: a model, its tokenizer and a cache, from prompts to texts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from olmoe.adapters import apply, base_of, read_adapter
from olmoe.config import ModelConfig
from olmoe.engine.engine import Engine
from olmoe.engine.new_request import new_request
from olmoe.engine.prompts import Prompt, Read, prompt_ids, read_chats, read_params, read_prompt, read_prompts
from olmoe.engine.request import Completion, Delta, Request, Statistics, in_batch
from olmoe.engine.sampling_params import SamplingParams, whole_number
from olmoe.engine.stream import Stream
from olmoe.engine.tracing import OnTrace, RequestTraces, TraceTarget, writer_of
from olmoe.errors import BackendUnavailableError, CheckpointError, UserError
from olmoe.io import hub
from olmoe.model import CausalLM
from olmoe.ops import AUTO
from olmoe.ops.cache import KEY_BLOCK
from olmoe.runner import Runner, TraceWriter, make_runner, position_bytes, require_backend, to_cache_dtype
from olmoe.runner.policy_file import AnyPolicy, Policy
from olmoe.runtime import log, resolve_device, resolve_dtype, set_threads
from olmoe.tokenizer import Tokenizer, chat_templates
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.generation import end_ids

# Bytes that the keys and values of texts in progress may take, and how many texts are in progress at most: more of
# them are hardly faster, and each needs its logits.
CACHE_BYTES = 2**31
MOST_SEQUENCES = 256
# More prompts than this take long enough for a progress bar.
_MANY = 32


class LLM:
    """Generate text with an OLMoE model.

    >>> llm = LLM()                                    # the shipped olmoe-tiny; or a folder, or a hub id
    >>> llm.generate("Once upon a time")[0].text       # doctest: +SKIP
    """

    def __init__(
        self,
        model_id: str | Path | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "auto",
        backend: str = AUTO,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        progress: Callable[[int, int], None] | None = None,
        threads: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        prefix_cache: bool = False,
        cache_dtype: str | torch.dtype | None = None,
        router_policy: AnyPolicy | None = None,
        adapter: str | Path | None = None,
    ) -> None:
        """Load a checkpoint; None means the shipped one. See `checkpoint.load` for the arguments and errors.

        `backend` is how operations are computed: "auto" (C++ kernels where they fit, else torch), "cpu" (the kernels,
        or an error where they are not installed), "torch" or "reference". `threads` is the number of CPU threads of
        the whole process, torch's included (None: unchanged, which is all cores unless something chose otherwise).
        `cache_bytes` bounds the keys and values held at once. With `prefix_cache` they are kept between calls, and
        what a prompt has in common with earlier ones is not computed again: useful for conversations. `cache_dtype` is
        the type of keys and values: "int8" takes half the memory of fp16, the default for packed models.
        `router_policy` changes what routers choose unless `SamplingParams` have their own policy.
        `adapter` is a folder with a LoRA adapter for the model; the model may then be left out, for the adapter names
        it. The adapter is added to plain weights; for packed ones, torch computes it separately, for chosen experts.
        Its tokenizer and its chat template take the place of the model's, where it has its own.
        """
        self._limit(threads, cache_bytes, prefix_cache, cache_dtype)
        require_backend(backend)
        found = Checkpoint.open(
            _model_of(model_id, adapter),
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        self.device, memory_dtype = resolve_device(device), resolve_dtype(dtype)
        # The tokenizer comes first: its errors must be reported before gigabytes of weights are loaded.
        folder, config = found.folder, found.config
        self.config, self.router_policy = config, router_policy
        own = Path(adapter).expanduser() if adapter is not None else folder
        texts = own if (own / "tokenizer.json").is_file() else folder
        templates = chat_templates(own) or chat_templates(folder)
        tokenizer = Tokenizer.from_folder(
            texts, eos_ids=end_ids(folder, config), pad_id=config.pad_token_id, templates=templates
        )
        _check_fit(tokenizer, config)
        adapted = None if adapter is None else read_adapter(own, config)
        model = found.load(dtype=memory_dtype, device=self.device, progress=progress)
        if adapted is not None:
            apply(model, adapted)
        self._assemble(model, tokenizer, backend)

    @classmethod
    def from_parts(
        cls,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        backend: str = AUTO,
        threads: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        prefix_cache: bool = False,
        cache_dtype: str | torch.dtype | None = None,
        router_policy: AnyPolicy | None = None,
    ) -> LLM:
        """An `LLM` from a model and a tokenizer that are already in memory."""
        require_backend(backend)
        llm = cls.__new__(cls)
        llm._limit(threads, cache_bytes, prefix_cache, cache_dtype)
        llm.config, llm.router_policy = model.config, router_policy
        llm.device = next(model.parameters()).device
        llm._assemble(model, tokenizer, backend)
        return llm

    def _limit(
        self, threads: int | None, cache_bytes: int, prefix_cache: bool, cache_dtype: str | torch.dtype | None
    ) -> None:
        set_threads(threads)
        self._cache_dtype = to_cache_dtype(cache_dtype)
        self._prefix_cache = prefix_cache
        self._idle: list[Engine] = []
        self.cache_bytes = whole_number("cache_bytes", cache_bytes, least=1)

    def _assemble(self, model: CausalLM, tokenizer: Tokenizer, backend: str) -> None:
        config = model.config
        if backend == "cpu" and self.device.type != "cpu":
            raise BackendUnavailableError(f"Backend 'cpu' runs on the CPU, but the model is on {self.device}.")
        _check_fit(tokenizer, config)
        self.backend, self.model, self.tokenizer, self.config = backend, model, tokenizer, config
        self.recompile()
        # Scaled RoPE stretches the context that the model was trained with.
        self.context_length = int(config.max_position_embeddings * config.rope.factor)

    @property
    def runner(self) -> Runner:
        """What was compiled from the model, for building your own `Engine`."""
        return self._runner

    @property
    def router_policy(self) -> Policy | None:
        """The default router policy; see `SamplingParams.router_policy`. It can be set."""
        return self._policy

    @router_policy.setter
    def router_policy(self, policy: AnyPolicy | None) -> None:
        given: Any = SamplingParams(router_policy=policy).router_policy
        self._resolved = None if given is None else given.resolve(self.config)
        self._policy: Policy | None = given

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """The dtype of keys and values, None for the runner's own."""
        return self._cache_dtype

    def recompile(self) -> None:
        """Apply changes made to `model` since it was compiled: replaced weights or modules, hooks, settings.

        Generation runs what was compiled from the model when this object was made, or by the last call of `recompile`.
        Weights that are written in place need no call, unless they are vectors in half precision, or `prefix_cache` has
        kept what the old ones computed.
        """
        self._runner = make_runner(self.model, self.backend)
        self._idle = []  # the keys and values they keep come from other weights

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        show_progress: bool = True,
        trace: TraceTarget = None,
    ) -> list[Completion]:
        """Complete one prompt or several, each with the text that it would get alone.

        A prompt is a text; a list of integer ids, or a one-dimensional integer array of numpy or torch; a list of chat
        messages, which goes through the chat template; or an encoding of a transformers tokenizer (a dict with
        `input_ids`), whose padding is left out as its `attention_mask` says. Several prompts are a list or another
        iterable of these, an array of two dimensions, or an encoding of several. `params` is one for all prompts, or a
        list of one for each.

        Texts are generated together, as many as have room for their keys and values in `cache_bytes` (2 GiB by
        default), at most 256 and at least one; when one ends, the next starts. Memory thus stays constant for thousands
        of prompts, and what prompts have in common is computed once. For more than 32 prompts a bar is shown on stderr
        if that is a terminal, unless `show_progress` is False.

        `trace` is a file for what the routers choose for every token, written as texts grow, with a window for each
        prompt in their order: the prompt's tokens and the new ones, except the last, which is never run through the
        network. `olmoe.runner.Trace.open` reads it. It may also be an open `TraceWriter`, to record several calls.

        Raises `UserError` for an empty prompt, ids outside the vocabulary, a prompt that leaves no room in the context,
        and anything else that is not a prompt, before anything is generated; it names the prompt if there are several.
        """
        return self._complete(read_prompts(prompts), params, trace, show_progress=show_progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Iterable[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        show_progress: bool = True,
        trace: TraceTarget = None,
    ) -> list[Completion]:
        """The assistant's answer to one conversation or to several; otherwise like `generate`.

        A conversation is a list of messages such as `{"role": "user", "content": "Hello"}`. They go through the
        checkpoint's chat template, or OLMoE-Instruct's where it has none.
        """
        return self._complete(list(read_chats(messages)), params, trace, show_progress=show_progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, trace: TraceTarget = None) -> Stream:
        """Complete one prompt, piece by piece. Errors are those of `generate`, raised at once.

        The `trace` file appears when the text has ended, and not if the stream is closed before.
        """
        requests = self._requests([read_prompt(prompt)], params)
        statistics = Statistics()
        pieces = self._run(requests, statistics, writer_of(trace, requests, self.config))
        return Stream(requests[0], pieces, statistics)

    def as_completed(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        most_sequences: int | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """What `generate` returns, each with the index of its prompt, as soon as it has finished.

        At most `most_sequences` are in progress at once (None: 256). Errors in prompts and parameters are raised at
        once. Closing the iterator cancels what has not finished.
        """
        requests = self._requests(read_prompts(prompts), params)
        number_of = {request: number for number, request in enumerate(requests)}

        def finished() -> Iterator[tuple[int, Completion]]:
            if not requests:
                return
            engine = self._rested(requests) or self._engine(requests, most_sequences)
            with contextlib.closing(self._deltas(engine, requests, Statistics())) as deltas:
                for delta in deltas:
                    if delta.finish_reason is not None:
                        yield number_of[delta.request], delta.request.completion()

        return finished()

    def _complete(
        self, prompts: list[Read], params: object, trace: TraceTarget, *, show_progress: bool
    ) -> list[Completion]:
        requests = self._requests(prompts, params)
        writer = writer_of(trace, requests, self.config)
        statistics, hidden = Statistics(), not show_progress or len(requests) <= _MANY or sys.stderr is None
        with tqdm(total=len(requests), desc="generate", unit="prompt", disable=hidden or None) as bar:
            for _ in self._run(requests, statistics, writer):
                bar.update(statistics.finished - bar.n)
            bar.update(statistics.finished - bar.n)
        return [request.completion() for request in requests]

    # ---- from what the caller gave to requests ----

    def _requests(self, prompts: list[Read], params: object) -> list[Request]:
        """The requests of a batch. Raises `UserError` for a prompt that cannot be continued."""
        requests = []
        for place, (prompt, each) in enumerate(zip(prompts, read_params(params, len(prompts)), strict=True)):
            where = f"prompts[{place}]" if len(prompts) > 1 else ""
            try:
                ids = prompt_ids(prompt, self.tokenizer)
                request = new_request(
                    ids,
                    each,
                    self.config,
                    self.tokenizer,
                    self.context_length,
                    where=where,
                    router_policy=self._resolved,
                )
                requests.append(request)
            except UserError as error:
                raise in_batch(error, where) from None
        cut = [request for request in requests if request.limit < request.params.max_new_tokens]
        if cut:
            others = f" ({cut[0].where} and {len(cut) - 1} more)" if len(cut) > 1 else ""
            log.warning(
                "only %d of %d new tokens fit the context of %d%s",
                cut[0].limit,
                cut[0].params.max_new_tokens,
                self.context_length,
                others or (f" ({cut[0].where})" if cut[0].where else ""),
            )
        return requests

    # ---- the inner loop ----

    def _run(
        self, requests: list[Request], statistics: Statistics, trace: AbstractContextManager[TraceWriter | None]
    ) -> Generator[str, None, None]:
        """Generate until every request has finished, yielding the new texts of any of them."""
        with trace as writer:
            if not requests:
                return
            traces = None
            if writer is not None:
                traces = RequestTraces(writer)
                traces.expect(requests)
            # A traced run shares nothing with other texts or calls: routing is not computed again for what is shared.
            engine = (self._rested(requests) if traces is None else None) or self._engine(requests, on_trace=traces)
            with contextlib.closing(self._deltas(engine, requests, statistics, keep=traces is None)) as deltas:
                for delta in deltas:
                    if delta.text:
                        yield delta.text  # what the reader does with it does not count as our time

    def _deltas(
        self, engine: Engine, requests: list[Request], statistics: Statistics, *, keep: bool = True
    ) -> Generator[Delta, None, None]:
        """Generate until every request has finished, yielding what is new of any of them.

        The engine is kept for later calls if prefixes are, and it may be.
        """
        for request in requests:
            engine.add(request)
        finished = False
        try:
            while engine.has_work:
                before = engine.statistics()
                news = engine.step()
                after = engine.statistics()
                prompt_tokens = after.prompt_tokens - before.prompt_tokens
                statistics.count(prompt_tokens, after.step_tokens, after.step_seconds, news)
                for delta in news:
                    if delta.error is not None:
                        raise in_batch(UserError(delta.error), delta.request.where)
                    yield delta
            finished = True
        except GeneratorExit:  # closed between two steps: the engine is sound, and keeps its prefixes
            finished = True
            raise
        finally:
            if finished:
                for request in engine.requests():
                    engine.abort(request)
                engine.unreported()
            else:
                engine.cancel_all()
            # Not one whose keys and values come from other weights. And only one, since `cache_bytes` allow no more.
            if keep and finished and self._prefix_cache and engine.runner is self._runner:
                self._idle = [engine]

    def _rested(self, requests: list[Request]) -> Engine | None:
        """The engine that an earlier call has left with its prefixes, if it has room for these requests."""
        idle, self._idle = self._idle, []
        most = max(request.most_tokens for request in requests)
        return next((engine for engine in idle if engine.pool_tokens >= most), None)

    def _engine(
        self, requests: list[Request], most_sequences: int | None = None, on_trace: OnTrace | None = None
    ) -> Engine:
        """An engine for these requests, or for any if prefixes are kept. If traced, it computes every token."""
        runner, config = self._runner, self.config
        unit, block_size, cache_bytes = runner.block_positions, KEY_BLOCK, self.cache_bytes
        token_bytes = position_bytes(config, self._cache_dtype or runner.cache_dtype)
        most = -(-max(request.most_tokens for request in requests) // unit) * unit
        if not self._prefix_cache:
            if len(requests) == 1:
                block_size = most  # one block per sequence is read slightly faster than blocks of 64
            needed = sum(-(-request.most_tokens // block_size) for request in requests) * block_size
            cache_bytes = min(cache_bytes, needed * token_bytes)
        # A single text always gets what it needs.
        least = -(-most // block_size) * block_size * token_bytes
        return Engine(
            runner,
            self.tokenizer,
            context_length=self.context_length,
            cache_bytes=max(cache_bytes, least),
            cache_dtype=self._cache_dtype,
            block_size=block_size,
            max_rows=most_sequences or MOST_SEQUENCES,
            prefix_cache=on_trace is None,
            backend=self.backend,
            on_trace=on_trace,
        )


def _model_of(model_id: str | Path | None, adapter: str | Path | None) -> str | Path:
    """The model to load: the one named by the caller or by the adapter, or else the shipped one."""
    if model_id is not None:
        return model_id
    return hub.SHIPPED if adapter is None else base_of(adapter)


def _check_fit(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """A tokenizer may have fewer ids than the model has rows, which are then padding, but never more."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model has only {config.vocab_size}; "
            "they do not belong together."
        )
