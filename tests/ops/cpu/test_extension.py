"""The compiled module: instruction sets, threads, forks, and doing without it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from olmoe import ops
from olmoe.errors import BackendUnavailableError, UserError
from olmoe.ops import cpu
from olmoe.ops.cpu import extension
from ops.cpu.matrices import random
from sentences import refused

WEIGHT = random(300, 256)


def product(x):
    return ops.linear(x, WEIGHT, backend="cpu")


def test_the_scalar_kernels_always_exist_and_come_last(isa):
    assert cpu.isas()[-1] == "scalar"
    assert cpu.isa() == isa
    message = refused(lambda: cpu.set_isa("avx9000"))
    assert "'avx9000'" in message
    assert "scalar" in message
    assert cpu.isa() == isa


def test_every_instruction_set_has_a_complete_folder():
    """It has all that CONTRIBUTING.md asks for, and the build has no other list of instruction sets."""
    root = Path(__file__).parents[3]
    if not (root / "csrc").exists():
        pytest.skip("needs a checkout")
    folders = {path.parent.name: path.parent for path in root.glob("csrc/isa/*/isa.cmake")}
    assert set(cpu.isas()) <= set(folders)
    for folder in folders.values():
        assert {"kernels.cpp", "runs.cpp", "vectors.h"} <= {path.name for path in folder.iterdir()}
    elsewhere = [root / "CMakeLists.txt", *root.glob("csrc/core/*"), *root.glob("csrc/ops/*")]
    named = [p.name for p in elsewhere for isa in ("avx2", "avx512") if f"{isa}_" in p.read_text(encoding="utf-8")]
    assert not named, "only its own folder knows an instruction set"


def test_instruction_sets_are_compiled_differently():
    """If two tables were compiled for the same instructions, even the last bits would agree."""
    x, results = random(1, 256, seed=1), {}
    before = cpu.isa()
    for name in cpu.isas():
        cpu.set_isa(name)
        results[name] = product(x)
    cpu.set_isa(before)
    names = list(results)
    assert not any(torch.equal(results[a], results[b]) for a in names for b in names if a < b)


def test_the_pool_has_as_many_threads_as_torch(set_threads):
    for threads in (3, 1, 2):
        set_threads(threads)
        product(random(2, 256))
        assert extension.kernels().get_threads() == threads


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda pid: ())(0)) < 2, reason="needs two cores of Linux")
def test_the_number_of_cores_is_queried_once():
    """Every operation needs the pool; querying each time took a tenth of olmoe-tiny's decoding step."""
    module, cores = extension.kernels(), os.sched_getaffinity(0)
    module.set_threads(0)
    assert module.get_threads() == len(cores)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert module.get_threads() == len(cores)
        module.set_threads(0)
        assert module.get_threads() == 1, "asked again"
    finally:
        os.sched_setaffinity(0, cores)
        extension.kernels()


def test_calls_from_several_threads_take_turns(set_threads):
    """Each with its own number of threads, so that the pool changes between calls."""
    set_threads(2)
    inputs = [random(n, 256, seed=n) for n in (1, 9, 20)]
    expected, wrong, errors = [product(x) for x in inputs], [], []

    def work(number):
        try:
            torch.set_num_threads(number % 3 + 1)
            wrong.extend(n for i in range(30) for n, x in enumerate(inputs) if not torch.equal(product(x), expected[n]))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong
    assert not errors


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are Unix's")
def test_a_fork_while_another_thread_computes_can_compute(set_threads):
    """The child has neither the pool's threads nor the thread that held the lock."""
    set_threads(2)
    x, stop = random(20, 256), threading.Event()
    expected = product(x)

    def busy():
        while not stop.is_set():
            product(x)

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if torch.equal(product(x), expected) else 3)
            assert wait(child) == 0
    finally:
        stop.set()
        worker.join()
    assert torch.equal(product(x), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are Unix's")
def test_a_fork_while_another_thread_trains_can_train():
    """In a separate process that never uses the pool: training operations run on torch's threads."""
    script = """
import os, sys, threading
import torch
from olmoe import ops

torch.set_num_threads(2)
x, weight, stop, started = torch.ones(400, 600), torch.ones(600, 600, requires_grad=True), [], threading.Event()

def busy():
    while not stop:
        ops.linear(x, weight)
        started.set()

worker = threading.Thread(target=busy)
worker.start()
started.wait()
for _ in range(20):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if float(ops.linear(x[:1, :8], weight[:4, :8])[0, 0]) == 8 else 3)
    timer = threading.Timer(60, os.kill, (child, 9))
    timer.start()
    status = os.waitpid(child, 0)[1]
    timer.cancel()
    if status:
        break
stop.append(True)
worker.join()
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=300, check=False).returncode == 0


def wait(child: int, seconds: float = 20.0) -> int:
    """The exit code of a child, which is killed if it hangs."""
    timer = threading.Timer(seconds, os.kill, (child, 9))
    timer.start()
    status = os.waitpid(child, 0)[1]
    timer.cancel()
    return os.waitstatus_to_exitcode(status)


def test_without_the_module_torch_computes_and_one_warning_is_logged(absent, caplog):
    x = random(2, 256)
    for _ in range(3):
        assert torch.equal(ops.linear(x, WEIGHT), ops.linear(x, WEIGHT, backend="torch"))
    lines = [record for record in caplog.records if "C++" in record.message]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING  # shown without --verbose
    assert "runs on torch" in lines[0].message
    assert not cpu.available()
    assert "not installed" in cpu.unavailable()


def test_naming_the_missing_module_is_an_error(absent):
    for call in (lambda: product(random(2, 256)), extension.kernels, cpu.isas, lambda: cpu.set_isa("scalar")):
        assert "not installed" in refused(call, BackendUnavailableError)
    with pytest.raises(UserError, match="'cpu' cannot run route here"):
        ops.route(random(2, 8), 2, backend="cpu")


def test_a_compiler_without_vector_types_gives_a_clear_build_error():
    """Such as MSVC, which does not define __GNUC__: the build fails, and the package installs without kernels."""
    compiler = shutil.which("c++") or shutil.which("g++")
    header = Path(__file__).parents[3] / "csrc" / "core" / "types.h"
    if compiler is None or not header.exists():
        pytest.skip("needs a compiler and a checkout")
    command = [compiler, "-std=c++20", "-E", "-x", "c++", str(header)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    done = subprocess.run([*command, "-U__GNUC__", "-U__clang__"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "vector types of GCC and Clang" in done.stderr
