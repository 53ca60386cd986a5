"""Continue a prompt: the text streams to stdout; speed, load time and memory go to stderr."""

from __future__ import annotations

import argparse
import sys
import time


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe generate`."""
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    add_model_arguments(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most N tokens (%(default)s)")
    sampling.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (%(default)s)")
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0: all (%(default)s)"
    )
    sampling.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="the fewest tokens of total probability P (%(default)s)"
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="tokens at least P times as likely as the likeliest (%(default)s)",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1 discourages repetition (%(default)s)",
    )
    sampling.add_argument("--seed", type=int, help="the same seed gives the same text")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="do not end at the end-of-text token")
    parser.add_argument("--quiet", action="store_true", help="no speed and memory on stderr")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where a model comes from and what it runs on."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="DIR|HUB_ID", help="a checkpoint folder or hub id (default: the shipped olmoe-tiny)"
    )
    group.add_argument("--revision", help="branch, tag or commit of a hub model")
    group.add_argument("--offline", action="store_true", help="use only what is on this machine")
    group.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16 (%(default)s)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    group.add_argument(
        "--backend",
        default="auto",
        help="auto (C++ kernels where they fit), cpu (those kernels or an error), torch or reference (%(default)s)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")


def _read_stdin() -> str:
    """All of stdin, as it is. Raises `UserError` if there is none or if it is not UTF-8."""
    from olmoe.errors import UserError

    if sys.stdin is None:
        raise UserError("The prompt was to come from stdin, which is closed; pipe a text into it.")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt on stdin is not UTF-8 ({error}); convert it first.") from None


def run(arguments: argparse.Namespace) -> int:
    """Load the model and stream one text."""
    from olmoe.engine.request import SamplingParams
    from olmoe.errors import UserError

    params = SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        stop=arguments.stop,
        ignore_eos=arguments.ignore_eos,
    )
    prompt = _read_stdin() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise UserError("The prompt is empty; give at least one character.")

    started = time.perf_counter()
    from olmoe.engine.llm import LLM
    from olmoe.runtime import keep_freed_memory, peak_memory_bytes, set_threads

    set_threads(arguments.threads)
    keep_freed_memory()
    imported = time.perf_counter()
    llm = LLM(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        backend=arguments.backend,
        revision=arguments.revision,
        local_files_only=arguments.offline,
    )
    loaded = time.perf_counter()
    stream = llm.stream(prompt, params)
    try:
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)  # what follows on a terminal starts on its own line
        raise
    print(flush=True)
    if not arguments.quiet:
        statistics = stream.statistics
        prefill = statistics.prompt_tokens / statistics.prefill_seconds
        decode = statistics.decode_tokens / statistics.decode_seconds if statistics.decode_tokens else 0.0
        print(
            f"import {imported - started:.2f} s | load {loaded - imported:.2f} s | "
            f"prompt {statistics.prompt_tokens} tokens at {prefill:.0f} tokens/s | "
            f"generated {statistics.new_tokens} tokens at {decode:.1f} tokens/s | "
            f"peak memory {peak_memory_bytes() / 1e6:.0f} MB",
            file=sys.stderr,
        )
    return 0
