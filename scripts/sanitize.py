"""Run the tests of the C++ kernels with sanitizers: `make sanitize`.

Builds the extension module with the address and undefined-behaviour sanitizers in build/sanitize, and runs the tests
of whatever calls it with it in the place of the installed one: operations, runner, quantization, the kernels' layer of
the Hugging Face classes. Also builds and runs the programs of csrc/tests, which test the thread pool and the operations
of training, with the thread sanitizer. Needs GCC, CMake and nanobind.

Arguments after the script's name are given to pytest. As a pytest plugin (`-p sanitize`) this file loads the module
that OLMOE_TEST_KERNELS names.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "sanitize"
VARIABLE = "OLMOE_TEST_KERNELS"
NAME = "olmoe.ops.cpu._kernels"


def use_kernels(path: str) -> None:
    """Load the extension module from `path`, before anything imports the installed one."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    package = importlib.import_module("olmoe.ops.cpu")
    assert NAME not in sys.modules, "the installed kernels are loaded already"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = package._kernels = module  # type: ignore[attr-defined]


def run(*command: str | Path, **environment: str) -> None:
    """Run a command, and end with its exit code if it fails."""
    print("+", *command, flush=True)
    code = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode
    if code:
        sys.exit(code)


def runtime(name: str) -> str:
    """The path of one of the compiler's run-time libraries."""
    return subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def compiler() -> str:
    """The C++ compiler, as CMake finds it."""
    return os.environ.get("CXX", "c++")


def build() -> Path:
    """Build the module with sanitizers; the path of the result."""
    import nanobind

    run(
        "cmake", "-S", ROOT, "-B", BUILD, "-DOLMOE_SANITIZE=ON", f"-Dnanobind_DIR={nanobind.cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler()}",
    )  # fmt: skip
    run("cmake", "--build", BUILD, "--parallel")
    (module,) = BUILD.glob("_kernels*.so")
    return module


def check_threads() -> None:
    """The programs of csrc/tests under the thread sanitizer, which Python and torch could not run under.

    GNU's OpenMP library, whose threads training borrows from torch, would be reported as one race: the sanitizer does
    not see how it orders its threads. The programs lend the same operations threads of their own.
    """
    core = sorted((ROOT / "csrc" / "core").glob("*.cpp"))
    training = [ROOT / "csrc" / "ops" / name for name in ("training.cpp", "dispatch.cpp")]
    scalar = sorted((ROOT / "csrc" / "isa" / "scalar").glob("*.cpp"))
    for name, sources in {"threads": core, "training": core + training + scalar}.items():
        test, program = ROOT / "csrc" / "tests" / f"{name}.cpp", BUILD / name
        flags = "-std=c++20", "-g", "-O1", "-fsanitize=thread", "-DOLMOE_ISAS=ISA(scalar)"
        run(compiler(), *flags, test, *sources, "-o", program, "-pthread")
        run(program)


def main() -> None:
    """Build, then run everything."""
    module = build()
    check_threads()
    tests = sys.argv[1:] or [
        "tests/ops",
        "tests/runner",
        "tests/quant",
        "tests/hf/test_kernel_layer.py",
        "tests/hf/test_kernel_layer_changes.py",
    ]
    run(
        # What a sanitizer writes before it ends the process must not be captured.
        sys.executable, "-m", "pytest", "-p", "sanitize", "--capture=sys", *tests,
        # libstdc++ too: the address sanitizer must find its exceptions when it starts.
        LD_PRELOAD=" ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so.6"))),
        # Python and torch leave memory to the system when they end.
        ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        PYTHONPATH=str(Path(__file__).parent),
        **{VARIABLE: str(module)},
    )  # fmt: skip


if __name__ == "__main__":
    main()
elif VARIABLE in os.environ:
    use_kernels(os.environ[VARIABLE])
