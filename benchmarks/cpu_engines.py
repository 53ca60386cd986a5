"""Ours against llama.cpp and transformers on a CPU: prompts, decoding, loading and memory on the released shapes.

    python benchmarks/cpu_engines.py --scratch DIR --llama-python PYTHON --gguf Q4_0.gguf Q4_K_M.gguf Q8_0.gguf

Each engine runs in a process of its own that stays alive, and they take turns: in every round each computes the same
work while the others wait on a pipe. Weights are random, so that nothing is downloaded; GGUF files of the same shapes
are yours to bring (their names must begin with their types, and their weights must keep tokens apart as ours do:
codes around that of zero, and embeddings a hundred times larger). What is compared, by `--parts`:

    int4      prefill and decode after a short context; ours and all GGUF files whose names begin with Q4
    context   the same engines decoding after a long context
    batch     the same engines decoding several sequences at once
    int8      prefill and decode; ours and the GGUF file Q8_0
    bf16      prefill and decode; ours and transformers, both on one copy of the weights in shared memory (14 GB)
    whole     what users get: texts through tokenizer, sampling and a stream of pieces, ours (int4) and the same files
              through llama.cpp's Python binding, xllamacpp or llama_cpp; and against its server's own timings
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cpu_engine_worker import VOCABULARY, shared_state
from machine import busy_seconds, cpu_seconds, machine

from olmoe.bench.ceilings import Ceiling, read_bandwidth, step_bytes
from olmoe.bench.random_models import require_memory, skeleton
from olmoe.config import ModelConfig
from olmoe.runtime import set_threads
from olmoe.weights.packed_file import PackedFile, build

WORKER = Path(__file__).with_name("cpu_engine_worker.py")
RESULTS = Path(__file__).parent / "results" / "cpu_engines.jsonl"
PARTS = ("int4", "context", "batch", "int8", "bf16", "whole")
GROUPS = {"int4": ("int4", "context", "batch"), "int8": ("int8",), "bf16": ("bf16",), "whole": ("whole",)}
FORMATS = {"whole": "int4"}  # of groups that have another name
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "top_k": 40}
OURS = "ours"
OWN_TIMINGS = "_own_timings"  # a measurement by what the others report of themselves


class Engine:
    """A worker process: started cold, then asked for one thing after another."""

    def __init__(
        self, name: str, kind: str, python: str, options: dict[str, Any], descriptors: tuple[int, ...]
    ) -> None:
        self.name = name
        threads = str(options["threads"])
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [python, str(WORKER), kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=descriptors,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )
        hello = self._answer()
        self.facts: dict[str, Any] = hello.pop("facts")
        seconds = {"process_s": time.perf_counter() - started} | hello
        peak = seconds.pop("peak_bytes")
        self.start = {key: round(value, 3) for key, value in seconds.items()} | {"peak_gb": round(peak / 1e9, 3)}

    def ask(self, do: str, **arguments: Any) -> Any:
        """The worker's answer, after however long it takes."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The engine {self.name} ended with code {self._process.wait()}; see its messages above.")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """What its threads have computed so far."""
        return cpu_seconds(self._process.pid)

    def close(self) -> None:
        """End the process; its memory is free when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Quiet:
    """Who else computed while an engine was measured: the waiting engines, and everything beside this benchmark."""

    def __init__(self) -> None:
        self.waiting, self.foreign = 0.0, 0.0

    @contextmanager
    def watch(self, active: Engine, engines: list[Engine]) -> Iterator[None]:
        """Measure during one request to `active`; the largest shares of a core-second per second stay."""
        before, busy, own = [e.cpu_seconds() for e in engines], busy_seconds(), time.process_time()
        started = time.perf_counter()
        yield
        wall = time.perf_counter() - started
        used = [e.cpu_seconds() - b for e, b in zip(engines, before, strict=True)]
        others = busy_seconds() - busy - sum(used) - (time.process_time() - own)
        if wall > 0.2:  # the clocks of the system count hundredths
            waiting = sum(u for e, u in zip(engines, used, strict=True) if e is not active)
            self.waiting, self.foreign = max(self.waiting, waiting / wall), max(self.foreign, others / wall)


def warm(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass


def packed_folder(format: str, arguments: argparse.Namespace) -> Path:
    """The packed checkpoint to measure: the given one, or random weights, written once."""
    given = getattr(arguments, format)
    if given is not None:
        return Path(given)
    name = format if arguments.config is None else f"{format}-{Path(arguments.config).stem}"
    folder = Path(arguments.scratch) / name
    if not (folder / "config.json").is_file():
        print(f"writing {folder}", flush=True)
        options = {"format": format, "folder": str(folder), "config": arguments.config}
        subprocess.run([sys.executable, str(WORKER), "write", json.dumps(options)], check=True)
    return folder


def shared_weights(config: ModelConfig) -> int:
    """A file in memory with random bf16 weights, for processes to share."""
    require_memory(2 * config.num_parameters, "bf16")
    descriptor = os.memfd_create("weights")
    os.ftruncate(descriptor, 2 * config.num_parameters)
    state = shared_state(descriptor, config)
    noise = (0.02 * torch.randn(2**22 - 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    for name, tensor in state.items():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
            continue
        # Large embeddings keep tokens different through all layers, so that they choose different experts.
        values = 64 * noise if "embed_tokens" in name else noise
        for piece in tensor.view(-1).split(len(values)):
            piece.copy_(values[: len(piece)])
    return descriptor


def start(group: str, arguments: argparse.Namespace, config: ModelConfig) -> tuple[list[Engine], int | None]:
    """The engines of a group, ours first, and the descriptor of shared weights. Each starts while the others wait."""
    common = {"threads": arguments.threads, "config": arguments.config, "isa": arguments.isa}
    engines: list[Engine] = []
    if group == "bf16":
        descriptor = shared_weights(config)
        for name, kind in ((OURS, "ours"), ("transformers", "transformers")):
            options = common | {"descriptor": descriptor}
            engines.append(Engine(name, kind, sys.executable, options, (descriptor,)))
        return engines, descriptor
    format = FORMATS.get(group, group)
    folder = packed_folder(format, arguments)
    warm(folder / "model.safetensors")
    engines.append(Engine(OURS, "ours", sys.executable, common | {"folder": str(folder)}, ()))
    for file in map(Path, arguments.gguf):
        if file.name.startswith("Q4" if format == "int4" else "Q8"):
            warm(file)
            name, kind = f"llama.cpp {file.name.split('.')[0]}", "llama_whole" if group == "whole" else "llama_cpp"
            options = common | {
                "gguf": str(file),
                "capacity": arguments.context + arguments.whole_steps + 1,
                "vocabulary": min(VOCABULARY, config.vocab_size),
            }
            engines.append(Engine(name, kind, arguments.llama_python, options, ()))
    return engines, None


def work_of(part: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The measurements of a part: what to ask an engine for, by name."""
    if part == "whole":
        context, steps = arguments.context, arguments.whole_steps
        request = {"do": "whole", "context": context, "steps": steps, "sampling": SAMPLING}
        return {f"whole_{context}": request | {"capacity": context + steps + 1}}
    batch, steps = (arguments.batch if part == "batch" else 1), arguments.steps
    context = arguments.long if part == "context" else arguments.context
    decode = {"do": "decode", "context": context, "batch": batch, "steps": steps}
    work = {f"decode_{context}" + (f"_batch_{batch}" if batch > 1 else ""): decode}
    longest = context + steps
    if part in ("int4", "int8", "bf16"):
        work = {f"prefill_{arguments.prefill}": {"do": "prefill", "length": arguments.prefill}} | work
        longest = max(longest, arguments.prefill)
    return {name: request | {"capacity": longest} for name, request in work.items()}


