"""Interrupting a run in a process whose signal handlers are not Python's."""

from __future__ import annotations

import signal

import pytest
import torch

from olmoe.train import loop
from olmoe.train.ranks import Ranks
from rank_processes import train_run
from training_runs import at_step, write_run


def test_foreign_signal_handlers_do_not_fail_the_end_of_a_run(monkeypatch):
    """`signal.signal` returns None for those, and refuses None as a handler."""
    installed = []

    def install(number, handler):
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or a callable object")
        installed.append(handler)

    monkeypatch.setattr(signal, "signal", install)
    with loop.catch_interrupts() as received:
        installed[0](int(signal.SIGTERM), None)
        assert received == [signal.SIGTERM]
    assert installed[2:] == [signal.SIG_DFL] * 4


def test_what_ends_a_run_at_once_leaves_gradients_on(tmp_path, tokenizer_file, monkeypatch):
    """As a second Ctrl-C does within an optimizer, which has turned them off."""

    def interrupt():
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    at_step(monkeypatch, loop, 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_run(write_run(tmp_path, tokenizer_file))
    assert torch.is_grad_enabled()


def test_one_of_several_ranks_does_not_promise_to_save(caplog):
    for ranks, told in (
        (Ranks(size=1), ["finishing this step, then saving; interrupt again to stop at once"]),
        (Ranks(size=2), []),
    ):
        caplog.clear()
        with loop.catch_interrupts(ranks) as received:
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert caplog.messages == told
