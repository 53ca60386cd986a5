"""Chat with a model in the terminal: answers stream, Ctrl-C stops one, /help lists the commands.

Without a terminal each line of stdin is a message, and stdout has only the answers. Sampling has the defaults of
`SamplingParams` in Python, which are greedy; --temperature 0.7 --top-p 0.95 makes for livelier chats.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from olmoe.cli.generate import SAMPLING, add_model_arguments, add_sampling_arguments, load_model, router_policy
from olmoe.engine.sampling_params import SamplingParams
from olmoe.io import hub

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from olmoe.cli.chat_commands import Commands
    from olmoe.engine.conversation import Conversation

# When less than this share of the context is left, a remark after each answer says so.
_LITTLE = 0.25


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `olmoe chat`."""
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--load", metavar="FILE", help="continue from messages in JSON, as /save writes them")
    parser.add_argument("--no-history", action="store_true", help="do not keep the messages typed for the next chat")
    parser.add_argument("--quiet", action="store_true", help="no remarks, only answers and errors")
    add_model_arguments(parser, default=hub.SHIPPED_CHAT_NAME)
    add_sampling_arguments(parser.add_argument_group("sampling"))


def run(arguments: argparse.Namespace) -> int:
    """Load the model and chat until the user leaves or stdin ends."""
    from pathlib import Path

    from olmoe.cli.chat_commands import Commands, read_messages
    from olmoe.engine.conversation import Conversation
    from olmoe.errors import UserError

    if sys.stdin is None:
        raise UserError("The messages come from a terminal or from stdin, which is closed; open it.")
    given = {name: getattr(arguments, name) for name in SAMPLING if name != "logprobs"}
    policy = router_policy(arguments)
    params = SamplingParams(**given, ignore_eos=arguments.ignore_eos, routing=True, router_policy=policy)
    # A mistake in a file must be reported before gigabytes of weights are loaded.
    messages = [] if arguments.load is None else read_messages(Path(os.path.expanduser(arguments.load)))

    from olmoe.runtime import keep_freed_memory

    keep_freed_memory()
    if arguments.model is None and arguments.adapter is None:
        arguments.model = hub.SHIPPED_CHAT_NAME
    llm = load_model(arguments, prefix_cache=True)
    # The cache is for one chat: all of it, and what was taken back.
    llm.cache_bytes = min(llm.cache_bytes, 2 * llm.context_length * llm.runner.position_bytes)
    conversation = Conversation(llm, params, system=arguments.system, messages=messages)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    remark = _silent if arguments.quiet else _to_stderr
    taught = hub.folder_or_id(arguments.model) == str(hub.SHIPPED_CHAT)  # it learned OLMoE's template
    if conversation.default_template and not taught:
        remark("The chat template is OLMoE-Instruct's, the default; a base model may simply continue the text.")
    commands = Commands(conversation, print if terminal else _to_stderr, _draw)
    if not terminal:
        return _answer_lines(conversation, commands, remark)
    return _talk(conversation, commands, remark, keep=not arguments.no_history)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _draw(use: npt.NDArray[np.float64]) -> str:
    """A heat map that fits the terminal, in characters it can show."""
    from olmoe.cli.expert_map import PLAIN_SHADES, SHADES, expert_map

    try:
        SHADES.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return expert_map(use, shutil.get_terminal_size().columns, PLAIN_SHADES)
    return expert_map(use, shutil.get_terminal_size().columns)


# ---- a terminal ----


def _talk(conversation: Conversation, commands: Commands, remark: Callable[[str], None], *, keep: bool) -> int:
    from olmoe.cli.chat_commands import Leave
    from olmoe.cli.chat_terminal import Reader, history_file
    from olmoe.errors import UserError

    reader = Reader(commands.names, lambda: _status(conversation), history_file() if keep else None)
    remark("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            text = reader.read()
        except KeyboardInterrupt:
            remark("Ctrl-D or /exit leaves.")
            continue
        except EOFError:
            return 0
        try:
            if (pieces := _pieces(text, conversation, commands)) is not None:
                _show(pieces, conversation, remark)
        except Leave:
            return 0
        except KeyboardInterrupt:  # before the answer had started
            remark("Stopped; nothing was sent.")
        except UserError as error:
            _to_stderr(str(error))


def _status(conversation: Conversation) -> str:
    return f"{conversation.left} of {conversation.context_length} tokens left | /help"


def _show(pieces: Iterator[str], conversation: Conversation, remark: Callable[[str], None]) -> None:
    from olmoe.cli.chat_terminal import show_answer

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        finished = show_answer(pieces, write)
    finally:
        print(flush=True)
    if said := _remark(conversation) if finished else "The answer was stopped; what it said stays.":
        remark(said)


# ---- no terminal ----


def _answer_lines(conversation: Conversation, commands: Commands, remark: Callable[[str], None]) -> int:
    """Each line of stdin is a message or a command. The first error ends the run: later lines may depend on it."""
    from olmoe.cli.chat_commands import Leave

    try:
        for text in _read_lines():
            if (pieces := _pieces(text, conversation, commands)) is None:
                continue
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            finally:
                print(flush=True)
            if said := _remark(conversation):
                remark(said)
    except Leave:
        pass
    return 0


def _read_lines() -> Iterator[str]:
    r"""The messages on stdin; a \ at a line's end joins it to the next. Raises `UserError` if they are not UTF-8."""
    from olmoe.errors import UserError

    begun: list[str] = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"Line {number} of stdin is not UTF-8 ({error}); convert it first.") from None
        if text.endswith("\\"):
            begun.append(text[:-1])
            continue
        yield "\n".join([*begun, text])
        begun = []
    if begun:
        yield "\n".join(begun)


# ---- both ----


def _pieces(text: str, conversation: Conversation, commands: Commands) -> Iterator[str] | None:
    """The answer that a message or a command asks for; None for an empty message and for commands without one."""
    if not text.strip():
        return None
    if text.startswith("/") and not text.startswith("//"):
        return commands.run(text)
    return conversation.ask(text[1:] if text.startswith("//") else text)


def _remark(conversation: Conversation) -> str:
    """What a reader should know after an answer; empty if nothing."""
    answer, whole = conversation.last, conversation.context_length
    if answer is None:
        return ""
    if conversation.cut_by_context:
        return f"The answer was cut by the end of the context of {whole} tokens; /reset starts again."
    said = []
    if not answer.text.strip():
        said.append("The answer is empty: the model ended it at once; set another temperature and /retry.")
    elif answer.finish_reason == "length":
        tokens = len(answer.token_ids)
        said.append(f"The answer was cut after {tokens} tokens; /set max_new_tokens {2 * tokens} allows more.")
    if (left := conversation.left) < _LITTLE * whole:
        said.append(f"{left} of {whole} tokens of the context are left; /reset starts again.")
    return "\n".join(said)
