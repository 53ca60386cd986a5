"""`olmoe serve` against llama.cpp's server on the released shapes, and against the bare runner below it.

    python benchmarks/serve.py --scratch DIR [--scenarios clients_8,prefix] [--rounds 3]

Weights are random (int4 as `olmoe quantize` makes it), written once to DIR with the released tokenizer, and once more
as a GGUF file of the same codes for llama.cpp; --model and --gguf name others. Both servers stay alive through a
scenario and get the same load in turn, in every round, from `serve_load.py` in a process of its own. Scenarios:

    clients_1, clients_8, clients_16    prompts of 128 tokens, answers of 64, so many clients
    prefix      8 clients whose prompts of 576 tokens share 512; llama.cpp without and with its prefix cache
    long        4 clients with prompts of 2048 tokens
    overhead    8 clients, against prefill and decoding steps of the bare runner for the same tokens
    tiny        the shipped olmoe-tiny, 16 clients; without a peer

Every ratio is the median over rounds. Prints the ceiling that memory sets first, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import busy_seconds, cpu_seconds, machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "serve.jsonl"
TOKENIZER = HERE.parent / "tests" / "data" / "olmoe-tokenizer.json.gz"
OURS, PEER, CACHED_PEER, BARE = "ours", "llama.cpp", "llama.cpp with its prefix cache", "the bare runner"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A load, whom it is sent to, and what ours should reach: `wanted` are factors over an opponent by measure."""

    clients: int
    requests: int
    prompt: int = 128
    new: int = 64
    shared: int = 0
    tiny: bool = False
    opponents: tuple[str, ...] = (PEER,)
    wanted: tuple[tuple[str, str, float], ...] = ()  # (opponent, measure, factor)
    least: float | None = None  # output tokens/s


THROUGHPUT, TTFT, E2E = "steady_output_tok_per_s", "ttft_ms", "e2e_ms"
SCENARIOS = {
    "clients_1": Scenario(clients=1, requests=6, wanted=((PEER, E2E, 1.6),)),
    "clients_8": Scenario(clients=8, requests=32, wanted=((PEER, THROUGHPUT, 3.0), (PEER, TTFT, 3.0))),
    "clients_16": Scenario(clients=16, requests=48, wanted=((PEER, THROUGHPUT, 3.0), (PEER, TTFT, 3.0))),
    "prefix": Scenario(
        clients=8,
        requests=24,
        prompt=576,
        shared=512,
        opponents=(PEER, CACHED_PEER),
        wanted=((PEER, THROUGHPUT, 5.0), (CACHED_PEER, THROUGHPUT, 1.0)),
    ),
    "long": Scenario(clients=4, requests=8, prompt=2048, wanted=((PEER, THROUGHPUT, 2.5),)),
    "overhead": Scenario(clients=8, requests=64, opponents=(BARE,), wanted=((BARE, THROUGHPUT, 0.97),)),
    "tiny": Scenario(clients=16, requests=512, tiny=True, opponents=(), least=3000.0),
}


# ---- servers ----


