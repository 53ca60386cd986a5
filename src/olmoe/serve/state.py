"""What all endpoints share: the engine behind its thread, the tokenizer, settings, metrics, and work off the loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from olmoe.engine.bad_words import BadWords
from olmoe.engine.request import Delta, Request
from olmoe.errors import UserError, shown
from olmoe.serve.errors import ApiError, from_user_error, invalid, overloaded
from olmoe.serve.mailbox import Hub
from olmoe.serve.metrics import Metrics

if TYPE_CHECKING:
    from olmoe.config import ModelConfig
    from olmoe.engine.engine import Engine
    from olmoe.engine.sampling_params import Grammar, SamplingParams
    from olmoe.engine.thread import EngineThread
    from olmoe.serve.protocol import Body
    from olmoe.tokenizer import Tokenizer

T = TypeVar("T")

# Threads for tokenizing and chat templates: few, since they compete with the engine for cores.
_WORKERS = 2


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How the server behaves towards its clients.

    - `api_keys`: any of these gives access; without keys, everybody has it. `cors_origins`: other origins whose pages
      may call, "*" for all; none by default. `ssl_certfile`, `ssl_keyfile`: TLS.
    - `max_queued_requests`, `max_queued_tokens`: how much may wait for the engine; more is answered with 503.
    - `max_body_bytes`: the largest request. `body_timeout`: seconds that a client may pause while it sends one.
    - `keep_alive`: seconds after which a silent stream gets a comment. `stall_timeout`: seconds that a client may stop
      reading its stream before it counts as gone.
    - `share_prefixes`: one prefix cache for all keys. Otherwise each key has its own, since the time to the first token
      reveals whether somebody has sent the same prompt before.
    - `allowed_hosts`: names that requests may use, besides localhost and addresses (`olmoe.serve.hosts`); empty allows
      any.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    max_queued_requests: int = 512
    max_queued_tokens: int = 2**20
    max_body_bytes: int = 32 * 2**20
    body_timeout: float = 60.0
    keep_alive: float = 15.0
    stall_timeout: float = 120.0
    share_prefixes: bool = False
    access_log: bool = False
    allowed_hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class CallContext:
    """What an endpoint knows about its caller.

    `salt` separates the prefix caches of different keys, `owner` what is stored for them: a digest of the key, or "".
    """

    salt: str = ""
    owner: str = ""


@dataclass
class ServerState:
    """What is passed to every endpoint. Made by `make_state`; belongs to one event loop."""

    engine: Engine
    thread: EngineThread
    tokenizer: Tokenizer
    model_name: str
    settings: ServeSettings
    mailbox: Hub
    metrics: Metrics
    executor: ThreadPoolExecutor
    compiler: ThreadPoolExecutor  # for grammars, which may take a second: no tokens wait for them
    config: ModelConfig
    context_length: int
    created: int = field(default_factory=lambda: int(time.time()))
    aliases: tuple[str, ...] = ()  # further names
    draining: bool = False
    calls: int = 0  # requests over HTTP that are being answered
    responses: Any = None  # `olmoe.serve.responses` keeps what it stores here

    # ---- work off the loop ----

    async def off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run something slow in a thread. A `UserError` becomes an `ApiError`."""
        return await _in_thread(self.executor, function, *arguments)

    async def compiled(self, function: Callable[..., T], *arguments: Any) -> T:
        """The same, for compiling a grammar."""
        return await _in_thread(self.compiler, function, *arguments)

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts. `encode_batch` releases the interpreter's lock, so that other threads run meanwhile."""
        return await self.off_loop(self.tokenizer.encode_batch, texts)

    def check_length(self, text: str, param: str) -> None:
        """Raise `ApiError` (400) for a text that is far longer than the context, before it is tokenized.

        Not for the event loop, although it takes no longer than a text that fits.
        """
        tokens = self.tokenizer.certain_tokens(text, self.context_length)
        if tokens is not None:
            raise invalid(
                f"The prompt has more than {tokens} tokens, but the model's context ends at {self.context_length}; "
                "shorten it.",
                param,
            )

    async def grammar(self, body: Body, constraint: Any = None) -> Grammar | None:
        """The compiled grammar of a request whose text must have a certain form, or must not contain some words."""
        from olmoe.serve import structured

        compiled = await structured.grammar(self, body, constraint)
        if not body.bad_words:
            return compiled
        without: BadWords = await self.compiled(BadWords.of_words, body.bad_words, self.tokenizer, compiled)
        return without

    # ---- generating ----

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` (404) for a model that is not served; no name means the one that is."""
        if name not in (None, "", self.model_name, *self.aliases):
            raise ApiError(
                404, f"There is no model {shown(name)}; this server has {self.model_name}.", param="model",
                code="model_not_found",
            )  # fmt: skip

    def cut(self, body: Body, ids: list[int]) -> list[int]:
        """The last tokens of a prompt, as many as the request wants to keep; -1 means as many as fit."""
        keep = body.truncate_prompt_tokens
        if keep is None:
            return ids
        keep = self.context_length - (body.limit or 1) if keep == -1 else keep
        if keep < 1:
            raise invalid(f"truncate_prompt_tokens leaves {keep} tokens of the prompt.", "truncate_prompt_tokens")
        return ids[-keep:]

    def request(
        self, prompt_ids: list[int], params: SamplingParams, *, param: str, priority: int = 0, salt: str = ""
    ) -> Request:
        """A request for the engine. Raises `ApiError` (400) if it can never run; `param` is the field of the prompt."""
        try:
            return self.engine.request(prompt_ids, params, priority=priority, cache_salt=salt)
        except UserError as error:
            found = from_user_error(error)
            raise found if found.param else from_user_error(error, param) from None

    def check_open(self) -> None:
        """Raise `ApiError` (503) if no work is accepted: a full queue, a shutdown, or a failed engine."""
        if self.draining:
            raise overloaded("The server is shutting down; send the request to another.", 5)
        if self.thread.failed is not None:
            raise ApiError(503, "The engine has stopped after an error; the server must be restarted.", "api_error")
        queued = self.mailbox.queued()[0]
        if queued >= self.settings.max_queued_requests:
            self.metrics.rejected("queue_requests")
            raise overloaded(f"The queue has no room ({queued} waiting); try again later.")

    def admit(self, requests: Sequence[Request]) -> None:
        """Raise `ApiError` if the queue has no room: 503, or 400 for a call that would not fit an empty queue."""
        settings, (queued, tokens) = self.settings, self.mailbox.queued()
        if len(requests) > settings.max_queued_requests:
            raise invalid(
                f"One call asks for {len(requests)} texts, but only {settings.max_queued_requests} may wait; split it.",
                "prompt",
            )
        if queued + len(requests) > settings.max_queued_requests:
            self.metrics.rejected("queue_requests")
            raise overloaded(f"The queue has no room ({queued} waiting); try again later.")
        new = sum(len(request.prompt_ids) for request in requests)
        if queued and tokens + new > settings.max_queued_tokens:
            self.metrics.rejected("queue_tokens")
            raise overloaded(f"Prompts of {tokens} tokens wait already; try again later.")

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Delta], None]:
        """Run requests that `admit` has let in, and yield (index, delta) until all have finished.

        Closing the iterator early, by `aclose` or by cancellation, aborts what has not finished.
        """
        box = self.mailbox.open(requests)
        try:
            now = time.perf_counter()
            for request in requests:
                request.times.arrived = request.times.arrived or now
            self.thread.submit(requests)
            while box.unfinished:
                for item in await box.take():
                    yield item
        finally:
            unfinished = self.mailbox.close(box)
            if unfinished:
                self.thread.abort(unfinished)

    def check_end(self, reason: str, error: str | None) -> None:
        """Raise `ApiError` for a text that failed, or that the server ended."""
        if reason == "cancelled":
            raise overloaded("The server is shutting down, so the answer is incomplete.", 5)
        if reason == "error":
            status = 400 if self.thread.failed is None else 503
            raise ApiError(status, error or "The text could not be generated.", "api_error" if status == 503 else None)

    def abort_all(self) -> None:
        """End everything that runs or waits, and tell its readers."""
        self.thread.abort(self.mailbox.requests)

    def close(self) -> None:
        """End the engine's thread and the workers."""
        self.thread.close()
        with contextlib.suppress(RuntimeError):
            self.executor.shutdown(wait=False, cancel_futures=True)
            self.compiler.shutdown(wait=False, cancel_futures=True)


async def _in_thread(executor: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    except UserError as error:
        raise from_user_error(error) from None


def make_state(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    config: ModelConfig,
    context_length: int,
    settings: ServeSettings | None = None,
    aliases: Sequence[str] = (),
) -> ServerState:
    """The state of a server over an engine, whose thread it starts."""
    from olmoe.engine.thread import EngineThread

    metrics = Metrics(engine, model_name)
    hub = Hub(metrics.observe)
    thread = EngineThread(engine, hub.deliver)
    thread.start()
    return ServerState(
        engine,
        thread,
        tokenizer,
        model_name,
        settings or ServeSettings(),
        hub,
        metrics,
        ThreadPoolExecutor(_WORKERS, thread_name_prefix="olmoe-serve"),
        ThreadPoolExecutor(1, thread_name_prefix="olmoe-grammars"),
        config,
        context_length,
        aliases=tuple(aliases),
    )
