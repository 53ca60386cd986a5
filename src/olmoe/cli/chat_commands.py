"""The commands of `olmoe chat`, lines that start with a slash: what each does to the conversation, and its reply."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from olmoe.engine.conversation import Conversation, dump_messages, parse_messages
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError, shown

# What /set may change: the fields of `SamplingParams` that a person can type.
SETTINGS = (
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
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "stop_token_ids",
)

HELP = """\
/system TEXT      set the system prompt; without TEXT it shows the prompt, and /system - removes it
/set NAME VALUE   change a sampling setting, such as temperature 0.7; /set alone lists them; VALUE "default" resets
/experts          which experts each layer used for the last answer
/retry            another answer to the last message
/undo             take back the last message and its answer
/reset            forget everything but the system prompt
/save FILE        write the messages as JSON; /save --overwrite FILE replaces a file
/load FILE        continue from messages in JSON
/exit             leave; Ctrl-D does as well
A message may have several lines: press Alt-Enter, or end a line with \\. Ctrl-C stops an answer.
To send a message that starts with a slash, type two."""


class Leave(Exception):
    """/exit was typed."""


class Commands:
    """Runs commands on a conversation. `show` prints a heat map or a text for the person who typed them."""

    def __init__(self, conversation: Conversation, say: Callable[[str], None], expert_map: Callable[[Any], str]):
        self._conversation, self._say, self._expert_map = conversation, say, expert_map
        self._file: Path | None = None  # where it was saved or loaded
        self._names: dict[str, Callable[[str], Iterator[str] | None]] = {
            "help": self._help,
            "system": self._system,
            "set": self._set,
            "experts": self._experts,
            "retry": self._retry,
            "undo": self._undo,
            "reset": self._reset,
            "save": self._save,
            "load": self._load,
            "exit": self._exit,
            "quit": self._exit,
        }

    @property
    def names(self) -> list[str]:
        """The names of all commands, slash included."""
        return [f"/{name}" for name in self._names]

    def run(self, line: str) -> Iterator[str] | None:
        """Run the command in `line`; returns the answer it asks for, if any. Raises `UserError`, `Leave` for /exit."""
        name, _, rest = line[1:].partition(" ")
        command = self._names.get(name.strip())
        if command is None:
            raise UserError(f"There is no command {shown('/' + name.strip())}; /help lists them.")
        return command(rest.strip())

    # ---- each of them ----

    def _help(self, _: str) -> None:
        self._say(HELP)

    def _exit(self, _: str) -> None:
        raise Leave

    def _system(self, text: str) -> None:
        conversation = self._conversation
        if text:
            conversation.system = None if text == "-" else text
        prompt = conversation.system
        self._say("There is no system prompt." if prompt is None else f"The system prompt is: {prompt}")

    def _set(self, text: str) -> None:
        if not text:
            for name in SETTINGS:
                self._say(f"{name:<20} {_written(getattr(self._conversation.params, name))}")
            return
        name, _, value = text.partition(" ")
        name = name.lstrip("-").replace("-", "_")
        if name not in SETTINGS:
            raise UserError(f"There is no setting {shown(name)}; /set alone lists them.")
        if not value.strip():
            raise UserError(f"/set {name} needs a value; for example /set temperature 0.7.")
        self._conversation.params = with_setting(self._conversation.params, name, value.strip())
        self._say(f"{name} is {_written(getattr(self._conversation.params, name))}.")

    def _experts(self, _: str) -> None:
        self._say(self._expert_map(self._conversation.expert_use()))

    def _retry(self, _: str) -> Iterator[str]:
        params = self._conversation.params
        pieces = self._conversation.retry()
        if params.temperature == 0 or params.seed is not None:
            cause, remedy = ("seed", "default") if params.temperature else ("temperature", "0.7")
            value = _written(getattr(params, cause))
            self._say(f"With {cause} {value} the answer stays the same; /set {cause} {remedy} gives others.")
        return pieces

    def _undo(self, _: str) -> None:
        question = self._conversation.undo()
        first = question.split("\n")[0][:60]
        self._say(f"Taken back: {first}{'' if first == question else ' ...'}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        kept = " The system prompt stays." if self._conversation.system is not None else ""
        self._say(f"The chat starts again.{kept}")

    def _save(self, text: str) -> None:
        from olmoe.io import atomic, targets

        words = _words(text)
        overwrite = words[:1] == ["--overwrite"]
        path = self._path(words[1:] if overwrite else words, "/save")
        if path != self._file:  # our own file may be written again
            targets.check_file(path, overwrite=overwrite, option="/save")
        atomic.write_text(path, dump_messages(self._conversation.messages))
        self._file = path
        self._say(f"{len(self._conversation.messages)} messages are in {path}.")

    def _load(self, text: str) -> None:
        path = self._path(_words(text), "/load")
        self._conversation.replace(read_messages(path))
        self._file = path
        self._say(f"{len(self._conversation.messages)} messages were read from {path}.")

    def _path(self, words: list[str], command: str) -> Path:
        if not words and self._file is not None and command == "/save":
            return self._file
        if len(words) != 1:
            raise UserError(
                f"{command} needs the name of one file, not {len(words)}; put quotes around a name with spaces."
            )
        return Path(os.path.expanduser(words[0]))


def read_messages(path: Path) -> list[dict[str, Any]]:
    """The messages in a file that /save wrote, or in any file in OpenAI's format."""
    from olmoe.io.text_file import read_text

    if path.is_char_device():  # which may have no end
        raise UserError(f"{path} is a device; give a file that /save wrote.")
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"There is no file {shown(str(path))}; check its name.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); give a file that /save wrote.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); give another file.") from None
    return parse_messages(text, str(path))


def with_setting(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """`params` with one value changed as typed: JSON, True or False, "default", or plain text. Raises `UserError`."""
    if text.lower() in ("default", "none", "null"):
        value: Any = getattr(SamplingParams(), name)
    elif text.lower() in ("true", "false"):
        value = text.lower() == "true"
    else:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
    if name == "stop" and not isinstance(value, list | tuple):
        value = [value if isinstance(value, str) else text]
    return dataclasses.replace(params, **{name: value})


def _written(value: object) -> str:
    """A setting as /set takes it."""
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _words(text: str) -> list[str]:
    """The words of a command, split as a shell splits them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{shown(text)} cannot be read ({str(error).rstrip('.')}); close its quotes.") from None
