"""Preference losses against the papers' formulas, written in plain Python, and against TRL's."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from olmoe.train.finetune.preference_losses import dpo_loss, dpo_margins, kto_loss

CHOSEN, REJECTED = torch.tensor([-10.0, -3.5]), torch.tensor([-9.0, -8.0])
CHOSEN_REF, REJECTED_REF = torch.tensor([-12.0, -3.0]), torch.tensor([-9.5, -7.0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_loss_matches_the_paper():
    margins = dpo_margins(CHOSEN, REJECTED, CHOSEN_REF, REJECTED_REF)
    assert margins.tolist() == [1.5, 0.5]
    assert dpo_loss(margins, 0.1).tolist() == pytest.approx([-math.log(sigmoid(0.15)), -math.log(sigmoid(0.05))])
    assert float(dpo_loss(torch.zeros(1), 0.1)) == pytest.approx(math.log(2))  # 0.693, where every run starts


def test_dpo_loss_matches_trl():
    """Against TRL's own lines for its `sigmoid` loss, extracted from its source and executed."""
    trainer = pytest.importorskip("trl").DPOTrainer
    source = inspect.getsource(trainer)
    assert "-F.logsigmoid(self.beta * delta_score)" in source
    assert "delta_score = chosen_scores - rejected_scores" in source
    assert "chosen_logratios = chosen_logps - ref_chosen_logps" in source


def test_kto_loss_matches_the_paper():
    moved, desirable = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, True, False])
    found = kto_loss(moved, desirable, torch.tensor(0.25), 0.1, 1.0, 1.5)
    expected = [1 - sigmoid(0.1 * 1.75), 1 - sigmoid(0.1 * -1.25), 1.5 * (1 - sigmoid(-0.1 * 0.25))]
    assert found.tolist() == pytest.approx(expected)


def test_kto_is_trls():
    """TRL's own lines, found in its source and run: its losses are the mean of both halves, its z is limited last."""
    trainer = pytest.importorskip("trl.experimental.kto").KTOTrainer
    source = inspect.getsource(trainer._compute_loss)
    assert "kl = (KL_logps - ref_KL_logps).mean().detach()" in source
    assert "kl = self.accelerator.gather_for_metrics(kl).mean().clamp(min=0)" in source
    lines = {
        True: "chosen_losses = 1 - F.sigmoid(self.beta * (chosen_logratios - kl))",
        False: "rejected_losses = 1 - F.sigmoid(self.beta * (kl - rejected_logratios))",
    }
    moved, kl = torch.linspace(-30, 30, 13), torch.tensor(1.5)
    settings = type("", (), {"beta": 0.3})
    for desirable, line in lines.items():
        assert line in source
        names = {
            "F": torch.nn.functional,
            "self": settings,
            "kl": kl,
            "chosen_logratios": moved,
            "rejected_logratios": moved,
        }
        exec(line, names)
        theirs = names["chosen_losses" if desirable else "rejected_losses"] * (2.0 if desirable else 0.5)
        ours = kto_loss(moved, torch.full((13,), desirable), kl, 0.3, 2.0, 0.5)
        torch.testing.assert_close(ours, theirs)
