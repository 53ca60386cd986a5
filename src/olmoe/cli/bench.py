"""Measure prompt processing and decoding on this CPU, next to the ceiling set by its memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmoe.bench.ceilings import Ceiling
    from olmoe.bench.speed import Measured
    from olmoe.config import ModelConfig
    from olmoe.engine.sampling_params import SamplingParams
    from olmoe.model import CausalLM
    from olmoe.weights.checkpoint import Checkpoint

RELEASED = "1b-7b"
DEFAULT_FORMAT = "int4"
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe bench`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="DIR|HUB_ID", help="a checkpoint, packed or not (default: the shipped olmoe-tiny)"
    )
    source.add_argument(
        "--random-weights",
        metavar=f"{RELEASED}|CONFIG.json",
        help="not a checkpoint, but random weights of these shapes, which run as fast",
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help="for random weights: int4, int8, bf16 or fp32 (default: int4); for a checkpoint that is not packed: bf16 "
        "or fp32 (default: as stored)",
    )
    parser.add_argument("--prefill", type=int, metavar="N", help="prompt length (default: 512, or the whole context)")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="decoding steps (%(default)s)")
    parser.add_argument(
        "--context", type=int, default=64, metavar="N", help="tokens before them in the cache (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences decoded at once (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="prompts timed; the median is reported (%(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--backend", default="auto", help="auto, cpu, torch or reference (%(default)s)")
    parser.add_argument("--isa", help="instruction set of the C++ kernels (default: the best that this CPU has)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    whole = parser.add_argument_group("what users get")
    whole.add_argument(
        "--whole-path",
        action="store_true",
        help="also decode, in turn, through everything that `olmoe generate` does (tokenizer, sampling, text), and "
        "print the ratio to bare steps. Sampling is greedy unless the options below say otherwise",
    )
    whole.add_argument("--temperature", type=float, help="with --whole-path: as for `olmoe generate`")
    whole.add_argument("--top-k", type=int, metavar="K", help="the same")
    whole.add_argument("--top-p", type=float, metavar="P", help="the same")
    whole.add_argument("--min-p", type=float, metavar="P", help="the same")


def run(arguments: argparse.Namespace) -> int:
    """Print the ceiling, measure, print a table and one line of JSON."""
    import json
    import time

    from tqdm import tqdm

    from olmoe.bench import ceilings, machine, speed
    from olmoe.errors import UserError
    from olmoe.ops import cpu
    from olmoe.runner import require_backend
    from olmoe.runtime import keep_freed_memory, peak_memory_bytes, set_threads

    for option in ("prefill", "decode", "context", "batch", "repeats"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1, not {value}.")
    params = _sampling(arguments)
    require_backend(arguments.backend)
    if arguments.isa is not None:
        if arguments.backend not in ("auto", "cpu"):
            raise UserError(
                f"--isa is for the C++ kernels, not for --backend {arguments.backend}; leave one of them out."
            )
        require_backend("cpu")
        cpu.set_isa(arguments.isa)
    set_threads(arguments.threads)
    keep_freed_memory()
    name, config, stored = _source(arguments)
    prefill = _fit(arguments, config)

    def say(text: str) -> None:
        if not arguments.json:
            print(text, flush=True)

    bandwidth = ceilings.read_bandwidth()
    machine.reset_peak_memory()
    started = time.perf_counter()
    model, format = _load(stored, config, arguments.format)
    runner = speed.Measured(model, arguments.backend)
    load_seconds = time.perf_counter() - started
    step = ceilings.step_bytes(model, arguments.context, arguments.batch, runner.cache_dtype)
    ceiling = ceilings.Ceiling(bandwidth, step, arguments.batch)
    say(_ceiling_text(ceiling, arguments.context))
    with tqdm(desc=f"{name} {format}", unit="step", disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        measured = speed.measure(
            runner,
            prefill=prefill,
            decode=arguments.decode,
            context=arguments.context,
            batch=arguments.batch,
            repeats=arguments.repeats,
            progress=progress,
        )
    whole = {} if params is None else _whole_path(runner, stored, arguments, params)
    peak, decoded = peak_memory_bytes(), measured["decode_tokens_per_second"]
    # Again, in case others used the memory before; a smaller block, because the model occupies some of it now.
    ceiling = ceilings.Ceiling(max(bandwidth, ceilings.read_bandwidth(size=2**28)), step, arguments.batch)
    share = decoded / ceiling.tokens_per_second
    achieved = share * ceiling.bytes_per_second / 1e9
    label = f"decode at {arguments.context}" + (f", batch {arguments.batch}" if arguments.batch > 1 else "")
    say(
        f"{'':<28} {'tokens/s':>10} {'of ceiling':>11} {'GB/s':>8}\n"
        f"{f'prefill {prefill}':<28} {measured['prefill_tokens_per_second']:>10.1f}\n"
        f"{label:<28} {decoded:>10.1f} {share:>10.0%} {achieved:>8.1f}\n"
        + _whole_text(whole, arguments.context)
        + f"load {load_seconds:.2f} s, peak memory {_size(peak)}"
    )
    facts = {
        "benchmark": "bench",
        "model": name,
        "format": format,
        "random_weights": stored is None,
        "backend": arguments.backend,
        "prefill": prefill,
        "decode": arguments.decode,
        "context": arguments.context,
        "batch": arguments.batch,
        "prefill_tokens_per_s": round(measured["prefill_tokens_per_second"], 2),
        "decode_tokens_per_s": round(decoded, 2),
        "decode_tokens_per_s_best": round(measured["decode_tokens_per_second_best"], 2),
        "share_of_ceiling": round(share, 3),
        "achieved_gb_per_s": round(achieved, 2),
        "load_s": round(load_seconds, 3),
        "peak_memory_gb": round(peak / 1e9, 3),
        "ceiling": ceiling.to_dict(),
    } | ({"whole_path": whole} if whole else {})
    print(json.dumps(facts | machine.machine_facts()))
    return 0


def _source(arguments: argparse.Namespace) -> tuple[str, ModelConfig, Checkpoint | None]:
    """Name, architecture and checkpoint (None: random weights) of the model to measure."""
    from pathlib import Path

    from olmoe.config import ModelConfig
    from olmoe.errors import UserError
    from olmoe.io import hub
    from olmoe.weights.checkpoint import Checkpoint

    wanted = arguments.random_weights
    if wanted is not None:
        if hub.is_released(wanted):
            return wanted, ModelConfig(), None
        if not Path(wanted).is_file():
            raise UserError(f"--random-weights takes {RELEASED} or a config.json, not {wanted!r}.")
        return wanted, ModelConfig.from_file(wanted), None
    stored = Checkpoint.open(hub.SHIPPED if arguments.model is None else arguments.model)
    if stored.layout is not None and arguments.format is not None:
        raise UserError(f"{stored.folder} is packed as {stored.format} already, so leave --format out.")
    if arguments.format not in (None, "bf16", "fp32"):
        raise UserError(
            f"{stored.folder} is not packed, so it can be measured in bf16 or fp32, not {arguments.format!r}; pack it "
            "with `olmoe quantize`, or give --random-weights its config.json."
        )
    return arguments.model or "olmoe-tiny", stored.config, stored


def _fit(arguments: argparse.Namespace, config: ModelConfig) -> int:
    """The prompt length to measure. Raises `UserError` for a length that the model's context cannot hold."""
    from olmoe.errors import UserError

    room = int(config.max_position_embeddings * config.rope.factor)
    prefill: int = min(512, room) if arguments.prefill is None else arguments.prefill
    decoded = arguments.context + arguments.decode + (1 if arguments.whole_path else 0)
    needs = {"--prefill asks": prefill, "--context and --decode ask": decoded}
    for who, length in needs.items():
        if length > room:
            raise UserError(f"{who} for {length} tokens, but the model's context ends at {room}; take fewer.")
    return prefill


