"""What is reported about the machine."""

from __future__ import annotations

import math

import torch

from olmoe.bench import machine


def test_machine_facts_are_complete():
    facts = machine.machine_facts()
    assert facts["cpu"]
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert math.isfinite(facts["cores"])


def test_a_package_outside_a_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert "commit" not in machine.machine_facts()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert "commit" not in machine.machine_facts()
