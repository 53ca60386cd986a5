"""Other systems, played in a process of its own: what Windows and macOS lack is taken away, then everything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from packed_folders import WHOLE, plain_folder
from training_runs import write_run

# Takes away what the platform lacks, then runs command lines, in the main thread or in another one. Libraries are
# imported before, because they were built for the real system.
PLAY = """
import builtins, ctypes, json, logging, mmap, os, platform, signal, subprocess, sys, threading, types
import huggingface_hub, jinja2, numpy, safetensors, tokenizers, torch, torch._dynamo, tqdm

system, where, commands = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
lacking = ["fcntl", "pwd", "grp", "termios", "resource", "posix"] if system == "win32" else []
for name in [*lacking, "olmoe.ops.cpu._kernels"]:
    sys.modules[name] = None
gone = {os: ["posix_fallocate", "sched_getaffinity", "posix_fadvise"], mmap: ["MADV_HUGEPAGE"]}
if system == "win32":
    gone[os] += ["fork", "getuid", "geteuid", "getpgid", "kill", "mkfifo", "sysconf", "uname", "statvfs"]
    gone[mmap] += [name for name in dir(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]
    msvcrt = sys.modules["msvcrt"] = types.ModuleType("msvcrt")
    msvcrt.LK_NBLCK, msvcrt.LK_UNLCK, msvcrt.locking = 2, 0, lambda descriptor, mode, count: None
    gone[signal] = ["SIGKILL", "SIGUSR1", "SIGHUP", "SIGALRM", "setitimer", "pthread_kill", "pthread_sigmask"]
for module, names in gone.items():
    for name in set(names):
        if hasattr(module, name):
            delattr(module, name)
real_open, real_library = builtins.open, ctypes.CDLL

def without_proc(file, *arguments, **options):
    if str(file).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return real_open(file, *arguments, **options)

def library(name, *arguments, **options):
    if name is None:
        if system == "win32":
            raise TypeError("argument of type 'NoneType' is not iterable")
        return object()
    return real_library(name, *arguments, **options)

builtins.open, ctypes.CDLL, sys.platform = without_proc, library, system

failed = []

def work():
    from olmoe.cli.main import main
    for command in commands:
        code = main(command)
        if code:
            failed.append((command, code))

if where == "main":
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert threading.current_thread() is threading.main_thread()
print("failed:", failed)
"""


def play(system: str, where: str, commands: list[list[str]]) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", PLAY, system, where, json.dumps(commands)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer_file) -> Path:
    return plain_folder(tmp_path_factory.mktemp("platforms") / "plain", tokenizer_file, **WHOLE)


@pytest.mark.parametrize(
    ("system", "where"), [("win32", "main"), ("win32", "another thread"), ("darwin", "another thread")]
)
def test_every_command_runs_on_torch_and_one_line_says_so(system, where, plain, tokenizer_file, tmp_path):
    plain, config = str(plain), str(plain / "config.json")
    lines = [
        ["generate", "--model", plain, "--max-new-tokens", "4", "the dog"],
        ["info", plain],
        ["quantize", plain, str(tmp_path / "int4"), "--format", "int4", "--report", "--tokens", "64"],
        ["generate", "--model", str(tmp_path / "int4"), "--max-new-tokens", "4", "the dog"],
        ["convert", plain, str(tmp_path / "model.gguf")],
        ["quantize", str(tmp_path / "model.gguf"), str(tmp_path / "int8"), "--format", "int8"],
        ["bench", "--random-weights", config, "--prefill", "8", "--decode", "2", "--context", "8", "--repeats", "1"],
        ["train", str(write_run(tmp_path / "run", tokenizer_file))],
    ]
    done = play(system, where, lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "failed: []", done.stderr
    warnings = [line for line in done.stderr.splitlines() if "C++" in line]
    assert len(warnings) == 1, done.stderr
    assert "runs on torch" in warnings[0]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "out" / "best").is_dir()