def measure(part: str, engines: list[Engine], arguments: argparse.Namespace, quiet: Quiet) -> dict[str, Any]:
    """Rounds of a part: medians in tokens/s, and medians of the rounds' ratios of ours to each peer and the best."""
    work = work_of(part, arguments)
    for request in work.values():  # what happens for the first time is slower; contexts are filled
        short = {"length": min(64, request["length"])} if request["do"] == "prefill" else {"steps": 2}
        for engine in engines:
            engine.ask(**(request | short))
    rates: dict[str, dict[str, list[float]]] = {name: {e.name: [] for e in engines} for name in work}
    own: dict[str, list[float]] = {}
    for number in range(arguments.whole_rounds if part == "whole" else arguments.rounds):
        for name, request in work.items():
            for engine in engines:
                with quiet.watch(engine, engines):
                    result = engine.ask(**request)["result"]
                rate = rate_of(request, result)
                if part == "whole" and result["own"] is not None:
                    own.setdefault(engine.name, []).append(result["own"])
                rates[name][engine.name].append(rate)
                print(f"{part} round {number + 1}: {name} {engine.name} {rate:.2f} tokens/s", flush=True)
    if own:  # ours stays what its reader saw
        (name,) = work
        rates[name + OWN_TIMINGS] = {OURS: rates[name][OURS]} | own
    measured: dict[str, Any] = {name: compare(by_engine) for name, by_engine in rates.items()}
    measured["peak_gb"] = {e.name: round(e.ask("peak")["peak_bytes"] / 1e9, 3) for e in engines}
    return measured


