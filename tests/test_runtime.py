"""Devices, dtypes, threads and memory by name, and what is refused."""

from __future__ import annotations

import contextlib
import ctypes
import dis
import gc
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from olmoe import runtime
from olmoe.runtime import (
    MAX_THREADS,
    _bf16_instructions,
    cpu_multiplies_bf16,
    inference_mode,
    keep_freed_memory,
    log_once,
    no_grad,
    outside_inference_mode,
    resolve_device,
    resolve_dtype,
    set_threads,
    without_garbage_collection,
)
from sentences import refused


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that torch sees that many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


# ---- devices ----


def test_auto_takes_a_gpu_if_there_is_one(gpus, caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="olmoe"):
        gpus(0)
        assert resolve_device() == resolve_device("auto") == torch.device("cpu")
        gpus(1)
        assert resolve_device("auto") == torch.device("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        "device: cpu (chosen automatically)",
        "device: cuda (chosen automatically)",
    ]


def test_named_devices(gpus):
    gpus(2)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cpu:3") == torch.device("cpu")  # torch has one CPU device, whatever the number
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        assert resolve_device(device) == device
    assert "'meta'" in refused(lambda: resolve_device(torch.device("meta")))
    assert "None" in refused(lambda: resolve_device(None))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gpu",
        "CUDA",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:2",
        "cuda:256",
        "cuda:1000",
        "0",
        "mps",
        "xpu",
        "meta",
        "a\nb",
    ],
)
def test_devices_that_are_not_there(name, gpus):
    gpus(2)
    assert repr(name) in refused(lambda: resolve_device(name))


def test_cuda_without_a_gpu(gpus):
    gpus(0)
    assert "no CUDA GPU" in refused(lambda: resolve_device("cuda"))
    assert "no CUDA GPU" in refused(lambda: resolve_device("cuda:0"))


# ---- dtypes ----


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (["float32", "fp32", torch.float32], torch.float32),
        (["bfloat16", "bf16", torch.bfloat16], torch.bfloat16),
        (["float16", "fp16", torch.float16], torch.float16),
        (["auto", None], None),
    ],
)
def test_dtypes_by_name(names, dtype):
    for name in names:
        assert resolve_dtype(name) is dtype


@pytest.mark.parametrize("name", ["", "float64", "half", "BF16", "int8", "torch.float32", torch.float64, torch.int8])
def test_other_dtypes_are_refused(name):
    assert str(name) in refused(lambda: resolve_dtype(name))


# ---- threads ----


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_threads_are_set_or_left_alone(threads):
    assert set_threads(None) == threads
    assert set_threads(threads + 1) == torch.get_num_threads() == threads + 1
    assert set_threads(1) == 1


@pytest.mark.parametrize("count", [0, -1, MAX_THREADS + 1, 10**10])
def test_numbers_of_threads_that_no_machine_has(count, threads):
    assert str(count) in refused(lambda: set_threads(count))
    assert torch.get_num_threads() == threads


# ---- logging ----


def test_a_message_is_logged_once(caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="olmoe"):
        for message in ("one", "two", "one", "one"):
            log_once(message)
    assert [record.getMessage() for record in caplog.records] == ["one", "two"]


