"""Continue a prompt: the text streams to stdout; speed, load time and memory go to stderr.

Sampling has the defaults of `SamplingParams` in Python: greedy, so that the same prompt gives the same text. For
livelier stories, try --temperature 0.7 --top-p 0.95.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from olmoe.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from olmoe.engine.llm import LLM
    from olmoe.engine.request import Completion
    from olmoe.engine.stream import Stream
    from olmoe.runner.policy_file import NamedPolicy

# Options that are fields of `SamplingParams`; those not given keep their defaults.
SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logprobs",
    "min_tokens",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe generate`."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--prompt-file", metavar="FILE", help="read the text to continue from a UTF-8 file, as it is")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="treat the prompt as a message to the assistant: put it through the chat template; show only the answer",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write what would go to stdout to a new file, once complete")
    output.add_argument("--trace", metavar="FILE", help="write which experts each token chose (see olmoe analyze)")
    output.add_argument("--overwrite", action="store_true", help="replace the --output and --trace files if they exist")
    output.add_argument(
        "--json", action="store_true", help="one JSON object: text, ids, log-probabilities, finish reason, timings"
    )
    output.add_argument("--quiet", action="store_true", help="no speed, memory and finish reason on stderr")
    add_model_arguments(parser)
    sampling = parser.add_argument_group("sampling")
    add_sampling_arguments(sampling)
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: also the N likeliest tokens at each position (0)"
    )
    parser.set_defaults(usage_error=parser.error)


def add_sampling_arguments(group: Any) -> None:
    """Declare the options for how tokens are chosen and when a text ends."""
    default = SamplingParams()
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=f"at most N tokens ({default.max_new_tokens})")
    group.add_argument("--temperature", type=float, help=f"0 chooses the likeliest token ({default.temperature})")
    group.add_argument("--top-k", type=int, metavar="K", help=f"only the K likeliest tokens; 0: all ({default.top_k})")
    group.add_argument(
        "--top-p", type=float, metavar="P", help=f"the fewest tokens with total probability P ({default.top_p})"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help=f"tokens at least P times as likely as the likeliest ({default.min_p})"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help=f"above 1 discourages repetition ({default.repetition_penalty})",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        metavar="X",
        help=f"lowers the logits of tokens already in the text ({default.presence_penalty})",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help=f"the same, once for each time they occur ({default.frequency_penalty})",
    )
    group.add_argument("--seed", type=int, help="the same seed gives the same text (a new one each time)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument(
        "--router-policy",
        metavar="FILE",
        help="JSON that bans, pins or boosts experts, or changes their number or weights",
    )
    group.add_argument("--ignore-eos", action="store_true", help="do not end at the end-of-text token")
    group.add_argument("--min-tokens", type=int, metavar="N", help=f"do not end before N tokens ({default.min_tokens})")


def add_model_arguments(
    parser: argparse.ArgumentParser, *, positional: bool = False, default: str = "olmoe-tiny"
) -> None:
    """Declare where a model comes from and what it runs on; `positional` names it without an option.

    `default` is the shipped model that the command takes where none is named.
    """
    what = f"a checkpoint folder or hub id (default: the shipped {default})"
    if positional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=what)
    group = parser.add_argument_group("model")
    if not positional:
        group.add_argument("--model", metavar="DIR|HUB_ID", help=what)
    group.add_argument(
        "--adapter", metavar="DIR", help="a folder with a LoRA adapter for the model (default model: the one it names)"
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
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="DTYPE",
        help="keys and values as float32, bfloat16, float16 or int8; auto is float16 for packed models (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Load the model and stream one text."""
    from olmoe.errors import UserError

    params = _params(arguments)
    target, trace = _targets(arguments)
    prompt = _prompt(arguments)
    if not prompt:
        raise UserError("The prompt is empty; give at least one character.")

    started = time.perf_counter()
    from olmoe.engine import llm as _  # noqa: F401  (torch comes with it)
    from olmoe.runtime import keep_freed_memory

    keep_freed_memory()
    imported = time.perf_counter()
    llm = load_model(arguments)
    seconds = {"import_seconds": imported - started, "load_seconds": time.perf_counter() - imported}
    stream = llm.stream([{"role": "user", "content": prompt}] if arguments.chat else prompt, params, trace=trace)
    completion = _generate(stream, "" if arguments.chat else prompt, show=target is None and not arguments.json)
    if arguments.json:
        import json

        _deliver(json.dumps(_facts(llm, prompt, completion, seconds)), target)
    elif target is not None:
        _deliver(("" if arguments.chat else prompt) + completion.text, target)
    _explain_empty(completion, "answer" if arguments.chat else "continuation")
    if not arguments.quiet:
        print(_summary(stream, completion, seconds), file=sys.stderr)
    return 0


def load_model(arguments: argparse.Namespace, **options: Any) -> LLM:
    """The model that the options of `add_model_arguments` name; `options` are further arguments of `LLM`.

    On a terminal a bar shows progress if loading takes longer than a second.
    """
    from tqdm import tqdm

    from olmoe.engine.llm import LLM

    with tqdm(desc="loading", unit="tensor", delay=1, leave=False, disable=arguments.quiet or None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return LLM(
            arguments.model,
            adapter=arguments.adapter,
            dtype=arguments.dtype,
            device=arguments.device,
            backend=arguments.backend,
            revision=arguments.revision,
            local_files_only=arguments.offline,
            threads=arguments.threads,
            cache_dtype=arguments.kv_cache_dtype,
            progress=progress,
            **options,
        )


# ---- what was asked for ----


def _params(arguments: argparse.Namespace) -> SamplingParams:
    from olmoe.errors import UserError

    if arguments.logprobs is not None and not arguments.json:
        raise UserError(f"--logprobs {arguments.logprobs} needs --json, which shows them; add it.")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in SAMPLING}
    if arguments.json and arguments.logprobs is None:
        given["logprobs"] = 0
    return SamplingParams(**given, ignore_eos=arguments.ignore_eos, router_policy=router_policy(arguments))