def rate_of(request: dict[str, Any], result: Any) -> float:
    """Tokens a second of one answer."""
    if request["do"] == "whole":
        return float(result["reader"])
    if request["do"] == "prefill":
        return float(request["length"] / result)
    return float(request["batch"] / statistics.median(result))


def compare(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and medians of the ratios that ours has in each round to each peer and to the best of that round."""
    ratios = {}
    peers = [name for name in rates if name != OURS]
    if peers:
        against = {name: rates[name] for name in peers}
        against["best"] = [max(values) for values in zip(*against.values(), strict=True)]
        for name, values in against.items():
            ratios[name] = statistics.median(m / v for m, v in zip(rates[OURS], values, strict=True))
    return {
        "tokens_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
        "ratio": {name: round(value, 3) for name, value in ratios.items()},
    }


def ceiling(
    part: str, name: str, bandwidth: float, arguments: argparse.Namespace, config: ModelConfig
) -> Ceiling | None:
    """What memory allows ours in one of `work_of`; None for prompts."""
    request = work_of(part, arguments)[name.removesuffix(OWN_TIMINGS)]
    if request["do"] == "prefill":
        return None
    group = next(FORMATS.get(group, group) for group, members in GROUPS.items() if part in members)
    batch = request.get("batch", 1)
    given = getattr(arguments, group, None)
    if given is None:
        model = skeleton(config, group)
    else:
        stored = PackedFile(Path(given))
        model = build(stored.config, stored.layout).float()
    return Ceiling(bandwidth, step_bytes(model, request["context"], batch), batch)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument(
        "--scratch", metavar="DIR", help="where packed random weights are written and found again (12 GB)"
    )
    parser.add_argument("--int4", metavar="DIR", help="a packed checkpoint in place of random weights")
    parser.add_argument("--int8", metavar="DIR", help="a packed checkpoint in place of random weights")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="FILE", help="files for llama.cpp")
    parser.add_argument("--llama-python", metavar="PYTHON", help="an interpreter that has llama_cpp and numpy")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="decoding steps a round (%(default)s)")
    parser.add_argument("--whole-rounds", type=int, default=5, help="rounds of the part whole (%(default)s)")
    parser.add_argument("--whole-steps", type=int, default=128, help="its decoding steps a round (%(default)s)")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--context", type=int, default=64, help="tokens before short decoding (%(default)s)")
    parser.add_argument("--long", type=int, default=2048, help="tokens before long decoding (%(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", help="instruction set of our kernels (default: the best that this CPU has)")
    parser.add_argument("--config", metavar="CONFIG.json", help="other shapes than the released ones, to try this out")
    parser.add_argument(
        "--results", default=str(RESULTS), metavar="FILE", help="where the line of JSON is added; - nowhere"
    )
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; choose among {', '.join(PARTS)}")
    numbers = ("rounds", "steps", "whole_rounds", "whole_steps", "prefill", "context", "long", "batch")
    if min(getattr(arguments, name) for name in numbers) < 1:
        parser.error("all numbers must be at least 1")
    if arguments.gguf and arguments.llama_python is None:
        parser.error("--gguf needs --llama-python")
    needed = {group for group, members in GROUPS.items() if set(parts) & set(members)}
    for group in ("int4", "int8"):
        if (
            any(FORMATS.get(part, part) == group for part in needed)
            and getattr(arguments, group) is None
            and arguments.scratch is None
        ):
            parser.error(f"{group} needs --scratch, or a packed checkpoint with --{group}")
    set_threads(arguments.threads)
    config = ModelConfig() if arguments.config is None else ModelConfig.from_file(arguments.config)

    bandwidth = read_bandwidth()
    print(f"Memory reads reach {bandwidth / 1e9:.1f} GB/s with {arguments.threads} threads.")
    for part in parts:
        for name in work_of(part, arguments):
            if (limit := ceiling(part, name, bandwidth, arguments, config)) is not None:
                reads = f"{limit.step.total / 1e9:.3f} GB a step: at most {limit.tokens_per_second:.1f} tokens/s"
                print(f"  {part} {name}: ours reads {reads}", flush=True)

    quiet, measured, starts, facts = Quiet(), {}, {}, {}
    for group, members in GROUPS.items():
        chosen = [part for part in members if part in parts]
        if not chosen:
            continue
        engines: list[Engine] = []
        try:
            engines, descriptor = start(group, arguments, config)
            for part in chosen:
                measured[part] = measure(part, engines, arguments, quiet)
        finally:
            for engine in engines:
                engine.close()
        if descriptor is not None:
            os.close(descriptor)
        starts[group] = {e.name: e.start for e in engines}
        facts |= {e.name: e.facts for e in engines}
    bandwidth = max(bandwidth, read_bandwidth())  # nobody is left who could have used it meanwhile

    print(f"\n{'':<56} {'tokens/s':>9} {'of ceiling':>11} {'ours over it':>13}")
    for part, values in measured.items():
        for name, result in values.items():
            if name == "peak_gb":
                continue
            limit = ceiling(part, name, bandwidth, arguments, config)
            if limit is not None:
                result["ceiling_tokens_per_s"] = round(limit.tokens_per_second, 2)
                result["share_of_ceiling"] = round(result["tokens_per_s"][OURS] / limit.tokens_per_second, 3)
            for engine, rate in result["tokens_per_s"].items():
                share = f"{result['share_of_ceiling']:.0%}" if limit is not None and engine == OURS else ""
                ratio = f"{result['ratio'][engine]:.2f}" if engine in result["ratio"] else ""
                print(f"{f'{part} {name} {engine}':<56} {rate:>9.2f} {share:>11} {ratio:>13}")
        print(f"{part} peak memory in GB: " + ", ".join(f"{e} {gb:.2f}" for e, gb in values["peak_gb"].items()))
    for group, by_engine in starts.items():
        for engine, times in by_engine.items():
            print(f"{group} start: {engine} " + ", ".join(f"{key} {value}" for key, value in times.items()))
    print(f"Waiting engines used {quiet.waiting:.1%} of a core at most, other programs {quiet.foreign:.1%}.")
    line = json.dumps(
        {
            "benchmark": "cpu_engines",
            "config": Path(arguments.config).name if arguments.config else "1b-7b",
            "rounds": arguments.rounds,
            "steps": arguments.steps,
            "whole": {"rounds": arguments.whole_rounds, "steps": arguments.whole_steps, "sampling": SAMPLING},
            "parts": measured,
            "starts": starts,
            "engines": facts,
            "read_gb_per_s": round(bandwidth / 1e9, 2),
            "waiting_cores": round(quiet.waiting, 4),
            "foreign_cores": round(quiet.foreign, 4),
        }
        | machine()
    )
    if arguments.results != "-":
        with open(arguments.results, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