def _load(stored: Checkpoint | None, config: ModelConfig, format: str | None) -> tuple[CausalLM, str]:
    """The model and the name of its format."""
    from olmoe.bench.random_models import PLAIN_FORMATS, random_model
    from olmoe.weights.checkpoint import Checkpoint

    if stored is None:
        return random_model(config, format or DEFAULT_FORMAT), format or DEFAULT_FORMAT
    # Opened again, so that the time covers everything that loading reads.
    model = Checkpoint(stored.folder).load(dtype=None if format is None else PLAIN_FORMATS[format])
    names = {str(dtype).removeprefix("torch."): name for name, dtype in PLAIN_FORMATS.items()}
    return model, format or names.get(stored.format, stored.format)


def _sampling(arguments: argparse.Namespace) -> SamplingParams | None:
    """How the whole path samples; None if it is not asked for. Raises `UserError` for options that conflict."""
    from olmoe.engine.sampling_params import SamplingParams
    from olmoe.errors import UserError

    given = {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}
    if arguments.whole_path:
        if arguments.batch > 1:
            raise UserError(f"--whole-path decodes one text at a time, not --batch {arguments.batch}; leave one out.")
        return SamplingParams(**given, seed=0)
    for name, value in given.items():
        raise UserError(f"--{name.replace('_', '-')} {value} needs --whole-path, which samples; add it.")
    return None


