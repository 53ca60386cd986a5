"""`LLM`: a model, its tokenizer and a cache, from prompts to texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from olmoe import checkpoint, fused, hub
from olmoe.config import ModelConfig
from olmoe.engine.kv_cache import KVCache, default_cache_dtype
from olmoe.engine.prefill import prefill
from olmoe.engine.request import Completion, Request, SamplingParams, Statistics
from olmoe.engine.sampler import Sampler
from olmoe.engine.text_stream import TextStream
from olmoe.errors import BackendUnavailableError, CheckpointError, UserError
from olmoe.model import CausalLM, set_backend
from olmoe.ops import AUTO
from olmoe.runtime import log, resolve_device, resolve_dtype
from olmoe.tokenizer import Tokenizer

Prompt = str | Sequence[int]


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
        device: str = "auto",
        backend: str = AUTO,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load a checkpoint; None is the shipped one. See `checkpoint.load` for the arguments and errors.

        `backend` is how operations are computed: "auto" (C++ kernels where they fit, else torch), "cpu" (the kernels,
        or an error where they are not installed), "torch" or "reference".
        """
        fused.require(backend)
        folder = hub.resolve(
            hub.SHIPPED if model_id is None else model_id,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
        )
        self.device, memory_dtype = resolve_device(device), resolve_dtype(dtype)
        # The tokenizer comes first: what is wrong with it must not wait for gigabytes of weights.
        config = ModelConfig.from_file(folder / "config.json")
        tokenizer = Tokenizer.from_folder(
            folder, eos_ids=_generation_eos(folder) or config.eos_token_ids, pad_id=config.pad_token_id
        )
        _check_fit(tokenizer, config)
        model = checkpoint.load(folder, dtype=memory_dtype, device=self.device, progress=progress)
        self._assemble(model, tokenizer, backend)

    @classmethod
    def from_parts(cls, model: CausalLM, tokenizer: Tokenizer, *, backend: str = AUTO) -> LLM:
        """An `LLM` of a model and a tokenizer that are already in memory."""
        fused.require(backend)
        llm = cls.__new__(cls)
        llm.device = next(model.parameters()).device
        llm._assemble(model, tokenizer, backend)
        return llm

    def _assemble(self, model: CausalLM, tokenizer: Tokenizer, backend: str) -> None:
        config = model.config
        if backend == "cpu" and self.device.type != "cpu":
            raise BackendUnavailableError(f"Backend 'cpu' runs on the CPU, but the model is on {self.device}.")
        self.backend = backend
        set_backend(model, backend)
        if backend in (AUTO, "cpu"):
            fused.fuse(model)
        _check_fit(tokenizer, config)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        # Scaled RoPE stretches the context that the model was trained on.
        self.context_length = int(config.max_position_embeddings * config.rope.factor)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete one prompt or several (texts, or lists of ids), together in one batch.

        A batch gives each prompt the text that it would get alone. Raises `UserError` for an empty prompt,
        ids outside the vocabulary, or a prompt that leaves no room in the context.
        """
        batch = self._as_batch(prompts)
        all_params = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(all_params) != len(batch):
            raise UserError(f"{len(all_params)} sampling parameters were given for {len(batch)} prompts.")
        requests = [self._request(prompt, p) for prompt, p in zip(batch, all_params, strict=True)]
        streams = [TextStream(self.tokenizer, request.params.stop) for request in requests]
        for _ in self._run(requests, streams, Statistics()):
            pass
        return [_completion(request, stream) for request, stream in zip(requests, streams, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Complete one prompt, piece by piece. Errors are those of `generate`, raised at once."""
        request = self._request(prompt, params or SamplingParams())
        return Stream(self, request)

    # ---- the inner loop ----

    @torch.inference_mode()
    def _run(
        self, requests: list[Request], streams: list[TextStream], statistics: Statistics
    ) -> Iterator[tuple[int, str]]:
        """Generate until every request has finished, yielding (request number, new text)."""
        if not requests:
            return
        samplers = [Sampler(request.params, self.tokenizer.vocab_size) for request in requests]
        started = time.perf_counter()
        capacity = max(len(request.prompt_ids) + request.limit for request in requests)
        cache = KVCache(
            self.config,
            len(requests),
            capacity,
            dtype=default_cache_dtype(self.model),
            device=self.device,
            backend=self.backend,
        )
        logits = prefill(self.model, cache, [request.prompt_ids for request in requests])
        statistics.prompt_tokens += sum(len(request.prompt_ids) for request in requests)
        statistics.prefill_seconds += time.perf_counter() - started
        yield from self._steps(requests, streams, statistics, samplers, cache, logits)

    def _steps(
        self,
        requests: list[Request],
        streams: list[TextStream],
        statistics: Statistics,
        samplers: list[Sampler],
        cache: KVCache,
        logits: Tensor,
    ) -> Iterator[tuple[int, str]]:
        """Choose and decode until every request has finished. `logits` (B, V) are those after the prompts."""
        active = list(range(len(requests)))
        first = True
        while active:
            started = time.perf_counter()
            pieces: list[tuple[int, str]] = []
            for row, number in enumerate(active):
                request, stream = requests[number], streams[number]
                token_id = samplers[number].choose(logits[row], request.prompt_ids + request.token_ids)
                request.token_ids.append(token_id)
                statistics.new_tokens += 1
                statistics.decode_tokens += not first
                text = self._accept(request, stream, token_id)
                if text:
                    pieces.append((number, text))
            first = False
            statistics.decode_seconds += time.perf_counter() - started
            yield from pieces  # what the reader does with them is not our time
            started = time.perf_counter()
            unfinished = [row for row, number in enumerate(active) if requests[number].finish_reason is None]
            if len(unfinished) < len(active):
                active = [active[row] for row in unfinished]
                if active:
                    cache.keep(unfinished)
            if active:
                logits = self._decode([requests[number].token_ids[-1] for number in active], cache)
            statistics.decode_seconds += time.perf_counter() - started

    def _accept(self, request: Request, stream: TextStream, token_id: int) -> str:
        """Add a chosen id to its text and decide whether the request has finished."""
        if token_id in self.tokenizer.eos_ids and not request.params.ignore_eos:
            request.finish_reason = "eos"
            return stream.finish()
        text = stream.add(token_id)
        if stream.stopped:
            request.finish_reason = "stop"
        elif len(request.token_ids) >= request.limit:
            request.finish_reason = "length"
            text += stream.finish()
        return text

    def _decode(self, token_ids: list[int], cache: KVCache) -> Tensor:
        """One new id of each sequence through the network -> logits (B, V)."""
        positions_B = torch.tensor(cache.lengths, device=self.device)
        cache.start_decode()
        ids_B = torch.tensor(token_ids, device=self.device)
        logits_BV = self.model.step(ids_B, positions_B, cache.attend_decode, positions_B + 1)
        cache.advance([1] * len(token_ids))
        return logits_BV

    # ---- checking what the caller gave ----

    def _as_batch(self, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str):
            return [prompts]
        if prompts and all(isinstance(item, int) for item in prompts):
            return [prompts]  # type: ignore[list-item]
        return list(prompts)  # type: ignore[arg-type]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise UserError("The prompt is empty; give at least one character.")
        foreign = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if foreign:
            raise UserError(
                f"The prompt holds the id {foreign[0]}, outside the vocabulary of {self.config.vocab_size}."
            )
        room = self.context_length - len(ids)
        if room < 1:
            raise UserError(
                f"The prompt has {len(ids)} tokens, but the model's context ends at {self.context_length}; shorten it."
            )
        if params.max_new_tokens > room:
            log.warning(
                "only %d of %d new tokens fit the context of %d", room, params.max_new_tokens, self.context_length
            )
        return Request(ids, params, min(params.max_new_tokens, room))


class Stream:
    """An iterator over the pieces of one text; `statistics` fills as it goes, `completion` is there at its end."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self.statistics = Statistics()
        self.completion: Completion | None = None
        self._request = request
        self._text = TextStream(llm.tokenizer, request.params.stop)
        self._pieces = llm._run([request], [self._text], self.statistics)

    def __iter__(self) -> Iterator[str]:
        for _, piece in self._pieces:
            yield piece
        self.completion = _completion(self._request, self._text)


def _completion(request: Request, stream: TextStream) -> Completion:
    assert request.finish_reason is not None
    return Completion(stream.text, request.token_ids, request.finish_reason, len(request.prompt_ids))


def _check_fit(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """A tokenizer may have fewer ids than the model has rows, which are then padding, but never more."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model only {config.vocab_size}; "
            "they do not belong together."
        )


def _generation_eos(folder: Path) -> tuple[int, ...]:
    """EOS ids of generation_config.json, which may be more than the model's own."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a JSON object ({error}).") from None
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, list) and all(isinstance(i, int) for i in value) else ()
