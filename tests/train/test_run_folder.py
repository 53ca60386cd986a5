"""One process at a time writes into a run, and a killed one does not block the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from olmoe.errors import ConfigError
from olmoe.train import run_folder
from olmoe.train.config import load_config
from olmoe.train.loop import train
from olmoe.train.run_folder import LOCK_NAME, run_lock
from sentences import refused
from training_runs import assert_same_run, write_run

HOLD = """
import sys, time
from pathlib import Path
from olmoe.train.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def take(folder) -> None:
    with run_lock(folder):
        pass


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_told_who_holds_the_lock(holder, tmp_path):
    message = refused(lambda: take(tmp_path), ConfigError)
    assert f"process {holder.pid}" in message
    assert str(tmp_path) in message


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_is_released_however_its_process_ends(holder, tmp_path, how):
    holder.send_signal(how)
    holder.wait()
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_can_be_retaken_and_leaves_no_file(tmp_path):
    for _ in range(3):
        with run_lock(tmp_path):
            assert (tmp_path / LOCK_NAME).read_text(encoding="utf-8") == f"{os.getpid()}\n"
            refused(lambda: take(tmp_path), ConfigError)  # nor may another thread of this process take it
        assert list(tmp_path.iterdir()) == []


def test_no_two_processes_hold_the_lock_at_once(tmp_path):
    """Holders delete the lock file while others open it."""
    inside, most, taken = [], [], []

    def work() -> None:
        for _ in range(200):
            try:
                with run_lock(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    taken.append(1)
                    inside.pop()
            except ConfigError:
                time.sleep(0)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(taken) > 10


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*arguments) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=1, LOCK_NB=2))
    take(tmp_path)
    assert "cannot be locked" in caplog.text


def test_windows_uses_its_own_locking_library(tmp_path, monkeypatch):
    held = set()

    def locking(number: int, mode: int, count: int) -> None:
        place = (os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR))
        if place in held:
            raise OSError(13, "Permission denied")
        held.add(place)

    monkeypatch.setattr(run_folder, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with run_lock(tmp_path):
        assert f"process {os.getpid()}" in refused(lambda: take(tmp_path), ConfigError)
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_second_run_on_the_same_output_is_refused(tmp_path, tokenizer_file):
    reference = write_run(tmp_path / "reference" / "r", tokenizer_file)
    train(load_config(reference), show_progress=False)
    path = write_run(tmp_path / "r", tokenizer_file, schedule={"total_tokens": 64 * 12})
    code = (
        "import sys; from olmoe.cli.main import main; sys.exit(main(['train', sys.argv[1], '--quiet', *sys.argv[2:]]))"
    )
    (tmp_path / "r" / "out").mkdir()
    with run_lock(tmp_path / "r" / "out"):  # the first run, just starting
        for options in ([], ["--resume"]):
            second = subprocess.run(
                [sys.executable, "-c", code, str(path), *options], capture_output=True, text=True, check=False
            )
            assert second.returncode == 2
            assert second.stderr.startswith("olmoe: Another olmoe train")
            assert second.stderr.count("\n") == 1
    train(load_config(path), show_progress=False)
    assert_same_run(tmp_path / "r" / "out", tmp_path / "reference" / "r" / "out")
