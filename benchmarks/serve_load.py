"""Load for any server of OpenAI's `/v1/completions` on this machine, and what its clients see.

    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --tokenizer TOKENIZER.json --clients 8
    python benchmarks/serve_load.py ... --rate 2.5          # Poisson arrivals, whatever the server makes of them

Prompts are token ids of windows of a text, so that their lengths are exact and all are different but for a shared
prefix. The same seed sends the same. The client is lean, for it runs beside the server on the same cores, and reports
what it took itself: its CPU seconds, and how late its own loop was. Discard a run whose lag is near its gaps.

All by the client's clock: `ttft` from the request to the first text, `itl` between two chunks with text, `tpot` from
the first to the last over the tokens between them, `e2e` to the end of the answer. `steady` counts the tokens that came
in the middle 80 % of the run.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ipaddress
import json
import random
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokenizers import Tokenizer

TEXTS = Path(__file__).parent.parent / "src" / "olmoe" / "assets" / "text"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
# Bodies that no server should take, and none should fail at.
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": "x", "temperature": -1},
    {"prompt": [], "max_tokens": 4},
    {"prompt": [10**9], "max_tokens": 4},
    {"prompt": "x", "max_tokens": "many"},
    {"prompt": "x", "n": 0},
    {"prompt": {"not": "a prompt"}},
    {"prompt": "x", "logprobs": 10**6},
    {"max_tokens": 4},
)


@dataclass(eq=False)
class Call:
    """One request and what came of it; times are seconds since the run began."""

    body: dict[str, Any]
    kind: str = "plain"  # "cancel", "structured" and "bad" as well
    due: float = 0.0
    leave_after: int = 0  # chunks after which a cancelling client hangs up
    sent: float = 0.0
    ended: float = 0.0
    chunks: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    status: int = 0
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Generated, as the server counts them; as many as chunks where it did not say."""
        return int(self.usage.get("completion_tokens", len(self.chunks)))

    @property
    def good(self) -> bool:
        """Whether it was answered to its end."""
        return self.kind in ("plain", "structured") and self.error is None and self.finish is not None


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent. `clients` send one request after another; with a `rate`, requests come by themselves."""

    url: str
    requests: int
    clients: int = 1
    rate: float | None = None
    prompt_tokens: int = 128
    new_tokens: int = 64
    spread: float = 0.0  # 0.5: lengths evenly from half to one and a half
    shared_prefix: int = 0
    cancel: float = 0.0
    structured: float = 0.0
    bad: float = 0.0
    seed: int = 0
    seconds: float = 540.0  # no longer than this in all
    api_key: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def local(url: str) -> str:
    """The URL, if it leads to this machine and nowhere else."""
    host = urlsplit(url).hostname
    found = {info[4][0] for info in socket.getaddrinfo(host, None)} if host else set()
    if not found or not all(ipaddress.ip_address(str(address)).is_loopback for address in found):
        raise SystemExit(f"{url} is not on this machine, and load goes nowhere else.")
    return url.rstrip("/")


def token_ids(tokenizer: Path, text: Path = TEXTS) -> list[int]:
    """Ids of a text file, or of all in a folder."""
    files = [text] if text.is_file() else sorted(text.glob("**/*.txt"))
    whole = "\n".join(file.read_text(encoding="utf-8", errors="replace")[:2_000_000] for file in files)
    return list(Tokenizer.from_file(str(tokenizer)).encode(whole, add_special_tokens=False).ids)


def calls(load: Load, ids: list[int]) -> Iterator[Call]:
    """The requests of a load, in the order in which they are sent."""
    chance = random.Random(load.seed)
    longest = round(load.prompt_tokens * (1 + load.spread))
    if len(ids) < 2 * longest + load.shared_prefix:
        raise SystemExit(f"The text has only {len(ids)} tokens, too few for prompts of {longest}.")
    prefix, due = ids[: load.shared_prefix], 0.0
    for _ in range(load.requests):
        kind = _kind(chance.random(), load)
        length = _spread(chance, load.prompt_tokens, load.spread)
        own = max(1, length - len(prefix))
        start = chance.randrange(len(prefix), len(ids) - own)
        new = _spread(chance, load.new_tokens, load.spread)
        body: dict[str, Any] = {"prompt": prefix + ids[start : start + own], "max_tokens": new, "ignore_eos": True}
        leave_after = chance.randint(1, max(1, new // 2)) if kind == "cancel" else 0
        if kind == "structured":
            body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}}
            del body["ignore_eos"]
        if kind == "bad":
            body = dict(BAD[chance.randrange(len(BAD))])
        body = {"temperature": 0, **body, **load.extra}
        yield Call(body | {"stream": True, "stream_options": {"include_usage": True}}, kind, due, leave_after)
        due += chance.expovariate(load.rate) if load.rate else 0.0


def _kind(draw: float, load: Load) -> str:
    for kind in ("cancel", "structured", "bad"):
        share = getattr(load, kind)
        if draw < share:
            return kind
        draw -= share
    return "plain"


def _spread(chance: random.Random, number: int, spread: float) -> int:
    return max(1, round(number * chance.uniform(1 - spread, 1 + spread)))


# ---- one request ----


async def send(load: Load, call: Call, began: float) -> None:
    """Send a request over a connection of its own, read its answer, and note when what came."""
    where = urlsplit(load.url)
    call.sent = time.perf_counter() - began
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
        content = json.dumps(call.body).encode()
        key = f"Authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n{key}"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + content)
        await writer.drain()
        call.status, pieces = await _answer(reader)
        if call.status != 200:
            whole = b"".join([piece async for piece in pieces])
            call.error = f"HTTP {call.status}: {whole[:200].decode(errors='replace')}"
            return
        await _read(call, pieces, began)
    except (OSError, EOFError, ValueError) as error:
        call.error = f"{type(error).__name__}: {error}"[:200]
    finally:
        call.ended = time.perf_counter() - began
        if writer is not None:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, AsyncIterator[bytes]]:
    """The status of an HTTP answer, and the parts of its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(" ", 2)[1])
    return status, _chunks(reader) if "transfer-encoding: chunked" in head else _rest(reader)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0] or b"z", 16):  # a body cut short is no number
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(65536):
        yield piece


