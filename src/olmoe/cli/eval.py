"""Score a model on tasks of lm-evaluation-harness; the table of scores goes to stdout.

Tasks are the harness's own, by name or pattern, or your own YAML files. Several scores for one context cost little
more than one: whatever requests have in common is computed once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from olmoe.cli.generate import add_model_arguments, load_model, router_policy

_MIB = 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe eval`."""
    add_model_arguments(parser, positional=True)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        required=True,
        metavar="A,B",
        help="names, patterns such as mmlu_*, or YAML files; `list` prints all of them",
    )
    tasks.add_argument(
        "--include-path",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with your own tasks; may be repeated",
    )
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples in each prompt (default: the task's)"
    )
    tasks.add_argument(
        "--limit", type=float, metavar="N", help="only the first N examples of each task; below 1, that share of them"
    )
    tasks.add_argument("--apply-chat-template", action="store_true", help="put prompts through the chat template")
    tasks.add_argument("--system-instruction", metavar="TEXT", help="a system prompt before each prompt")
    tasks.add_argument(
        "--gen-kwargs",
        metavar="K=V,…",
        help="how texts are generated, in place of the tasks' settings, such as temperature=0.7",
    )
    tasks.add_argument(
        "--seed", type=int, metavar="N", help="for few-shot examples and samples (default: the harness's)"
    )
    tasks.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="allow tasks that run code written by the model"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE.json", help="write the results to a new file")
    output.add_argument(
        "--log-samples", action="store_true", help="with --output: write each example to FILE.samples.TASK.jsonl"
    )
    output.add_argument("--overwrite", action="store_true", help="replace these files if they exist")
    output.add_argument(
        "--bootstrap-iters",
        type=int,
        default=100_000,
        metavar="N",
        help="resamples for standard errors; 0: none (%(default)s)",
    )
    output.add_argument("--quiet", action="store_true", help="no progress bars, and nothing on stderr but errors")
    run = parser.add_argument_group("running")
    run.add_argument("--batch-size", default="auto", metavar="N", help="at most N texts in progress (%(default)s)")
    run.add_argument(
        "--max-length", type=int, metavar="N", help="cut contexts to N tokens (default: the model's context)"
    )
    run.add_argument(
        "--cache-mib", type=int, default=2048, metavar="N", help="memory for keys and values (%(default)s)"
    )
    run.add_argument("--use-cache", metavar="FILE", help="keep answers in FILE_rank0.db, and reuse those already there")
    run.add_argument(
        "--router-policy",
        metavar="FILE",
        help="JSON that bans, pins or boosts experts, or changes their number or weights",
    )


def run(arguments: argparse.Namespace) -> int:
    """Find the tasks, load the model, evaluate, print."""
    _check_extra()
    _prepare(arguments)
    from olmoe.evaluate import tasks

    if arguments.tasks == "list":
        print(tasks.listing(arguments.include_path), end="")
        return 0
    from olmoe.evaluate import results

    limit = _limit(arguments.limit)
    # Everything wrong with files and names is reported before gigabytes are loaded.
    if arguments.output is not None:
        results.check(arguments.output, overwrite=arguments.overwrite)
    manager, names = tasks.find(arguments.tasks.split(","), arguments.include_path)
    found = tasks.evaluate(
        _model(arguments),
        names,
        manager,
        num_fewshot=arguments.num_fewshot,
        limit=limit,
        apply_chat_template=arguments.apply_chat_template,
        system_instruction=arguments.system_instruction,
        gen_kwargs=arguments.gen_kwargs,
        use_cache=arguments.use_cache,
        bootstrap_iters=arguments.bootstrap_iters,
        log_samples=arguments.log_samples,
        confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
        **_seeds(arguments.seed),
    )
    if arguments.output is not None:
        results.write(found, arguments.output, overwrite=arguments.overwrite)
    print(results.table(found), end="")
    return 0


def _check_extra() -> None:
    """Raise `UserError`, with what to install, if the harness is not there."""
    import importlib.util

    from olmoe.errors import UserError

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError('olmoe eval needs lm-evaluation-harness; install it with: pip install "olmoe[ecosystem]"')


def _prepare(arguments: argparse.Namespace) -> None:
    """Settings that other packages read at import, and checks of options that conflict."""
    from olmoe.engine.sampling_params import whole_number
    from olmoe.errors import UserError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.offline:
        os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.quiet or sys.stderr is None or not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # the harness's own bars, which it shows everywhere
    # It warns about every task that leaves a default unchanged.
    logging.getLogger("lm_eval").setLevel(logging.INFO if arguments.verbose else logging.ERROR)
    whole_number("--cache-mib", arguments.cache_mib, least=1)
    whole_number("--bootstrap-iters", arguments.bootstrap_iters, least=0)
    if arguments.num_fewshot is not None:
        whole_number("--num-fewshot", arguments.num_fewshot, least=0)
    if arguments.log_samples and arguments.output is None:
        raise UserError("--log-samples writes files beside --output; give that too.")


def _limit(given: float | None) -> int | float | None:
    """A number of examples, or a share below 1, as the harness takes it."""
    from olmoe.errors import UserError

    if given is None or 0 < given < 1:
        return given
    if given < 1 or given != int(given):
        raise UserError(f"--limit must be a whole number of examples, or a share below 1, not {given:g}.")
    return int(given)


def _seeds(seed: int | None) -> dict[str, int]:
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return {} if seed is None else dict.fromkeys(names, seed)


def _model(arguments: argparse.Namespace) -> Any:
    from olmoe.evaluate import OlmoeLM
    from olmoe.io import hub

    model = OlmoeLM(
        load_model(arguments, cache_bytes=arguments.cache_mib * _MIB),
        revision=arguments.revision,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        router_policy=router_policy(arguments),
        show_progress=not arguments.quiet,
    )
    name = arguments.adapter or arguments.model or hub.SHIPPED_NAME
    model.name = Path(name).resolve().name if os.path.exists(name) else name
    return model
