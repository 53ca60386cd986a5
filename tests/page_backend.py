"""A server that speaks the wire of `olmoe serve` without a model, to test the page: prompts say what it answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from olmoe.serve.static_page import page_routes

LAYERS, EXPERTS, PER_TOKEN = 4, 64, 8
WORDS = "fox moon river stone winter lamp garden song letter cloud small old bright quiet".split()
MARKDOWN = """# Of foxes

A **bold** fox, an *italic* one and `code`; a [link](https://example.org/a "title").

- one
  - nested
- two

1. first
2. second

> quoted

```python
def reverse(items: list[int]) -> list[int]:
    return items[::-1]
```

| fox | age |
| --- | ---: |
| red | 3 |
"""
ATTACK = """<img src=x onerror="window.attacked = 1"> <script>window.attacked = 2</script>

[one](javascript:window.attacked=3) [two](  java&#10;script:window.attacked=4)
[three](data:text/html,<script>1</script>)
![picture](https://attacker.example/pixel.png) <javascript:window.attacked=5> [four](vbscript:x) [five](/v1/models)

```html
<img src=y onerror="window.attacked = 6">
```

| <b onclick="window.attacked = 7">a</b> | b |
| --- | --- |
| <iframe src="https://attacker.example"></iframe> | [six](JaVaScRiPt:window.attacked=8) |
"""
EMOJI = "Ein Füchschen 🦊 sagt grüß"  # characters of several tokens


def number(*what: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4], "little")


def words(body: dict[str, Any], count: int = 24) -> str:
    """A text that depends on the seed, and after three words on the router policy."""
    policy = json.dumps(body.get("router_policy"), sort_keys=True)
    chosen = (
        WORDS[number(body.get("seed"), i, policy if i in (3, 7) or i > 20 else "") % len(WORDS)] for i in range(count)
    )
    return " ".join(chosen).capitalize() + "."


def said(prompt: str, body: dict[str, Any]) -> list[bytes]:
    """The tokens of the answer."""
    if prompt.startswith("emoji"):
        return [EMOJI.encode()[i : i + 3] for i in range(0, len(EMOJI.encode()), 3)]
    text = MARKDOWN if prompt.startswith("markdown") else ATTACK if prompt.startswith("attack") else words(body)
    if prompt.startswith("slow"):
        text = words(body, 4000)  # more than any test waits for
    return [piece.encode() for piece in re.findall(r" ?[A-Za-z]+|[^\S\n]+|\n|[^\sA-Za-z]", text)]


def routing(tokens: list[bytes], body: dict[str, Any], at: int) -> dict[str, Any]:
    """Eight distinct experts a layer for each token, none that is banned; weights fall."""
    policy = body.get("router_policy") or {}
    banned = {(ban.get("layer"), ban["expert"]) for ban in policy.get("ban", [])}
    k = policy.get("k", PER_TOKEN)
    experts = np.full((len(tokens), LAYERS, PER_TOKEN), 255, np.uint8)
    for t, token in enumerate(tokens):
        for layer in range(LAYERS):
            order = sorted(range(EXPERTS), key=lambda e: number(token, at + t, layer, e) + 2**31 * (e % 5 != 0))
            left = [e for e in order if (layer, e) not in banned and (None, e) not in banned]
            experts[t, layer, :k] = left[:k]
    weights = np.broadcast_to(np.float16(0.4) / np.arange(1, PER_TOKEN + 1, dtype=np.float16), experts.shape)
    return {
        "tokens": len(tokens), "layers": LAYERS, "k": PER_TOKEN, "dtype": "uint8",
        "experts": base64.b64encode(experts.tobytes()).decode(),
        "weights": base64.b64encode(weights.astype("<f2").tobytes()).decode(),
    }  # fmt: skip


def token_id(token: bytes) -> int:
    return number(token) % 4096


def chunk_of(tokens: list[bytes], text: str, body: dict[str, Any], *, at: int, chat: bool, finish: str | None) -> Any:
    shown = [token.decode("utf-8", "replace") for token in tokens]
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "token_ids": [token_id(token) for token in tokens]}
    if body.get("routing") and tokens:
        choice["routing"] = routing(tokens, body, at)
    if chat:
        choice["delta"] = {"content": text}
        choice["logprobs"] = {
            "content": [
                {"token": word, "bytes": list(token), "logprob": -0.5,
                 "top_logprobs": [{"token": word, "logprob": -0.5}, {"token": " other", "logprob": -1.5}]}
                for word, token in zip(shown, tokens, strict=True)
            ]
        }  # fmt: skip
    else:
        choice["text"] = text
        choice["logprobs"] = {
            "tokens": shown, "token_logprobs": [-0.5] * len(shown),
            "top_logprobs": [{word: -0.5, " other": -1.5} for word in shown], "text_offset": [0] * len(shown),
        }  # fmt: skip
    return {"id": "x", "object": "chunk", "created": 1, "model": "fake", "choices": [choice]}


class Backend:
    """The server: `bodies` are the requests that it got, `key` is what it wants.

    `begun` and `aborted` count streams and hang-ups.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.key: str | None = None
        self.keys: list[str | None] = []
        self.begun = self.aborted = 0
        self.without_routing = False
        self.app = Starlette(
            routes=[
                *page_routes(),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
            ]
        )

    def refused(self, request: Request) -> Response | None:
        given = request.headers.get("authorization")
        self.keys.append(given)
        if self.key is None or given == f"Bearer {self.key}":
            return None
        error = {
            "message": "This server wants an API key.",
            "type": "authentication_error",
            "param": None,
            "code": None,
        }
        return JSONResponse({"error": error}, 401)

    async def models(self, request: Request) -> Response:
        model: dict[str, Any] = {"id": "olmoe-tiny", "object": "model", "max_model_len": 512}
        if not self.without_routing:
            model["olmoe"] = {"layers": LAYERS, "experts": EXPERTS, "experts_per_token": PER_TOKEN}
        return self.refused(request) or JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        return await self.answer(request, body, body["messages"][-1]["content"], chat=True)

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        return await self.answer(request, body, body["prompt"], chat=False)

    async def answer(self, request: Request, body: dict[str, Any], prompt: str, *, chat: bool) -> Response:
        self.bodies.append(body)
        refused = self.refused(request)
        if refused is not None:
            return refused
        if prompt.startswith("invalid"):
            error = {
                "message": "`top_p` must be from 0 to 1, not 7.",
                "type": "invalid_request_error",
                "param": "top_p",
            }
            return JSONResponse({"error": error}, 400)
        if prompt.startswith("busy"):
            error = {"message": "64 requests are waiting already.", "type": "overloaded_error"}
            return JSONResponse({"error": error}, 503, {"Retry-After": "3"})
        return StreamingResponse(self.stream(body, prompt, chat=chat), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], prompt: str, *, chat: bool) -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        tokens = said(prompt, body)[: body.get("max_tokens", 1000)]
        decoded = b""
        sent = 0
        try:
            self.begun += 1
            if prompt.startswith("silent"):
                await asyncio.sleep(60)  # a long prompt, a long queue
            for at in range(0, len(tokens), 2):
                part = tokens[at : at + 2]
                decoded += b"".join(part)
                whole = decoded.decode("utf-8", "ignore")
                text, sent = whole[sent:], len(whole)
                yield self.event(chunk_of(part, text, body, at=at, chat=chat, finish=None))
                await asyncio.sleep(0.02 if prompt.startswith("slow") else 0.002)
                if at >= 6 and prompt.startswith("error"):
                    yield self.event(
                        {"error": {"message": "The engine stopped: out of memory.", "type": "server_error"}}
                    )
                    return
                if at >= 6 and prompt.startswith("drop"):
                    return
            finish = "length" if prompt.startswith("long") else "stop"
            yield self.event(chunk_of([b"<|endoftext|>"], "", body, at=len(tokens), chat=chat, finish=finish))
            usage = {"prompt_tokens": 5, "completion_tokens": len(tokens) + 1, "total_tokens": len(tokens) + 6}
            yield self.event({"id": "x", "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise

    @staticmethod
    def event(chunk: Any) -> bytes:
        return f"data: {json.dumps(chunk)}\r\n\r\n".encode()


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serves an application on a free port of this machine in a thread; yields its address."""
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        for _ in range(500):
            if server.started:
                break
            threading.Event().wait(0.02)
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