async def _read(call: Call, pieces: AsyncIterator[bytes], began: float) -> None:
    """Events of a stream, until its end or until the client has had enough."""
    buffer, done = b"", False
    async for piece in pieces:
        now = time.perf_counter() - began
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if event.get("error"):
                call.error = f"in the stream: {str(event['error'])[:200]}"
                return
            call.usage = event.get("usage") or call.usage
            for choice in event.get("choices") or ():
                if text := choice.get("text"):
                    call.chunks.append(now)
                    call.text += text
                call.finish = choice.get("finish_reason") or call.finish
        if call.leave_after and len(call.chunks) >= call.leave_after:
            return
    if not done or call.finish is None:
        call.error = "the stream ended without [DONE]" if not done else "there was no finish_reason"


# ---- all of them ----


async def run(load: Load, ids: list[int]) -> tuple[list[Call], float, list[float]]:
    """Send a load -> its calls, how long it took, and how late this loop was, sampled."""
    made, lags = list(calls(load, ids)), list[float]()
    began = time.perf_counter()
    watcher = asyncio.create_task(_watch(lags))
    try:
        async with asyncio.timeout(load.seconds):
            if load.rate:
                await asyncio.gather(*(_later(load, call, began) for call in made))
            else:
                waiting = collections.deque(made)
                await asyncio.gather(*(_client(load, waiting, began) for _ in range(load.clients)))
    except TimeoutError:
        for call in made:
            if call.sent and not call.ended:
                call.error = call.error or "it was not answered when the run ended"
    finally:
        watcher.cancel()
    return [call for call in made if call.sent], time.perf_counter() - began, lags


async def _client(load: Load, waiting: collections.deque[Call], began: float) -> None:
    while waiting:
        await send(load, waiting.popleft(), began)


async def _later(load: Load, call: Call, began: float) -> None:
    await asyncio.sleep(max(0.0, call.due - (time.perf_counter() - began)))
    await send(load, call, began)


async def _watch(lags: list[float], period: float = 0.02) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(period)
        lags.append(time.perf_counter() - before - period)


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Of times, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    at = {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in _QUANTILES.items()}
    return {name: round(1e3 * value, 2) for name, value in (at | {"mean": sum(ordered) / len(ordered)}).items()}


