"""Generating with the C++ kernels: backends by name, threads, forks, interrupts, and missing kernels."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from conftest import make_model
from olmoe.cli.main import main
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.engine.scheduler import Scheduler
from olmoe.errors import BackendUnavailableError, UserError
from olmoe.model import DecoderLayer
from olmoe.ops import cpu
from olmoe.runner import CpuRunner, TorchRunner, require_backend
from packed_folders import WHOLE, packed_folder
from sentences import refused

needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f"{cpu.unavailable()}")
GREEDY = SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True)
PROMPTS = ["Once upon a time there was a little girl.", "The dog", "One day the girl and the dog went"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    """A packed checkpoint with its tokenizer; `folder`-plain beside it is the unpacked one."""
    return packed_folder(tmp_path_factory.mktemp("llm") / "int4", "int4", tokenizer_file, **WHOLE)


@pytest.fixture
def plain(folder):
    return folder.with_name(f"{folder.name}-plain")


def texts(llm):
    return [completion.token_ids for completion in llm.generate(PROMPTS, GREEDY)]


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- by name ----


@needs_kernels
def test_every_backend_generates_the_same_text(plain, tokenizer):
    """In fp32, with margins between tokens larger than rounding errors."""
    expected = texts(LLM(plain, dtype="float32", backend="reference"))
    for backend in ("auto", "cpu", "torch"):
        assert texts(LLM(plain, dtype="float32", backend=backend)) == expected
    model = make_model(**WHOLE)
    assert texts(LLM.from_parts(model, tokenizer, backend="cpu")) == texts(
        LLM.from_parts(model, tokenizer, backend="torch")
    )


@needs_kernels
@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
def test_the_chosen_backend_does_the_computing(folder, backend, monkeypatch):
    """With the kernels, no torch module runs at all."""
    llm = LLM(folder, backend=backend)
    kernels = backend in ("auto", "cpu")
    assert type(llm._runner) is (CpuRunner if kernels else TorchRunner)
    if kernels:
        monkeypatch.setattr(DecoderLayer, "forward", None)
    assert all(len(ids) == 20 for ids in texts(llm))


@needs_kernels
def test_a_prompt_gets_the_same_ids_alone_and_batched(folder):
    llm = LLM(folder, backend="cpu")
    assert texts(llm) == [llm.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]


def test_unknown_backends_are_refused_before_anything_is_loaded(tmp_path, capsys):
    message = refused(lambda: LLM(tmp_path / "missing", backend="gpu"), UserError)
    assert "'gpu'" in message
    assert main(["generate", "Once", "--backend", "gpu", "--model", str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err == f"olmoe: {message}\n"


@needs_kernels
def test_the_command_line_accepts_a_backend(plain, capsys):
    written = []
    for backend in ("auto", "cpu", "torch", "reference"):
        arguments = ["generate", PROMPTS[0], "--model", str(plain), "--dtype", "float32", "--backend", backend]
        assert main([*arguments, "--temperature", "0", "--max-new-tokens", "8", "--quiet"]) == 0
        written.append(capsys.readouterr().out)
    assert len(set(written)) == 1
    assert written[0].startswith(PROMPTS[0])


@needs_kernels
def test_models_unsupported_by_the_kernels_run_on_torch(tokenizer):
    model = make_model(hidden_act="gelu")
    assert texts(LLM.from_parts(model, tokenizer)) == texts(LLM.from_parts(model, tokenizer, backend="torch"))
    message = refused(lambda: LLM.from_parts(model, tokenizer, backend="cpu"), BackendUnavailableError)
    assert "activation" in message


def test_several_llms_may_share_one_model(tokenizer):
    """A second `LLM` does not affect the first, and changes of the model take effect on recompiling."""
    model = make_model(**WHOLE)
    llm = LLM.from_parts(model, tokenizer)
    expected, runner = texts(llm), llm._runner
    LLM.from_parts(model, tokenizer, backend="reference")
    assert llm._runner is runner
    assert texts(llm) == expected
    model.lm_head.weight = torch.nn.Parameter(torch.roll(model.lm_head.weight.detach(), 1, 0))
    assert texts(llm) == expected
    llm.recompile()
    assert texts(llm) != expected
    assert texts(llm) == texts(LLM.from_parts(model, tokenizer, backend="reference"))


# ---- threads, forks, interrupts ----


@needs_kernels
def test_two_threads_can_generate_concurrently(folder, set_threads):
    """With a shared model and with one each."""
    set_threads(2)
    llm, other = LLM(folder, backend="cpu"), LLM(folder)
    expected, results = texts(llm), {}

    def work(name, llm):
        results[name] = [texts(llm) for _ in range(3)]

    workers = [threading.Thread(target=work, args=item) for item in enumerate((llm, llm, other))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert list(results.values()) == [[expected] * 3] * 3


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are Unix's")
def test_a_forked_child_can_generate(folder, set_threads):
    """The parent's pool has threads that the child lacks.

    torch's own OpenMP threads do not survive either: a child must tell torch to use one (as its data loaders do). That
    our pool's do is in tests/ops/cpu/test_extension.py.
    """
    set_threads(2)
    llm = LLM(folder, backend="cpu")
    expected = texts(llm)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            set_threads(1)
            code = 0 if texts(llm) == expected else 2
        finally:
            os._exit(code)
    timer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    timer.start()
    status = os.waitpid(child, 0)[1]
    timer.cancel()
    assert os.waitstatus_to_exitcode(status) == 0
    assert texts(llm) == expected


def interrupted(llm, milliseconds):
    # Repeated, because Python drops exceptions raised in a destructor.
    signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000, 1)
    try:
        while True:
            texts(llm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@needs_kernels
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers with signals are Unix's")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the signal may arrive in a destructor
def test_the_kernels_work_after_an_interrupt(folder, set_threads):
    """At any point of a step: the signal arrives a little later each time."""
    set_threads(2)
    llm = LLM(folder, backend="cpu")
    expected, before = texts(llm), signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for milliseconds in range(1, 12, 2):
            with pytest.raises(KeyboardInterrupt):
                interrupted(llm, milliseconds)
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert texts(llm) == expected
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_interrupt_during_scheduling_leaves_the_engine_usable(plain, monkeypatch):
    """The caller sees Ctrl-C, and the next call works."""
    llm = LLM(plain, dtype="float32")
    expected = texts(llm)

    def interrupting(self, sequence, matched, blocks):
        sequence.blocks = blocks  # the sequence has left the waiting queue and is not running yet
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "_start", interrupting)
    with pytest.raises(KeyboardInterrupt):
        texts(llm)
    monkeypatch.undo()
    assert texts(llm) == expected


# ---- without a compiler ----


def test_without_kernels_torch_generates_and_one_warning_is_logged(folder, plain, absent, caplog):
    assert texts(LLM(plain, dtype="float32")) == texts(LLM(plain, dtype="float32", backend="torch"))
    assert texts(LLM(folder)) == texts(LLM(folder, backend="torch"))
    assert len([record for record in caplog.records if "C++" in record.message]) == 1


def test_requesting_missing_kernels_is_an_error(plain, tokenizer, absent, capsys):
    message = refused(lambda: LLM(plain, backend="cpu"), BackendUnavailableError)
    assert "not installed" in message
    assert "torch" in message
    refused(lambda: LLM.from_parts(make_model(), tokenizer, backend="cpu"), BackendUnavailableError)
    refused(lambda: require_backend("cpu"), BackendUnavailableError)
    capsys.readouterr()
    assert main(["generate", "Once", "--model", str(plain), "--backend", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