def _whole_path(
    runner: Measured, stored: Checkpoint | None, arguments: argparse.Namespace, params: SamplingParams
) -> dict[str, Any]:
    """The speed of decoding through the whole path next to bare steps, and how it sampled; for JSON."""
    from tqdm import tqdm

    from olmoe.bench.whole_path import WholePath, measure_whole_path, stand_in_tokenizer
    from olmoe.engine.llm import LLM
    from olmoe.tokenizer import Tokenizer

    config = runner.model.config
    if stored is not None and (stored.folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(stored.folder, eos_ids=config.eos_token_ids, pad_id=config.pad_token_id)
    else:
        tokenizer = stand_in_tokenizer(config.vocab_size, config.eos_token_ids)
    llm = LLM.from_parts(runner.model, tokenizer, backend=arguments.backend)
    with tqdm(desc="whole path", unit="turn", disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        measured = measure_whole_path(
            runner,
            WholePath(llm, arguments.context, params),
            context=arguments.context,
            decode=arguments.decode,
            rounds=arguments.repeats,
            progress=progress,
        )
    return {
        "bare_tokens_per_s": round(measured["bare_tokens_per_second"], 2),
        "whole_tokens_per_s": round(measured["whole_tokens_per_second"], 2),
        "ratio": round(measured["ratio"], 3),
        "rounds": arguments.repeats,
        "sampling": {name: getattr(params, name) for name in SAMPLING},
    }


def _whole_text(whole: dict[str, Any], context: int) -> str:
    if not whole:
        return ""
    bare, through, ratio = (whole[key] for key in ("bare_tokens_per_s", "whole_tokens_per_s", "ratio"))
    return (
        f"{f'bare steps at {context}, in turn':<28} {bare:>10.1f}\n"
        f"{f'whole path at {context}, in turn':<28} {through:>10.1f}   {ratio:.3f} of bare steps\n"
    )


def _ceiling_text(ceiling: Ceiling, context: int) -> str:
    reads = "A token reads" if ceiling.batch == 1 else f"A step of {ceiling.batch} tokens reads"
    return (
        f"Memory reads reach {ceiling.bytes_per_second / 1e9:.1f} GB/s. {reads} {_size(ceiling.step.weights)} of "
        f"weights and, at context {context}, {_size(ceiling.step.cache)} of keys and values: at most "
        f"{ceiling.tokens_per_second:.1f} tokens/s."
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