# ---- bf16 ----


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, True),
        ("", True),
        ("ALL", True),
        ("default", True),
        ("AVX512_CORE_BF16", True),
        ("avx512_core_amx", True),
        ("AVX2", False),
        ("avx512_core_vnni", False),
        ("SSE41", False),
    ],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_bf16_follows_the_limit_set_on_onednn(variable, limit, expected, monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv(variable, limit)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    # __wrapped__: the answer is kept for the process, and this test must not change it
    assert _bf16_instructions.__wrapped__() is expected
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert _bf16_instructions.__wrapped__() is False


def test_the_probes_of_the_cpu_exist_in_this_torch():
    assert cpu_multiplies_bf16() in (True, False)


# ---- memory ----


def test_a_group_has_no_more_memory_than_its_limit(monkeypatch):
    """In a container the system's memory is not all one's own."""
    system = {"MemAvailable": 1000, "MemTotal": 4000}
    group = {"memory.max": 500, "memory.current": 300, "memory.stat": 100}
    monkeypatch.setattr(runtime, "_memory_of_system", system.get)
    monkeypatch.setattr(runtime, "_memory_of_group", lambda file, field="": group.get(file))
    assert (runtime.available_memory_bytes(), runtime.total_memory_bytes()) == (300, 500)
    group["memory.max"] = None
    assert (runtime.available_memory_bytes(), runtime.total_memory_bytes()) == (1000, 4000)


def test_peak_memory_sees_what_was_touched_and_does_not_fall():
    code = """
from olmoe.runtime import peak_memory_bytes
peaks = [peak_memory_bytes()]
block = bytearray(100_000_000)
peaks.append(peak_memory_bytes())
del block
print(*peaks, peak_memory_bytes())
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, output.split())
    slack = 1_000_000  # the kernel counts pages in batches
    assert abs(during - before - 100_000_000) < 10 * slack
    assert after > during - slack


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux hands ru_maxrss down to children")
def test_peak_memory_is_not_inherited():
    # The middle process grows to 300 MB and starts a small one, which must not report its parent's size.
    small = "from olmoe.runtime import peak_memory_bytes; print(peak_memory_bytes())"
    middle = f"import subprocess, sys; b = bytearray(300_000_000); subprocess.run([sys.executable, '-c', {small!r}])"
    output = subprocess.run([sys.executable, "-c", middle], capture_output=True, text=True, check=True).stdout
    assert 1_000_000 < int(output) < 200_000_000


def test_peak_memory_of_windows(monkeypatch):
    class Kernel32:
        class GetCurrentProcess:
            restype = None

            def __call__(self):
                assert self.restype is ctypes.c_void_p
                return 2**64 - 1

        GetCurrentProcess = GetCurrentProcess()

        def K32GetProcessMemoryInfo(self, process, memory, size):  # noqa: N802
            assert process.value == 2**64 - 1
            assert size == ctypes.sizeof(ctypes.c_size_t) * 9 == memory._obj.size
            memory._obj.peak_resident = 123_456_789_012
            return self.answers

        answers = 1

    kernel32 = Kernel32()
    monkeypatch.setattr(runtime, "_peak_of_proc", lambda: 0)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runtime.peak_memory_bytes() == 0  # unknown
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    assert runtime.peak_memory_bytes() == 123_456_789_012
    kernel32.answers = 0
    assert runtime.peak_memory_bytes() == 0


def test_peak_memory_of_macos_is_counted_in_bytes(monkeypatch):
    import resource

    monkeypatch.setattr(runtime, "_peak_of_proc", lambda: 0)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 1024 * most <= runtime.peak_memory_bytes() < 1.5 * 1024 * most
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    assert most <= runtime.peak_memory_bytes() < 1.5 * most


def test_a_c_library_that_has_no_name_to_call_it_by_is_done_without(monkeypatch):
    """Windows: `ctypes.CDLL(None)` is a TypeError there."""

    def refuse(name):
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    keep_freed_memory()
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    runtime.advise_large_pages(0, 2**30)


def test_keeping_freed_memory_speaks_to_glibc_or_does_nothing(monkeypatch):
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    keep_freed_memory()
    assert calls == [(-3, 32 * 2**20), (-1, 2**31 - 1)]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # a C library without mallopt
    keep_freed_memory()
    assert len(calls) == 2
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    keep_freed_memory(large=True)
    assert calls[2:] == [*calls[:2], (-4, 0)]


def test_the_module_imports_no_torch():
    code = "import sys, olmoe.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert runtime.log.name == "olmoe"


def test_bf16_is_slow_when_torch_does_not_use_onednn(monkeypatch):
    with torch.backends.mkldnn.flags(enabled=False):
        assert cpu_multiplies_bf16() is False


def test_large_pages_are_asked_for_whole_pages_inside_the_memory(monkeypatch):
    calls = []

    class Libc:
        def madvise(self, start, length, advice):
            calls.append((start.value, length.value, advice))

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    mega = 2**20
    runtime.advise_large_pages(3 * mega, 2 * mega)  # reaches into two pages, and holds none
    runtime.advise_large_pages(4 * mega, 2 * mega - 1)
    assert calls == []
    runtime.advise_large_pages(4 * mega, 2 * mega)
    runtime.advise_large_pages(3 * mega, 6 * mega)
    assert calls == [(4 * mega, 2 * mega, 14), (4 * mega, 4 * mega, 14)]
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    runtime.advise_large_pages(0, 2**30)
    assert len(calls) == 2


def test_a_system_that_refuses_large_pages_does_no_harm():
    block = torch.empty(2**21, dtype=torch.int32)
    runtime.advise_large_pages(block.data_ptr(), 4 * 2**21)
    block.fill_(7)
    assert int(block.sum()) == 7 * 2**21
    runtime.advise_large_pages(2**60, 2**22)  # nobody's memory


@pytest.mark.parametrize(
    ("name", "format"),
    [("int8", "int8"), ("INT8", "int8"), (torch.int8, "int8"), ("q8_0", "int8"), ("int4", "int4"), ("nf4", "int4"),
     ("q4_0", "q4_0"), ("int4-high", "int4-high")],
)  # fmt: skip
def test_a_weight_format_asked_for_as_a_dtype_names_the_command_that_makes_it(name, format):
    assert f"`olmoe quantize SRC DST --format {format}`" in refused(lambda: resolve_dtype(name))
    assert "quantize" not in refused(lambda: resolve_dtype("int3"))


# ---- what an interrupt leaves ----


@inference_mode
def inner():
    return torch.zeros(1)


@inference_mode
def outer():
    inner()
    return inner()


@inference_mode
def both():
    yield inner()
    yield inner()


@inference_mode
def outside():
    with outside_inference_mode():
        inner()
    return torch.zeros(1)


@no_grad
def without():
    outer()
    return (torch.ones(1, requires_grad=True) * 2).requires_grad


@without_garbage_collection
def uncollected():
    return gc.isenabled(), without()


def interrupt(work, number, anywhere=True):
    """Call `work`, and interrupt it at the event of that number (each instruction is one) -> whether there was one.

    Or else at those events where Python looks for signals: after calls, at jumps back, and where functions begin.
    """
    seen, last = 0, {}  # by number: a frame that is kept here would keep its contexts

    def trace(frame, event, arg):
        nonlocal seen
        frame.f_trace_opcodes = True
        before, now = last.get(id(frame), ""), dis.opname[frame.f_code.co_code[max(frame.f_lasti, 0)]]
        last[id(frame)] = now if event == "opcode" else ""  # after a call that raises nobody looks
        if anywhere or event == "call" or (event == "opcode" and (before.startswith("CALL") or now == "JUMP_BACKWARD")):
            seen += 1
            if seen == number:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize(("work", "anywhere"), [(outer, True), (lambda: list(both()), True), (outside, False)])
def test_an_interrupt_anywhere_leaves_no_inference_mode(work, anywhere):
    number = 1
    while interrupt(work, number, anywhere):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        number += 1
    assert number > (50 if anywhere else 15)


@pytest.mark.parametrize("work", [without, uncollected])
def test_an_interrupt_leaves_gradients_and_the_garbage_collector_as_they_were(work):
    number = 1
    while interrupt(work, number, anywhere=False):
        assert torch.is_grad_enabled()
        assert gc.isenabled()
        number += 1
    assert number > 20


def test_inference_mode_computes_without_gradients():
    assert outer().is_inference()
    assert not outer().requires_grad
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        assert outer().is_inference()
        assert torch.is_inference_mode_enabled()
        with outside_inference_mode():
            assert not torch.zeros(1).is_inference()
    with pytest.raises(ZeroDivisionError):
        inference_mode(lambda: 1 / 0)()
    assert not torch.is_inference_mode_enabled()


def test_a_generator_computes_in_inference_mode_and_is_read_outside():
    closed = []

    @inference_mode
    def numbers(count):
        try:
            for number in range(count):
                assert torch.is_inference_mode_enabled()
                yield number
        finally:
            closed.append(count)

    for _ in numbers(2):
        assert not torch.is_inference_mode_enabled()
    assert list(numbers(3)) == [0, 1, 2]
    next(numbers(4))
    assert closed == [2, 3, 4]


def test_no_grad_computes_without_gradients():
    assert without() is False
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert without() is False
        assert not torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError):
        no_grad(lambda: 1 / 0)()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_as_it_was_after_a_pause(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        assert uncollected() == (False, False)
        assert gc.isenabled() == enabled
        with contextlib.suppress(ZeroDivisionError):
            without_garbage_collection(lambda: 1 / 0)()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
