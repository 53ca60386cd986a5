"""OpenAI's batch files: requests, line by line, and answers, to which a resumed run adds the rest.

A line of the input is `{"custom_id", "method": "POST", "url", "body"}`, a line of the output `{"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}`, in the order in which requests were finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from olmoe.errors import UserError, shown

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")

_ID = "batch_req_"
# Output reaches the disk at least this often, in lines and in seconds.
_SYNC_LINES, _SYNC_SECONDS = 64, 5.0


@dataclass(frozen=True)
class BatchLine:
    """One request of a batch: `number` is its line, from 1, and `body` what its endpoint takes."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


# ---- the input ----


class BatchInput:
    """The requests in a file or on stdin, all checked at construction, and read again for each iteration.

    Only their ids stay in memory. Raises `UserError` with the line's number for anything but a request.
    """

    def __init__(self, source: str | Path) -> None:
        """Open a file; "-" is stdin."""
        self.name = "stdin" if str(source) == "-" else str(source)
        self._file = _spooled_stdin() if str(source) == "-" else _open(Path(source))
        self.custom_ids: dict[str, int] = {}  # to their lines
        try:
            for line in self:
                if line.custom_id in self.custom_ids:
                    first = self.custom_ids[line.custom_id]
                    raise UserError(
                        f"Lines {first} and {line.number} of {self.name} have the same custom_id "
                        f"{shown(line.custom_id)}; each needs its own."
                    )
                self.custom_ids[line.custom_id] = line.number
            if not self.custom_ids:
                raise UserError(f"{self.name} holds no requests; write one JSON object per line.")
        except BaseException:
            self._file.close()
            raise

    def __iter__(self) -> Iterator[BatchLine]:
        """The requests, in the order of their lines; empty lines are skipped."""
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                yield parse_line(data, number, self.name)

    def __len__(self) -> int:
        return len(self.custom_ids)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def parse_line(data: bytes, number: int, name: str) -> BatchLine:
    """A line of the input. Raises `UserError`, which names the line, for anything else."""
    where = f"line {number} of {name}"
    value = _json(data)
    if value is None:
        raise UserError(f"{_first_upper(where)} is not JSON; each line is one object with custom_id, url and body.")
    if not isinstance(value, dict):
        raise UserError(f"{_first_upper(where)} must be an object with custom_id, url and body, not {shown(value)}.")
    custom_id, method, url, body = (value.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise UserError(f"custom_id must be a text in {where}, not {shown(custom_id)}.")
    if method not in (None, "POST"):
        raise UserError(f"method must be POST in {where}, not {shown(method)}.")
    if url not in URLS:
        raise UserError(f"url must be {', '.join(URLS[:-1])} or {URLS[-1]} in {where}, not {shown(url)}.")
    if not isinstance(body, dict):
        raise UserError(f"body must be an object in {where}, not {shown(body)}.")
    return BatchLine(number, custom_id, url, body)


def _json(data: bytes) -> Any:
    """The value of a line; None if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # broken UTF-8 is a ValueError
        return None


def _first_upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _open(path: Path) -> BinaryIO:
    try:
        file = path.open("rb")
        return file if file.seekable() else _spooled(file)  # a pipe, as a shell's <(command) is
    except FileNotFoundError:
        raise UserError(f"There is no batch file {shown(str(path))}; check its name.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The batch file {path} cannot be read ({reason}); give another one.") from None


def _spooled_stdin() -> BinaryIO:
    """All of stdin, in a file that can be read twice."""
    if sys.stdin is None:
        raise UserError("The requests were to come from stdin, which is closed; pipe a file into it.")
    return _spooled(sys.stdin.buffer)


def _spooled(source: BinaryIO) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the input)
    shutil.copyfileobj(source, file)
    return file


# ---- the output ----


def result(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """A line of the output."""
    return {
        "id": _ID + uuid.uuid4().hex,
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body},
        "error": None,
    }


class BatchOutput:
    """The file that answers are appended to; `finished` are the custom ids that were already answered in it.

    A last line that an interrupted run left incomplete is cut off, and its request runs again. Raises `UserError`, and
    leaves the file unchanged, if it holds anything but answers to this batch, or if another run is writing it. Stdout
    ("-") has no earlier answers.
    """

    def __init__(self, target: str | Path, wanted: Collection[str], *, overwrite: bool = False) -> None:
        self.name, self.finished = str(target), dict[str, int]()
        self._unsynced, self._synced = 0, time.monotonic()
        self._disk = self.name != "-"
        if not self._disk:
            self._file: BinaryIO = sys.stdout.buffer
            return
        path = Path(target)
        self._file = _open_for_appending(path)
        try:
            _lock(self._file, path)
            if overwrite:
                self._file.truncate(0)
            self.finished, end = _answers(self._file, path, wanted)
            self._file.truncate(end)
            self._file.seek(end)
        except BaseException:
            self._file.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        """Append an answer."""
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
        self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # lone surrogates, as JSON escapes them
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= _SYNC_LINES or time.monotonic() - self._synced > _SYNC_SECONDS:
            self._sync()

    def _sync(self) -> None:
        if self._disk and self._unsynced:
            os.fsync(self._file.fileno())
        self._unsynced, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """Everything is on the disk when this returns."""
        if not self._disk:
            return
        try:
            self._file.flush()
            self._sync()
        finally:
            with contextlib.suppress(OSError):  # of a full disk, already reported
                self._file.close()

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _open_for_appending(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file() and not path.is_dir():
        # A device may have no end, and a pipe has nothing to continue from.
        raise UserError(f"{path} is not a regular file; choose a file, or - for stdout.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}); choose another place.") from None


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock the file: two runs that append to it would do the same work twice."""
    try:
        import fcntl
    except ImportError:  # Windows has other locks; there it is up to the user
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another olmoe batch is writing {path}; wait for it, or choose another file.") from None
    except OSError:  # a file system without locks
        return


def _answers(file: BinaryIO, path: Path, wanted: Collection[str]) -> tuple[dict[str, int], int]:
    """The status of each custom id that has an answer, and where the last complete line ends."""
    remedy = "choose another file, or start again with --overwrite"
    found, end = dict[str, int](), 0
    file.seek(0)
    for number, data in enumerate(file, 1):
        if not data.endswith(b"\n"):  # incomplete, if it is one of ours
            if not data.startswith(_START[: len(data)]):
                raise UserError(f"Line {number} of {path} is not an answer to a batch; {remedy}.")
            break
        answer = _json(data)
        response = answer.get("response") if isinstance(answer, dict) else None
        custom_id = answer.get("custom_id") if isinstance(answer, dict) else None
        if not isinstance(custom_id, str) or not isinstance(response, dict):
            raise UserError(f"Line {number} of {path} is not an answer to a batch; {remedy}.")
        if custom_id not in wanted:
            raise UserError(
                f"Line {number} of {path} answers the custom_id {shown(custom_id)}, which the input does not have; "
                f"{remedy}."
            )
        found[custom_id] = int(response.get("status_code") or 0)
        end += len(data)
    return found, end


_START = f'{{"id":"{_ID}'.encode()  # how every line written here starts
