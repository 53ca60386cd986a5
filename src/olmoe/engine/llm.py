"""`LLM`: a model, its tokenizer and a cache, from prompts to texts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from olmoe.config import ModelConfig
from olmoe.engine.prompts import Prompt, Read, prompt_ids, read_chats, read_params, read_prompt, read_prompts
from olmoe.engine.request import Completion, Request, Statistics, TokenLogprob, in_batch
from olmoe.engine.running import RunningSequences
from olmoe.engine.sampler import Choice, Sampler
from olmoe.engine.sampling_params import SamplingParams, whole_number
from olmoe.engine.stream import Stream
from olmoe.engine.text_stream import TextStream
from olmoe.engine.waves import waves
from olmoe.errors import BackendUnavailableError, CheckpointError, UserError
from olmoe.io import hub
from olmoe.model import CausalLM
from olmoe.ops import AUTO
from olmoe.runner import make_runner, require_backend
from olmoe.runtime import log, resolve_device, resolve_dtype, set_threads
from olmoe.tokenizer import Tokenizer
from olmoe.weights.checkpoint import Checkpoint
from olmoe.weights.generation import end_ids

# Bytes that the keys and values of texts in progress may take, and how many texts are in progress at most: more of
# them are hardly faster, and each needs its logits.
CACHE_BYTES = 2**31
MOST_SEQUENCES = 256
# So many prompts take long enough for a bar.
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
    ) -> None:
        """Load a checkpoint; None is the shipped one. See `checkpoint.load` for the arguments and errors.

        `backend` is how operations are computed: "auto" (C++ kernels where they fit, else torch), "cpu" (the kernels,
        or an error where they are not installed), "torch" or "reference". `threads` is the number of CPU threads of
        the whole process, torch's included (None: as it is, which is all cores unless something chose otherwise).
        `cache_bytes` bounds the keys and values that `generate` holds at once.
        """
        self._limit(threads, cache_bytes)
        require_backend(backend)
        found = Checkpoint.open(
            hub.SHIPPED if model_id is None else model_id,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        self.device, memory_dtype = resolve_device(device), resolve_dtype(dtype)
        # The tokenizer comes first: what is wrong with it must not wait for gigabytes of weights.
        folder, config = found.folder, found.config
        tokenizer = Tokenizer.from_folder(folder, eos_ids=end_ids(folder, config), pad_id=config.pad_token_id)
        _check_fit(tokenizer, config)
        model = found.load(dtype=memory_dtype, device=self.device, progress=progress)
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
    ) -> LLM:
        """An `LLM` of a model and a tokenizer that are already in memory."""
        require_backend(backend)
        llm = cls.__new__(cls)
        llm._limit(threads, cache_bytes)
        llm.device = next(model.parameters()).device
        llm._assemble(model, tokenizer, backend)
        return llm

    def _limit(self, threads: int | None, cache_bytes: int) -> None:
        set_threads(threads)
        self.cache_bytes = whole_number("cache_bytes", cache_bytes, least=1)

    def _assemble(self, model: CausalLM, tokenizer: Tokenizer, backend: str) -> None:
        config = model.config
        if backend == "cpu" and self.device.type != "cpu":
            raise BackendUnavailableError(f"Backend 'cpu' runs on the CPU, but the model is on {self.device}.")
        _check_fit(tokenizer, config)
        self.backend, self.model, self.tokenizer, self.config = backend, model, tokenizer, config
        self.recompile()
        # Scaled RoPE stretches the context that the model was trained on.
        self.context_length = int(config.max_position_embeddings * config.rope.factor)

    def recompile(self) -> None:
        """Take over what was changed in `model` since it was compiled: replaced weights or modules, hooks, settings.

        Generation runs what was compiled from the model when this object was made, or by the last call of this.
        Weights that are written in place need no call, unless they are vectors in half precision.
        """
        self._runner = make_runner(self.model, self.backend)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        show_progress: bool = True,
    ) -> list[Completion]:
        """Complete one prompt or several, each into the text that it would get alone.

        A prompt is a text; a list of integer ids, or a one-dimensional integer array of numpy or torch; a list of chat
        messages, which goes through the chat template; or an encoding of a transformers tokenizer (a dict with
        `input_ids`), whose padding is left out as its `attention_mask` says. Several prompts are a list or another
        iterable of these, an array of two dimensions, or an encoding of such. `params` are for all prompts, or one for
        each.

        Texts are generated together in waves, the longest first: as many as have room for their keys and values in
        `cache_bytes` (2 GiB unless chosen otherwise), 256 at most, and always one. Memory thus stays the same for
        thousands of prompts. For more than 32 a bar is shown on stderr if that is a terminal, unless `show_progress`
        is False.

        Raises `UserError` for an empty prompt, ids outside the vocabulary, a prompt that leaves no room in the context,
        and whatever else is no prompt, before anything is generated; it names the prompt if there are several.
        """
        return self._complete(read_prompts(prompts), params, show_progress=show_progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Iterable[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Iterable[SamplingParams | None] | None = None,
        *,
        show_progress: bool = True,
    ) -> list[Completion]:
        """The assistant's answer to one conversation or to several; otherwise as `generate`.

        A conversation is a list of messages such as `{"role": "user", "content": "Hello"}`. They go through the
        checkpoint's chat template, or OLMoE-Instruct's where it has none.
        """
        return self._complete(list(read_chats(messages)), params, show_progress=show_progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Complete one prompt, piece by piece. Errors are those of `generate`, raised at once."""
        (request,) = self._requests([read_prompt(prompt)], params)
        text, statistics = TextStream(self.tokenizer, request.params.stop), Statistics()
        return Stream(request, text, self._run([request], [text], statistics), statistics)

    def _complete(self, prompts: list[Read], params: object, *, show_progress: bool) -> list[Completion]:
        requests = self._requests(prompts, params)
        streams = [TextStream(self.tokenizer, request.params.stop) for request in requests]
        statistics, hidden = Statistics(), not show_progress or len(requests) <= _MANY or sys.stderr is None
        with tqdm(total=len(requests), desc="generate", unit="prompt", disable=hidden or None) as bar:
            for _ in self._run(requests, streams, statistics):
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
                requests.append(self._request(prompt, each, where))
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

    def _request(self, prompt: Read, params: SamplingParams, where: str) -> Request:
        ids = prompt_ids(prompt, self.tokenizer)
        if not ids:
            raise UserError("The prompt is empty; give at least one character.")
        foreign = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if foreign:
            raise UserError(
                f"The prompt holds the id {foreign[0]}, outside the vocabulary of {self.config.vocab_size}."
            )
        unknown = [i for i in params.logit_bias or () if i >= self.tokenizer.vocab_size]
        if unknown:
            raise UserError(
                f"logit_bias holds the id {unknown[0]}, but the tokenizer has {self.tokenizer.vocab_size} ids."
            )
        room = self.context_length - len(ids)
        if room < 1:
            raise UserError(
                f"The prompt has {len(ids)} tokens, but the model's context ends at {self.context_length}; shorten it."
            )
        return Request(ids, params, min(params.max_new_tokens, room), where)

    # ---- the inner loop ----

    @torch.inference_mode()
    def _run(
        self, requests: list[Request], streams: list[TextStream], statistics: Statistics
    ) -> Generator[tuple[int, str], None, None]:
        """Generate until every request has finished, yielding (request number, new text)."""
        called = time.perf_counter()
        runner = self._runner
        room = self.cache_bytes // runner.position_bytes
        needs = [request.most_tokens for request in requests]
        for wave in waves(needs, room, MOST_SEQUENCES, runner.block_positions):
            members = [requests[number] for number in wave]
            for row, text in self._wave(members, [streams[number] for number in wave], statistics, called):
                yield wave[row], text

    def _wave(
        self, requests: list[Request], streams: list[TextStream], statistics: Statistics, called: float
    ) -> Generator[tuple[int, str], None, None]:
        """As `_run`, all at once. Its cache goes when it ends: two waves never hold one at the same time."""
        started = time.perf_counter()
        running = RunningSequences(self._runner, len(requests), max(request.most_tokens for request in requests))
        logits = running.prefill([request.prompt_ids for request in requests])
        seconds = time.perf_counter() - started
        statistics.prompt_tokens += sum(len(request.prompt_ids) for request in requests)
        statistics.prefill_seconds += seconds
        for request in requests:
            request.timings.queue_seconds, request.timings.prefill_seconds = started - called, seconds
        yield from self._steps(requests, streams, statistics, running, logits)

    def _steps(
        self,
        requests: list[Request],
        streams: list[TextStream],
        statistics: Statistics,
        running: RunningSequences,
        logits: Tensor,
    ) -> Generator[tuple[int, str], None, None]:
        """Choose and decode until every request has finished. `logits` (B, V) are those after the prompts."""
        sampler = Sampler(self.tokenizer.vocab_size, self.backend)
        active = list(range(len(requests)))
        while active:
            started = time.perf_counter()
            pieces: list[tuple[int, str]] = []
            choices = sampler.choose_rows(logits, [requests[number] for number in active])
            for number, choice in zip(active, choices, strict=True):
                text = self._take(choice, requests[number], streams[number], statistics)
                if text:
                    pieces.append((number, text))
            self._took(time.perf_counter() - started, [requests[number] for number in active], statistics)
            yield from pieces  # what the reader does with them is not our time
            started = time.perf_counter()
            unfinished = [row for row, number in enumerate(active) if requests[number].finish_reason is None]
            statistics.finished += len(active) - len(unfinished)
            if len(unfinished) < len(active):
                active = [active[row] for row in unfinished]
                if active:
                    running.keep(unfinished)
            if active:
                logits = running.step([requests[number].token_ids[-1] for number in active])
            self._took(time.perf_counter() - started, [requests[number] for number in active], statistics)

    def _take(self, choice: Choice, request: Request, stream: TextStream, statistics: Statistics) -> str:
        """Add what was chosen for a request -> the text that it makes certain."""
        if choice.error is not None:
            raise in_batch(UserError(choice.error), request.where)
        statistics.decode_tokens += bool(request.token_ids)
        statistics.new_tokens += 1
        request.token_ids.append(choice.token_id)
        if choice.logprob is not None and choice.top is not None:
            request.logprobs.append(TokenLogprob(choice.token_id, choice.logprob, choice.top))
        return self._accept(request, stream, choice.token_id)

    @staticmethod
    def _took(seconds: float, requests: list[Request], statistics: Statistics) -> None:
        statistics.decode_seconds += seconds
        for request in requests:
            request.timings.decode_seconds += seconds

    def _accept(self, request: Request, stream: TextStream, token_id: int) -> str:
        """Add a chosen id to its text and decide whether the request has finished."""
        if token_id in self.tokenizer.eos_ids and not request.params.ignore_eos:
            request.finish_reason = "eos"
            request.text += (rest := stream.finish())
            return rest
        text = stream.add(token_id)
        if stream.stopped:
            request.finish_reason = "stop"
        elif len(request.token_ids) >= request.limit:
            request.finish_reason = "length"
            text += stream.finish()
        request.text += text
        return text


def _check_fit(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """A tokenizer may have fewer ids than the model has rows, which are then padding, but never more."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model only {config.vocab_size}; "
            "they do not belong together."
        )