def router_policy(arguments: argparse.Namespace) -> NamedPolicy | None:
    """What the file of --router-policy says, if one was given."""
    if arguments.router_policy is None:
        return None
    from olmoe.runner.policy_file import read_policy

    return read_policy(arguments.router_policy)


def _targets(arguments: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The files to write, refused before there is a text that could be lost."""
    from olmoe.errors import UserError

    output = _target(arguments, "output") if arguments.output != "-" else None
    trace = _target(arguments, "trace")
    if arguments.overwrite and output is None and trace is None:
        raise UserError("--overwrite is for the file of --output, which was not given; add it.")
    if output is not None and output == trace:
        raise UserError(f"--output and --trace are both {output}; give each a file of its own.")
    return output, trace


def _target(arguments: argparse.Namespace, option: str) -> Path | None:
    from pathlib import Path

    from olmoe.errors import UserError
    from olmoe.io import targets

    name = getattr(arguments, option)
    if name is None:
        return None
    if not name:
        raise UserError(f"--{option} needs the name of a file, not an empty one.")
    target = Path(os.path.expanduser(name))
    targets.check_file(target, overwrite=arguments.overwrite, option=f"--{option}")
    targets.check_place(target)
    return target


def _prompt(arguments: argparse.Namespace) -> str:
    """The text to continue. Raises `UserError` if it cannot be read."""
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        both = arguments.prompt is not None
        arguments.usage_error(
            "argument --prompt-file: not allowed with argument PROMPT"
            if both
            else "the following arguments are required: PROMPT (or --prompt-file FILE)"
        )
    if "-" in (arguments.prompt, arguments.prompt_file):
        return _read_stdin()
    return arguments.prompt if arguments.prompt_file is None else _read_file(arguments.prompt_file)


def _read_file(name: str) -> str:
    from olmoe.errors import UserError, shown

    path = os.path.expanduser(name)
    try:
        with open(path, "rb") as file:
            return _decode(file.read(), f"in {path}")
    except FileNotFoundError:
        raise UserError(
            f"There is no prompt file {shown(path)}; check its name, or give the text itself as PROMPT."
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The prompt file {path} cannot be read ({reason}); give another one.") from None


def _read_stdin() -> str:
    """All of stdin, as it is. Raises `UserError` if there is none or if it is not UTF-8."""
    from olmoe.errors import UserError

    if sys.stdin is None:
        raise UserError("The prompt was to come from stdin, which is closed; pipe a text into it.")
    return _decode(sys.stdin.buffer.read(), "on stdin")


def _decode(content: bytes, where: str) -> str:
    """UTF-8, unchanged but for a byte order mark, which editors put before a text and which is not part of it."""
    from olmoe.errors import UserError
    from olmoe.io.text_file import decode

    try:
        return decode(content)
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt {where} is not UTF-8 ({error}); convert it first.") from None


# ---- what comes out ----


def _generate(stream: Stream, prompt: str, *, show: bool) -> Completion:
    """The whole text; if `show`, also written to stdout as it comes, after the prompt."""
    from olmoe.errors import UserError

    try:
        if show:
            print(prompt, end="", flush=True)
        for piece in stream:
            if show:
                print(piece, end="", flush=True)
    except (KeyboardInterrupt, UserError):  # such as a full disk at the end of a trace
        if show:
            print(flush=True)  # what follows on a terminal starts on its own line
        raise
    if show:
        print(flush=True)
    assert stream.completion is not None
    return stream.completion


def _deliver(text: str, target: Path | None) -> None:
    from olmoe.io import atomic

    if target is None:
        print(text, flush=True)
    else:
        atomic.write_text(target, text + "\n")


def _facts(llm: LLM, prompt: str, completion: Completion, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything about a completion, for JSON."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        text = llm.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        return {"token_id": token_id, "token": text, "logprob": logprob}

    timings = completion.timings
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "token_ids": completion.token_ids,
        "logprobs": [
            token(each.token_id, each.logprob) | {"top": [token(*pair) for pair in each.top.items()]}
            for each in completion.logprobs or ()
        ],
        "timings": seconds | {"prefill_seconds": timings.prefill_seconds, "decode_seconds": timings.decode_seconds},
    }


def _explain_empty(completion: Completion, what: str) -> None:
    """Say why there is nothing to read, where there is nothing."""
    from olmoe.runtime import log

    if completion.text.strip():
        return
    reasons = {
        "eos": "the model ended the text with its end-of-text token; --ignore-eos continues, a temperature may help",
        "stop": "it began with a --stop text",
        "length": f"its {len(completion.token_ids)} tokens hold no visible text; allow more with --max-new-tokens",
    }
    log.warning("the %s is empty: %s", what, reasons[completion.finish_reason])


def _summary(stream: Stream, completion: Completion, seconds: dict[str, float]) -> str:
    from olmoe.runtime import peak_memory_bytes

    statistics = stream.statistics
    prefill = statistics.prompt_tokens / statistics.prefill_seconds
    decode = statistics.decode_tokens / statistics.decode_seconds if statistics.decode_tokens else 0.0
    return (
        f"import {seconds['import_seconds']:.2f} s | load {seconds['load_seconds']:.2f} s | "
        f"prompt {statistics.prompt_tokens} tokens at {prefill:.0f} tokens/s | "
        f"generated {statistics.new_tokens} tokens at {decode:.1f} tokens/s | "
        f"finish reason {completion.finish_reason} | "
        f"peak memory {peak_memory_bytes() / 1e6:.0f} MB"
    )