class Server:
    """A server in a process of its own. It is up when this is made, and gone after `close`."""

    def __init__(self, name: str, command: list[str], url: str | None, threads: int, log: Any = None) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        started = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        if url is None:  # it says so itself
            assert self._process.stdout is not None
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"{name} ended with code {self._process.wait()}; see its messages above.")
            url = str(json.loads(line)["url"])
        self.url = url
        self._wait()
        self.start_seconds = time.perf_counter() - started

    def _wait(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise SystemExit(f"{self.name} ended with code {code}; see its messages above.")
            with contextlib.suppress(OSError), _opener().open(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.1)
        self.close()
        raise SystemExit(f"{self.name} did not answer within {seconds:.0f} s.")

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def get(self, path: str) -> str:
        """What it answers to a GET."""
        with _opener().open(self.url + path, timeout=30) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        """End it, gently first."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """One that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ours(model: Path, threads: int, options: list[str], log: Any = None) -> Server:
    """`olmoe serve` on a checkpoint folder; its messages go to the file `log`."""
    port = free_port()
    command = [sys.executable, "-m", "olmoe", "serve", "--model", str(model), "--port", str(port)]
    return Server(OURS, [*command, "--threads", str(threads), *options], f"http://127.0.0.1:{port}", threads, log)


def start_peer(name: str, gguf: Path, scenario: Scenario, python: str, threads: int) -> Server:
    """llama.cpp's server with a slot for each client."""
    command = [python, str(HERE / "serve_peer.py"), str(gguf), "--slots", str(scenario.clients)]
    command += ["--context", str(scenario.prompt + scenario.new + 16), "--threads", str(threads)]
    if name == CACHED_PEER:
        command.append("--prefix-cache")
    return Server(name, command, None, threads)


# ---- models ----


def prepare(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint and the GGUF file: the given ones, or random weights, written once."""
    if arguments.model is not None:
        return Path(arguments.model), Path(arguments.gguf or "")
    name = "serve-int4" if arguments.config is None else f"serve-int4-{Path(arguments.config).stem}"
    folder = Path(arguments.scratch) / name
    if not (folder / "tokenizer.json").is_file():
        print(f"writing {folder}", flush=True)
        options = json.dumps({"format": "int4", "folder": str(folder), "config": arguments.config})
        subprocess.run([sys.executable, str(HERE / "cpu_engine_worker.py"), "write", options], check=True)
        (folder / "tokenizer.json").write_bytes(gzip.decompress(TOKENIZER.read_bytes()))
    gguf = Path(arguments.gguf) if arguments.gguf else folder.with_suffix(".gguf")
    if not gguf.is_file():
        print(f"writing {gguf}", flush=True)
        subprocess.run([sys.executable, "-m", "olmoe", "convert", str(folder), str(gguf), "--quiet"], check=True)
    return folder, gguf


def bare(model: Path, scenario: Scenario, threads: int) -> float:
    """Output tokens a second of the runner alone, which gets all prompts at once and then decodes all of them."""
    from olmoe.bench.speed import Measured
    from olmoe.runtime import keep_freed_memory, set_threads
    from olmoe.weights.checkpoint import load

    set_threads(threads)
    keep_freed_memory()
    measured = Measured(load(model, device="cpu"))
    seconds = []
    for number in range(4):
        running = measured.sequences(scenario.clients, scenario.prompt + scenario.new)
        took = measured.prefill(running, scenario.prompt)
        took += sum(measured.decode(running) for _ in range(scenario.new - 1))
        if number:  # the first of anything is slower
            seconds.append(took)
    return scenario.clients * scenario.new / statistics.median(seconds)


# ---- measuring ----


def ask(server: Server, scenario: Scenario, tokenizer: Path, seed: int) -> dict[str, Any]:
    """The report of one load."""
    options = {
        "url": server.url,
        "tokenizer": tokenizer,
        "requests": scenario.requests,
        "clients": scenario.clients,
        "prompt-tokens": scenario.prompt,
        "new-tokens": scenario.new,
        "shared-prefix": scenario.shared,
        "seed": seed,
    }
    command = [sys.executable, str(HERE / "serve_load.py")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The load on {server.name} failed:\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    if report["faults"] or report["wrong_length"]:
        raise SystemExit(f"{server.name} did not answer as it should: {report}")
    return report


def figure(report: dict[str, Any], measure: str) -> float:
    """A measure of a report; of times, the median."""
    value = report[measure]
    return float(value["p50"] if isinstance(value, dict) else value)


def gain(measure: str, ours: float, theirs: float) -> float:
    """How much better ours is: a ratio of rates, or of times the other way round."""
    return ours / theirs if measure == THROUGHPUT else theirs / ours


class Foreign:
    """How busy the machine was with anything but the servers and the client: the largest share of a core."""

    def __init__(self) -> None:
        self.cores = 0.0

    @contextlib.contextmanager
    def watch(self, servers: list[Server]) -> Iterator[list[float]]:
        """During one load. The yielded list takes the client's CPU seconds."""
        busy, own = busy_seconds(), [cpu_seconds(each.pid) for each in servers]
        client: list[float] = []
        started = time.perf_counter()
        yield client
        used = sum(cpu_seconds(each.pid) - before for each, before in zip(servers, own, strict=True))
        others = busy_seconds() - busy - used - sum(client)
        self.cores = max(self.cores, others / (time.perf_counter() - started))


def measure(
    name: str, scenario: Scenario, servers: list[Server], folder: Path, arguments: argparse.Namespace, foreign: Foreign
) -> dict[str, list[dict[str, Any]]]:
    """The reports of all rounds, by server, ours first."""
    reports: dict[str, list[dict[str, Any]]] = {server.name: [] for server in servers}
    for number in range(arguments.rounds):
        if BARE in scenario.opponents:
            command = [sys.executable, __file__, "--bare", str(folder), "--scenarios", name]
            command += ["--threads", str(arguments.threads)]
            rate = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            reports.setdefault(BARE, []).append({THROUGHPUT: rate})
            print(f"{name} round {number + 1}: {BARE}: {rate:.2f} output tokens/s", flush=True)
        for server in servers:
            with foreign.watch(servers) as client:
                report = ask(server, scenario, folder / "tokenizer.json", 100 + number)
                client.append(report["client_cpu_s"])
            reports[server.name].append(report)
            times = f"{TTFT} {figure(report, TTFT):.0f}, {E2E} {figure(report, E2E):.0f}"
            rate = figure(report, THROUGHPUT)
            print(f"{name} round {number + 1}: {server.name}: {rate:.2f} output tokens/s, {times}", flush=True)
    return reports


def summary(scenario: Scenario, reports: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians, ratios to each opponent, and whether what is wanted was reached."""
    measures = (THROUGHPUT, "output_tok_per_s", TTFT, "itl_ms", "tpot_ms", E2E, "client_lag_ms")
    result: dict[str, Any] = {
        server: {m: round(statistics.median(figure(r, m) for r in each), 2) for m in measures if r_has(each, m)}
        for server, each in reports.items()
    }
    ratios: dict[str, dict[str, float]] = {}
    for opponent in [server for server in reports if server != OURS]:
        pairs = list(zip(reports[OURS], reports[opponent], strict=True))
        ratios[opponent] = {
            m: round(statistics.median(gain(m, figure(a, m), figure(b, m)) for a, b in pairs), 3)
            for m in (THROUGHPUT, TTFT, E2E)
            if r_has(reports[opponent], m)
        }
    reached = {f"{m} over {o}: {f}": ratios[o][m] >= f for o, m, f in scenario.wanted if o in ratios}
    if scenario.least is not None:
        reached[f"{THROUGHPUT}: {scenario.least}"] = result[OURS][THROUGHPUT] >= scenario.least
    return {"medians": result, "gain": ratios, "reached": reached}


def r_has(reports: list[dict[str, Any]], measure: str) -> bool:
    """Whether reports have a measure; those of the bare runner have only its rate."""
    return all(report.get(measure) not in (None, {}) for report in reports)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="some of %(default)s")
    parser.add_argument("--scratch", metavar="DIR", help="where random weights are written and found again (8 GB)")
    parser.add_argument("--model", metavar="DIR", help="a packed checkpoint with a tokenizer, in place of them")
    parser.add_argument("--gguf", metavar="FILE", help="the same for llama.cpp")
    parser.add_argument("--config", metavar="CONFIG.json", help="other shapes than the released ones, to try this out")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="one that has xllamacpp")
    parser.add_argument("--no-peer", action="store_true", help="measure ours alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="in place of each scenario's own, to try this out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--options", default="", help="more options of olmoe serve, in one text")
    parser.add_argument("--results", default=str(RESULTS), metavar="FILE", help="where the line is added; - nowhere")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with this
    names = arguments.scenarios.split(",")
    if unknown := set(names) - set(SCENARIOS):
        parser.error(f"unknown scenarios {', '.join(sorted(unknown))}; choose among {', '.join(SCENARIOS)}")
    if arguments.bare:
        print(json.dumps(bare(Path(arguments.bare), SCENARIOS[names[0]], arguments.threads)))
        return
    big = any(not SCENARIOS[name].tiny for name in names)
    if big and arguments.scratch is None and arguments.model is None:
        parser.error("the released shapes need --scratch, or a checkpoint with --model")
    print(json.dumps(run(names, big, arguments)), flush=True)


def run(names: list[str], big: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """All scenarios -> the line of results, which is added to the file."""
    from dataclasses import replace

    from olmoe.bench.ceilings import Ceiling, read_bandwidth, step_bytes
    from olmoe.bench.random_models import skeleton
    from olmoe.config import ModelConfig
    from olmoe.io.hub import SHIPPED
    from olmoe.runtime import set_threads

    set_threads(arguments.threads)
    folder, gguf = prepare(arguments) if big else (SHIPPED, Path())
    bandwidth = read_bandwidth()
    print(f"Memory reads reach {bandwidth / 1e9:.1f} GB/s with {arguments.threads} threads.")
    ceilings = {}
    for name in names:
        scenario = SCENARIOS[name]
        config = ModelConfig.from_file((SHIPPED if scenario.tiny else folder) / "config.json")
        model = skeleton(config, "bf16" if scenario.tiny else "int4")
        step = step_bytes(model, scenario.prompt + scenario.new // 2, scenario.clients)
        ceilings[name] = Ceiling(bandwidth, step, scenario.clients)
        reads = f"{step.total / 1e9:.3f} GB a step of {scenario.clients} clients"
        print(f"  {name}: {reads}: at most {ceilings[name].tokens_per_second:.1f} tokens/s, prompts not counted")
    foreign, results = Foreign(), dict[str, Any]()
    for name in names:
        scenario = SCENARIOS[name]
        if arguments.requests:
            scenario = replace(scenario, requests=arguments.requests)
        model_folder = SHIPPED if scenario.tiny else folder
        servers: list[Server] = []
        try:
            servers.append(start_ours(model_folder, arguments.threads, arguments.options.split()))
            wanted = [] if arguments.no_peer else [each for each in scenario.opponents if each != BARE]
            servers += [start_peer(each, gguf, scenario, arguments.peer_python, arguments.threads) for each in wanted]
            reports = measure(name, scenario, servers, model_folder, arguments, foreign)
        finally:
            for server in servers:
                server.close()
        results[name] = summary(scenario, reports)
        rate = results[name]["medians"][OURS][THROUGHPUT]
        results[name]["ceiling_tokens_per_s"] = round(ceilings[name].tokens_per_second, 2)
        results[name]["share_of_ceiling"] = round(rate / ceilings[name].tokens_per_second, 3)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    line = {
        "benchmark": "serve",
        "config": Path(arguments.config).name if arguments.config else "1b-7b",
        "rounds": arguments.rounds,
        "scenarios": results,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "foreign_cores": round(foreign.cores, 3),
    } | machine()
    if arguments.results != "-":
        with open(arguments.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return line


if __name__ == "__main__":
    main()