_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def valid(text: str) -> bool:
    """Whether a structured answer is what `SCHEMA` says."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict) and set(value) == {"name", "age"}
        and isinstance(value["name"], str) and isinstance(value["age"], int) and 0 <= value["age"] <= 99
    )  # fmt: skip


def faults(made: list[Call]) -> dict[str, int]:
    """What went wrong, by what it was. Refusing a bad request is right, and so is 503 where the queue is full."""
    found: collections.Counter[str] = collections.Counter()
    for call in made:
        if call.kind == "bad":
            if not 400 <= call.status < 500 and call.status != 503:
                found[f"a bad request was answered with {call.status}: {call.error or call.body}"[:160]] += 1
        elif call.error is not None and call.status != 503:
            found[call.error] += 1
        elif call.kind == "structured" and call.finish == "stop" and not valid(call.text):
            found["a structured answer does not fit its schema"] += 1
    return dict(found)


def report(load: Load, made: list[Call], seconds: float, lags: list[float]) -> dict[str, Any]:
    """The figures of a run."""
    good = [call for call in made if call.good]
    low, high = 0.1 * seconds, 0.9 * seconds
    steady = sum(
        call.tokens / len(call.chunks) * sum(low <= t < high for t in call.chunks) for call in made if call.chunks
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    details = [call.usage.get("prompt_tokens_details") or {} for call in good]
    plain = [call for call in good if call.kind == "plain"]
    return {
        "load": f"poisson {load.rate}/s" if load.rate else f"{load.clients} clients",
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "shared_prefix": load.shared_prefix,
        "requests": len(made),
        "kinds": dict(collections.Counter(call.kind for call in made)),
        "good": len(good),
        "refused": sum(call.status == 503 for call in made),
        "faults": faults(made),
        "wrong_length": sum(call.tokens != call.body["max_tokens"] for call in plain),
        "seconds": round(seconds, 3),
        "output_tok_per_s": round(sum(call.tokens for call in good) / seconds, 2),
        "steady_output_tok_per_s": round(steady / (high - low), 2),
        "cached_prompt_tokens": sum(each.get("cached_tokens") or 0 for each in details),
        "ttft_ms": quantiles([call.chunks[0] - call.sent for call in good if call.chunks]),
        "itl_ms": quantiles([b - a for call in good for a, b in zip(call.chunks, call.chunks[1:], strict=False)]),
        "tpot_ms": quantiles(
            [(call.chunks[-1] - call.chunks[0]) / (call.tokens - 1) for call in good if len(call.chunks) > 1]
        ),
        "e2e_ms": quantiles([call.ended - call.sent for call in good]),
        "sent_late_ms": quantiles([call.sent - call.due for call in made]) if load.rate else {},
        "client_cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "client_lag_ms": quantiles(lags),
    }


def main() -> None:
    """Send what the arguments say, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", type=local, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the served model")
    parser.add_argument("--text", type=Path, default=TEXTS, help="a text file, or a folder of them (the shipped texts)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rate", type=float, help="requests a second, instead of --clients")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--spread", type=float, default=0.0, help="0.5: lengths from half to one and a half")
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that begin every prompt")
    parser.add_argument("--cancel", type=float, default=0.0, help="share of clients that hang up within the answer")
    parser.add_argument("--structured", type=float, default=0.0, help="share of requests that want JSON of a schema")
    parser.add_argument("--bad", type=float, default=0.0, help="share of requests that no server should take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=540.0, help="end after so many (%(default)s)")
    parser.add_argument("--api-key")
    parser.add_argument("--extra", type=json.loads, default={}, help="more fields of all bodies, as JSON")
    parser.add_argument("--warm-up", type=int, default=1, help="requests before the clock starts (%(default)s)")
    arguments = vars(parser.parse_args())
    ids, warm_up = token_ids(arguments.pop("tokenizer"), arguments.pop("text")), arguments.pop("warm_up")
    load = Load(**arguments)

    async def everything() -> tuple[list[Call], float, list[float]]:
        if warm_up:
            # As long as the others, but none of their texts.
            first = Load(**arguments | {"requests": warm_up, "clients": 1, "rate": None, "seed": load.seed + 10**6})
            await run(first, ids)
        return await run(load, ids)

    with contextlib.suppress(KeyboardInterrupt):
        result = report(load, *asyncio.run(everything()))
        for name, value in result.items():
            print(f"{name:24} {value}", file=sys.stderr)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
