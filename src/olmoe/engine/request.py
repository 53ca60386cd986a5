"""A prompt in progress, what is reported about it after each step, and what a caller gets back. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from olmoe.runner.policy import ResolvedPolicy

FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]


class Routing(NamedTuple):
    """The experts that a token chose in each layer, ids (L, K), -1 for none, and their weights (L, K)."""

    expert_ids: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenLogprob:
    """How probable a generated token was: `logprob` is the natural logarithm of its probability.

    `top` maps the ids of the likeliest tokens at its position to log-probabilities, by falling probability, as many as
    `SamplingParams.logprobs` asks for. All are the model's own: before temperature, penalties and filters.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass
class Timings:
    """Wall-clock seconds of one text: waiting for texts before it, its prompt, its tokens.

    Prompts that ran through the network together share one `prefill_seconds`. Time that the reader of a stream spends
    on the text is not counted.
    """

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def total_seconds(self) -> float:
        """The sum of the three."""
        return self.queue_seconds + self.prefill_seconds + self.decode_seconds


@dataclass
class Completion:
    """One text, with what it took to generate.

    `token_ids` are all generated ids, a final EOS included; `text` ends before any stop string. `finish_reason` is
    "eos" (the model ended the text), "stop" (a stop string or id), "length" (`max_new_tokens`, or the end of the
    context) or "cancelled" (its stream was closed). `logprobs` and `routing`, if requested, have an entry for each of
    `token_ids`, and `prompt_logprobs` one for each token of the prompt, None for the first. Timings do not count when
    completions are compared.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None
    timings: Timings = field(default_factory=Timings, compare=False)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    routing: list[Routing] | None = field(default=None, compare=False)
    prompt_routing: list[Routing] | None = field(default=None, compare=False)


@dataclass
class Statistics:
    """What one call took: tokens and wall-clock seconds, for prompt processing and generation separately."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_tokens: int = 0  # new tokens, minus the first of each text, which prefill yields
    decode_seconds: float = 0.0
    finished: int = 0  # texts

    def count(self, prompt_tokens: int, step_tokens: int, seconds: float, news: Sequence[Delta]) -> None:
        """Add a step of `prompt_tokens` among `step_tokens`; its seconds are divided in proportion."""
        share = prompt_tokens / step_tokens if step_tokens else 1.0
        self.prompt_tokens += prompt_tokens
        self.prefill_seconds += seconds * share
        self.decode_seconds += seconds * (1.0 - share)
        for delta in news:
            self.new_tokens += len(delta.token_ids)
            self.decode_tokens += len(delta.token_ids) - (delta.request.token_ids == delta.token_ids)
            self.finished += delta.finish_reason is not None


@dataclass
class Times:
    """When things happened to a request, by `time.perf_counter`; 0 for what has not happened yet."""

    arrived: float = 0.0
    scheduled: float = 0.0  # its first tokens ran through the network
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(eq=False)  # two requests are never the same, even if they look alike
class Request:
    """A prompt in progress: its ids, its parameters, and what has been generated.

    Requests of a lower `priority` number go first; `cache_salt` keeps the prefix cache of its owner apart.
    """

    prompt_ids: list[int]
    params: SamplingParams
    limit: int  # most tokens to generate, within the model's context
    where: str = ""  # its index in the batch, for messages, as `in_batch` takes it
    priority: int = 0
    cache_salt: str = ""
    policy: ResolvedPolicy | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_routing: list[Routing] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt, whose keys and values were in the prefix cache
    finish_reason: FinishReason | None = None
    error: str | None = None  # why it finished with "error", in a sentence
    stop: str | int | None = None  # the stop string or id that ended it
    timings: Timings = field(default_factory=Timings)
    times: Times = field(default_factory=Times)

    @property
    def most_tokens(self) -> int:
        """How long the sequence can grow, its prompt included."""
        return len(self.prompt_ids) + self.limit

    def completion(self) -> Completion:
        """Its result; "cancelled" if it has not finished."""
        params = self.params
        return Completion(
            self.text,
            list(self.token_ids),
            self.finish_reason or "cancelled",
            len(self.prompt_ids),
            None if params.logprobs is None else list(self.logprobs),
            self.timings,
            None if params.prompt_logprobs is None else list(self.prompt_logprobs),
            list(self.routing) if params.routing else None,
            list(self.prompt_routing) if params.prompt_routing else None,
        )


class Delta(NamedTuple):
    """News of one request after a step of the engine: the last one has a `finish_reason`.

    `text` is what has become certain; `token_ids`, with `logprobs` and `routing` for each if requested, are the
    tokens chosen. `error` is the sentence that goes with the finish reason "error".
    """

    request: Request
    text: str = ""
    token_ids: list[int] = []  # noqa: RUF012
    logprobs: list[TokenLogprob] = []  # noqa: RUF012
    routing: list[Routing] = []  # noqa: RUF012
    finish_reason: FinishReason | None = None
    error: str | None = None


def in_batch(error: UserError, where: str) -> UserError:
    """The same error, saying in which of several prompts: `where` is "prompts[3]", or empty for a single one."""
    return type(error)(f"{str(error).rstrip('.')} ({where}).") if where else error
