"""What a process runs on: device, dtype, threads, seeds, and one-time log messages."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import logging
import operator
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from olmoe.errors import UserError

if TYPE_CHECKING:
    import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")

log = logging.getLogger("olmoe")

MAX_THREADS = 1024
_OTHER_FILES = 512  # open files other than those that a caller counts


@functools.cache
def log_once(message: str) -> None:
    """Log `message` at INFO level, once per process however often it is called."""
    log.info(message)


def inference_mode(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate `function` to run in torch's inference mode, which an interrupt leaves as it found it.

    `torch.inference_mode` enters and leaves in Python, where Ctrl-C may arrive between the two halves; of two nested
    ones the inner is then taken back after the outer, and a notebook is left in inference mode for good. Here the
    `with` statement calls C++ itself, and nothing is nested. A generator is in this mode while it computes.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*args: _P.args, **kwargs: _P.kwargs) -> Iterator[Any]:
            with contextlib.closing(function(*args, **kwargs)) as iterator:
                step, end = inference_mode(next), object()
                while (value := step(iterator, end)) is not end:
                    yield value

        return cast("Callable[_P, _R]", steps)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import torch

        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch._C._InferenceMode(True):
            return function(*args, **kwargs)

    return call


def outside_inference_mode() -> AbstractContextManager[None]:
    """A context for tensors that are to be written to in any mode afterwards; for interrupts see `inference_mode`."""
    import torch

    return torch._C._InferenceMode(False)  # kept in no variable: a traceback would keep it on


def no_grad(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate `function` (no generator) to run without gradients, which an interrupt leaves as it found them.

    `torch.no_grad` calls functions of its own in Python before and after: an interrupt there leaves a notebook without
    gradients for good. Python looks for signals after a call, not before one: here that is always within `try`.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import torch

        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return call


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA if available, else the CPU; any other name, or a torch device, is used as given.

    Raises `UserError` for an unknown name or for a device that this machine lacks.
    """
    import torch

    if isinstance(name, torch.device):
        name = str(name)
    if name == "auto":
        chosen = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        log_once(f"device: {chosen} (chosen automatically)")
        return chosen
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or str(device) != name:  # torch reads cuda:256 as cuda:0
        raise UserError(f"Unknown device {name!r}; use auto, cpu, cuda or cuda:N.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"Device {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return torch.device("cpu")  # torch takes cpu:3 and ignores the number
    if not torch.cuda.is_available():
        raise UserError(f"Device {name!r} was asked for, but this torch sees no CUDA GPU; use cpu.")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(
            f"Device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs, from cuda:0."
        )
    return device


# Weight formats that people ask for as a dtype -> the format that `olmoe quantize` makes.
_PACKED_DTYPES = {
    **dict.fromkeys(("int8", "8bit", "8-bit", "q8_0", "fp8", "float8_e4m3fn"), "int8"),
    **dict.fromkeys(("int4", "4bit", "4-bit", "nf4", "fp4", "q4_k_m"), "int4"),
    "int4-high": "int4-high",
    "q4_0": "q4_0",
}


def resolve_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name; None or `auto` means "as stored". Raises `UserError` for others."""
    import torch

    if name is None or name == "auto":
        return None
    table = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if isinstance(name, torch.dtype):
        if name in table.values():
            return name
    elif name in table:
        return table[name]
    packed = _PACKED_DTYPES.get(str(name).lower().removeprefix("torch."))
    hint = f" (for {packed} weights, pack the model with `olmoe quantize SRC DST --format {packed}`)." if packed else ""
    raise UserError(f"Unknown dtype {str(name)!r}; use auto, float32, bfloat16 or float16.{hint}")


def set_threads(count: int | None) -> int:
    """Use `count` CPU threads in torch (None: leave as it is) and return the number in use."""
    import torch

    if count is not None:
        # OpenMP kills the process when the system refuses another thread, so the number is bounded here.
        try:
            number = operator.index(count)
        except TypeError:
            number = 0
        if isinstance(count, bool) or not 1 <= number <= MAX_THREADS:
            raise UserError(f"The number of threads must be from 1 to {MAX_THREADS}, not {count!r}.")
        torch.set_num_threads(number)
    return torch.get_num_threads()


def cpu_multiplies_bf16() -> bool:
    """Whether torch multiplies bf16 matrices fast on this CPU: it has AVX512-BF16 or AMX, and oneDNN may use them.

    Elsewhere torch's bf16 product runs at a fraction of its fp32 speed, so `ops` converts weights to fp32
    part by part instead. The answer follows `torch.backends.mkldnn` and `ONEDNN_MAX_CPU_ISA`.
    """
    import torch

    return bool(torch.backends.mkldnn.enabled) and _bf16_instructions()


def cpu_has_amx() -> bool:
    """Whether the CPU multiplies tiles of bf16 matrices (AMX), which torch uses and our kernels do not."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


@functools.cache
def _bf16_instructions() -> bool:
    """Whether the CPU has bf16 matrix instructions that oneDNN is allowed to use."""
    import torch

    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit and "BF16" not in limit and "AMX" not in limit and limit not in ("ALL", "DEFAULT"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or cpu_has_amx())


def keep_freed_memory(*, large: bool = False) -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel after every tensor.

    A training step allocates and frees the same large tensors over and over; page faults for them cost
    a quarter of a small model's step. glibc still gives back what has 32 MB or more, unless `large` memory is to be
    kept too, as the gradients of wide experts need. Without glibc this does nothing.
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # M_TRIM_THRESHOLD and so on, of malloc.h
    mallopt(mmap_threshold, 32 * 2**20)  # the most that glibc accepts
    mallopt(trim_threshold, 2**31 - 1)
    if large:
        mallopt(mmap_max, 0)


def _c_library() -> Any:
    """The C library of this process, or None: on Windows a library has to be named."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def available_memory_bytes() -> int | None:
    """Bytes that can still be allocated without evicting other processes' memory; None if the system does not say."""
    free, limit = _memory_of_system("MemAvailable"), _memory_of_group("memory.max")
    if free is None or limit is None:
        return free
    # Cached files count as the group's memory, but are evicted when it is needed.
    used = (_memory_of_group("memory.current") or 0) - (_memory_of_group("memory.stat", "inactive_file ") or 0)
    return max(min(free, limit - used), 0)


def total_memory_bytes() -> int | None:
    """Bytes that this process could have if it ran alone; None if the system does not say."""
    total, limit = _memory_of_system("MemTotal"), _memory_of_group("memory.max")
    return total if total is None or limit is None else min(total, limit)


def _memory_of_system(name: str) -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return None


def _memory_of_group(file: str, field: str = "") -> int | None:
    """A number that Linux keeps for the control group of a container or service; None if there is no limit."""
    try:
        group = next(
            line[3:].strip() for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
        )
        lines = Path(f"/sys/fs/cgroup{group}", file).read_text().splitlines()
        return next(int(line.removeprefix(field)) for line in lines if line.startswith(field))
    except (OSError, StopIteration, ValueError):  # an older system; the outermost group; "max"
        return None


def allow_open_files(count: int) -> None:
    """Let this process open `count` files on top of those it needs otherwise, as far as the system allows."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit on mapped files
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far, in bytes; 0 if the system does not say."""
    # /proc first, for Linux passes ru_maxrss on: a small process started by a big one would show the big one's.
    return _peak_of_proc() or _peak_of_windows() or _peak_of_usage()


def _peak_of_proc() -> int:
    """Linux."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class _WindowsMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_resident", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    )


def _peak_of_windows() -> int:
    """Windows."""
    system = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    if system is None:
        return 0
    system.GetCurrentProcess.restype = ctypes.c_void_p  # an int would cut the handle
    memory = _WindowsMemory(ctypes.sizeof(_WindowsMemory))
    process = ctypes.c_void_p(system.GetCurrentProcess())
    done = system.K32GetProcessMemoryInfo(process, ctypes.byref(memory), memory.size)
    return int(memory.peak_resident) if done else 0


def _peak_of_usage() -> int:
    """macOS and other systems of the Unix family."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def without_garbage_collection(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate `function` to run without collections of cyclic garbage: one that makes many objects and no garbage.

    A full collection visits all of torch's objects, which takes 80 ms: most of the time to load a packed checkpoint.
    An interrupt leaves it as it was; see `no_grad`.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        enabled = gc.isenabled()
        try:
            gc.disable()
            return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return call


def advise_large_pages(address: int, size: int) -> None:
    """Ask the system to back memory not yet written with pages of 2 MB; does nothing where there are none.

    The page tables of gigabytes of weights in pages of 4 kB fit no cache: without them, decoding in bf16 is a tenth
    faster (docs/journal/2026-11-24-bf16-decoding.md).
    """
    page, advice = 2**21, 14  # MADV_HUGEPAGE of Linux
    start = -(-address // page) * page
    length = (address + size) // page * page - start
    if length <= 0 or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        _c_library().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)  # a refusal changes nothing
