"""Endurance of `olmoe serve`: more load than it can take, for as long as you like, and nothing may be lost or grow.

    python benchmarks/serve_soak.py --minutes 60 [--model DIR]

The server runs with its messages going to a full disk. First its capacity is measured with clients that wait for their
answers; then requests come at random times at 110 % of it: answers of different lengths, of which clients leave 20 %
in the middle, 10 % want JSON of a schema, and 5 % are no valid requests. Their rate follows what the server got done in
the last half minute, so that it stays at 110 % where other programs take their share of the machine. Beside that,
clients in processes of their own are killed, and others stopped for 20 s and continued. Checked at the end:

    memory    resident anonymous memory stays within 2 % after the warm-up (10 minutes, or a sixth of the run)
    blocks    nothing runs or waits, and no block of the cache is in use
    answers   every request was answered, refused with 503, or left by its own client; bad ones got a 4xx
    order     how often a request got its first token after one that was sent more than a second later

Prints a line a minute, and ends with one line of JSON; exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import machine
from serve_load import Call, Load, calls, faults, quantiles, run, send, token_ids

from serve import Server, start_ours

RESULTS = Path(__file__).parent / "results" / "serve_soak.jsonl"
CLIENT = Path(__file__).with_name("serve_load.py")
CAPACITY_CLIENTS, SAMPLE_SECONDS, STOPPED_SECONDS = 24, 5.0, 20.0
GROWTH, OVERTAKEN_SECONDS = 0.02, 1.0
OFFERED, RATE_SECONDS, LEAST_RATE = 1.1, 30.0, 5.0


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no file backs."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def gauges(server: Server) -> dict[str, float]:
    """What its metrics say about work and blocks."""
    wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    lines = server.get("/metrics").splitlines()
    return {name: float(line.rsplit(" ", 1)[1]) for name in wanted for line in lines if line.startswith(name)}


class Tally:
    """What became of the requests of the main load, without keeping them."""

    def __init__(self) -> None:
        self.sent: collections.Counter[str] = collections.Counter()
        self.ends: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.tokens = 0
        self.first: list[tuple[float, float]] = []  # (sent, first text), of answers that came

    def add(self, call: Call) -> None:
        """One that has ended."""
        self.sent[call.kind] += 1
        self.faults.update(faults([call]))
        self.tokens += call.tokens
        if call.status == 503:
            self.ends["refused"] += 1
        elif call.good:
            self.ends["answered"] += 1
        elif call.kind == "cancel" and call.error is None:
            self.ends["left"] += 1
        elif call.kind == "bad" and 400 <= call.status < 500:
            self.ends["rejected"] += 1
        else:
            self.ends["lost"] += 1
        if call.chunks:
            self.first.append((call.sent, call.chunks[0]))

    def overtaken(self) -> dict[str, float]:
        """How many got their first text after one sent later, and by how much at most."""
        order = sorted(self.first)
        earliest, gaps, later = float("inf"), [], len(order)
        for sent, came in reversed(order):
            while later and order[later - 1][0] > sent + OVERTAKEN_SECONDS:
                later -= 1
                earliest = min(earliest, order[later][1])
            if came > earliest:
                gaps.append(came - earliest)
        share = len(gaps) / max(1, len(order))
        return {"share": round(share, 5), "p50_s": round(statistics.median(gaps), 3) if gaps else 0.0,
                "most_s": round(max(gaps, default=0.0), 3)}  # fmt: skip


class Rate:
    """How many requests a second are sent: a little more than the server gets done.

    Below its capacity all that is sent gets done, so that the rate grows until some is refused.
    """

    def __init__(self, tally: Tally, capacity: float) -> None:
        self.now = OFFERED * capacity
        self.all: list[float] = []  # of each half minute
        self._tally, self._done, self._since = tally, 0, time.perf_counter()

    def follow(self) -> None:
        """Look at what has been done, if it is time to."""
        if (took := time.perf_counter() - self._since) >= RATE_SECONDS:
            done = sum(self._tally.ends.values()) - self._tally.ends["refused"]
            self.all.append(self.now)
            self.now = max(LEAST_RATE, OFFERED * (done - self._done) / took)
            self._done, self._since = done, time.perf_counter()


async def offer(load: Load, ids: list[int], tally: Tally, rate: Rate, seconds: float) -> None:
    """Requests at random times for so long, then the answers to those that are there."""
    began, open_, chance = time.perf_counter(), set[asyncio.Task[None]](), random.Random(load.seed)
    due = 0.0
    for call in calls(load, ids):
        rate.follow()
        due = max(due, time.perf_counter() - began - 1.0) + chance.expovariate(rate.now)
        if due > seconds:
            break
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))

        async def one(call: Call = call) -> None:
            await send(load, call, began)
            tally.add(call)

        task = asyncio.create_task(one())
        open_.add(task)
        task.add_done_callback(open_.discard)
    if open_:
        await asyncio.wait(open_, timeout=600)
    for task in open_:
        task.cancel()
        tally.ends["lost"] += 1
        tally.faults["it was not answered within ten minutes"] += 1


async def watch(server: Server, samples: list[tuple[float, int]], tally: Tally) -> None:
    """Memory, now and then; a line a minute."""
    began, said = time.perf_counter(), 0
    while True:
        now = time.perf_counter() - began
        samples.append((now, anonymous_bytes(server.pid)))
        if now >= 60 * said:
            megabytes = samples[-1][1] / 1e6
            print(f"{now / 60:5.1f} min: {megabytes:.1f} MB, {dict(tally.ends)}, {dict(tally.faults)}", flush=True)
            said += 1
        await asyncio.sleep(SAMPLE_SECONDS)


async def disturb(url: str, tokenizer: Path, load: Load, counts: collections.Counter[str]) -> None:
    """Clients in other processes, killed in the middle or stopped for a while, in turn."""
    chance, number = random.Random(load.seed), 0
    while True:
        await asyncio.sleep(chance.uniform(2, 10))
        command = [sys.executable, str(CLIENT), "--url", url, "--tokenizer", str(tokenizer), "--requests", "12"]
        command += ["--clients", "4", "--warm-up", "0", "--seed", str(10_000 + number)]
        command += ["--prompt-tokens", str(load.prompt_tokens), "--new-tokens", str(load.new_tokens)]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )  # fmt: skip
        try:
            await asyncio.sleep(chance.uniform(1.0, 4.0))
            if process.returncode is not None:
                counts["ended before"] += 1
            elif number % 2:
                process.kill()
                counts["killed"] += 1
            else:
                process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(STOPPED_SECONDS)
                process.send_signal(signal.SIGCONT)
                counts["stopped"] += 1
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode == 0 and json.loads(output)["faults"]:
            counts["stopped clients with faults"] += 1
            print(f"a client that was stopped: {json.loads(output)['faults']}", flush=True)
        number += 1


async def soak(server: Server, tokenizer: Path, load: Load, seconds: float) -> dict[str, Any]:
    """All of it -> the figures."""
    ids = token_ids(tokenizer)
    before = replace(load, rate=None, clients=CAPACITY_CLIENTS, requests=10**4, seed=load.seed + 1)
    made, took, _ = await run(replace(before, seconds=min(30.0, seconds / 4)), ids)
    capacity = sum(call.ended > 0 for call in made) / took
    print(f"capacity: {capacity:.2f} requests a second, {CAPACITY_CLIENTS} clients at a time", flush=True)
    tally, samples, counts = Tally(), list[tuple[float, int]](), collections.Counter[str]()
    rate = Rate(tally, capacity)
    offered = replace(load, requests=10**9)
    watcher = asyncio.create_task(watch(server, samples, tally))
    disturber = asyncio.create_task(disturb(load.url, tokenizer, load, counts))
    try:
        await offer(offered, ids, tally, rate, seconds)
    finally:
        for task in (watcher, disturber):
            task.cancel()
        await asyncio.gather(watcher, disturber, return_exceptions=True)
    left = gauges(server)
    for _ in range(100):
        if not any(left.values()):
            break
        await asyncio.sleep(0.2)
        left = gauges(server)
    warm = min(600.0, seconds / 6)
    after = [size for at, size in samples if warm <= at <= seconds]
    part = max(1, len(after) // 10)
    start, end = statistics.median(after[:part]), statistics.median(after[-part:])
    return {
        "seconds": round(seconds, 1),
        "capacity_requests_per_s": round(capacity, 2),
        "offered_requests_per_s": {"least": round(min(rate.all), 2), "mean": round(statistics.fmean(rate.all), 2),
                                   "most": round(max(rate.all), 2)},
        "sent": dict(tally.sent),
        "ends": dict(tally.ends),
        "faults": dict(tally.faults),
        "output_tok_per_s": round(tally.tokens / seconds, 1),
        "ttft_ms": quantiles([came - sent for sent, came in tally.first]),
        "clients_besides": dict(counts),
        "memory_mb": {"after_warm_up": round(start / 1e6, 1), "at_the_end": round(end / 1e6, 1),
                      "most": round(max(after) / 1e6, 1), "least": round(min(after) / 1e6, 1)},
        "memory_growth": round(end / start - 1, 4),
        "left_over": left,
        "overtaken": tally.overtaken(),
    }  # fmt: skip


def checks(result: dict[str, Any]) -> dict[str, bool]:
    """What must hold."""
    return {
        "memory": abs(result["memory_growth"]) <= GROWTH,
        "blocks": len(result["left_over"]) == 3 and not any(result["left_over"].values()),
        "answers": not result["faults"] and not result["ends"].get("lost")
        and not result["clients_besides"].get("stopped clients with faults"),
        "order": result["overtaken"]["share"] <= 0.01,
    }  # fmt: skip


def main() -> None:
    """Run, check, print."""
    from olmoe.io.hub import SHIPPED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", type=Path, default=SHIPPED, metavar="DIR", help="a checkpoint (the shipped one)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--options", default="--cache-mib 256", help="more options of olmoe serve (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default=str(RESULTS), metavar="FILE", help="where the line is added; - nowhere")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with this
    if arguments.minutes * 60 < 60:
        parser.error("it takes a minute to see anything; give --minutes of at least 1")
    log = Path("/dev/full") if Path("/dev/full").exists() else Path(os.devnull)
    with log.open("w", encoding="utf-8") as full:
        server = start_ours(arguments.model, arguments.threads, arguments.options.split(), full)
        try:
            load = Load(
                url=server.url, requests=0, prompt_tokens=arguments.prompt_tokens, new_tokens=arguments.new_tokens,
                spread=0.5, cancel=0.2, structured=0.1, bad=0.05, seed=arguments.seed, seconds=10**6,
            )  # fmt: skip
            result = asyncio.run(soak(server, arguments.model / "tokenizer.json", load, 60 * arguments.minutes))
        finally:
            server.close()
    passed = checks(result)
    line = {"benchmark": "serve_soak", "model": arguments.model.name} | result | {"passed": passed} | machine()
    if arguments.results != "-":
        with open(arguments.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    sys.exit(0 if all(passed.values()) else 1)


if __name__ == "__main__":
    main()
