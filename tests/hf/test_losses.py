"""Which auxiliary losses the transformers classes add, and when."""

from __future__ import annotations

import logging

import pytest
import torch

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM
from olmoe.errors import ConfigError
from olmoe.hf import model as hf_model
from olmoe.hf.losses import share_of_step
from olmoe.model import causal_attend
from olmoe.model.router_losses import load_balancing, router_z
from olmoe.weights.checkpoint import load


def build(**changes):
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**(small_config().to_dict() | changes))).train()


def batch():
    ids = torch.randint(2, VOCAB_SIZE - 1, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, mask


def test_per_layer_losses_equal_those_of_training_and_are_always_on(tmp_path):
    model = build(router_loss="per_layer", router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    assert output.router_logits is None
    plain = model.eval()(ids, attention_mask=mask, labels=labels).loss
    model.save_pretrained(tmp_path)
    routers = load(tmp_path)(ids, torch.arange(11).expand(2, -1), causal_attend).routers
    kept = mask.flatten().bool()
    expected = plain + 0.5 * load_balancing(routers, kept) + 0.25 * router_z(routers, kept)
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(output.aux_loss) == pytest.approx(float(load_balancing(routers, kept)), rel=1e-5)


KINDS = {
    "pooled": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "per_layer": {"router_loss": "per_layer", "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25},
}


def labels_of(ids, mask):
    """Labels that ignore the prompt and padding and keep the answer between them."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return labels


@pytest.mark.parametrize("integer", [True, False], ids=["int", "tensor"])
@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_contributes_its_share_of_the_step(kind, processes, integer):
    """Cross-entropy and auxiliary losses are means over trained tokens, weighted by this batch's share of them.

    transformers' Trainer divides by the tokens of all batches on all processes, and multiplies by the processes.
    """
    model, (ids, mask) = build(**KINDS[kind]), batch()
    labels = labels_of(ids, mask)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    mean = model(**inputs)
    predicted = int((labels[:, 1:] != -100).sum())
    accumulated = 3  # batches like this one
    items = predicted * accumulated * processes
    share = model(**inputs, num_items_in_batch=items if integer else torch.tensor(items))
    assert float(share.loss) * accumulated * processes == pytest.approx(float(mean.loss), rel=1e-5)
    assert torch.equal(share.aux_loss, mean.aux_loss)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_batches_are_weighted_by_predicted_tokens(kind):
    model, (ids, mask) = build(**KINDS[kind]), batch()
    labels = labels_of(ids, mask)
    rows = [
        {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1], "labels": labels[i : i + 1]} for i in (0, 1)
    ]
    counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    assert counts[0] != counts[1]
    total = sum(model(**row, num_items_in_batch=sum(counts)).loss for row in rows)
    expected = sum(model(**row).loss * n for row, n in zip(rows, counts, strict=True)) / sum(counts)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


def test_shifted_labels_and_other_ignore_ids_are_counted_correctly():
    ids = torch.arange(8).view(1, 8)
    shifted = torch.tensor([[1, -100, -100, 4, 5, -100, 7, -100]])
    assert float(share_of_step(ids, {"num_items_in_batch": 8, "shift_labels": shifted})) == 0.5
    assert float(share_of_step(ids, {"num_items_in_batch": 12, "ignore_index": 7})) == 0.5
    assert share_of_step(ids, {}) == 1


def test_the_loss_setting_survives_a_round_trip(tmp_path):
    OlmoeConfig(router_loss="per_layer", router_z_loss_coef=0.001).save_pretrained(tmp_path)
    loaded = OlmoeConfig.from_pretrained(tmp_path)
    assert loaded.router_loss == "per_layer"
    assert loaded.router_z_loss_coef == 0.001


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"router_loss": "mean"}, "'mean'"),
        ({"router_z_loss_coef": 0.1}, "router_loss='per_layer'"),
        ({"router_loss": "per_layer", "router_z_loss_coef": -1}, "-1"),
    ],
    ids=str,
)
def test_invalid_loss_settings_are_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        OlmoeConfig(**values)


def test_an_unused_coefficient_warns_once(caplog):
    hf_model._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="olmoe")
    ids, _ = batch()
    for _ in range(2):
        build()(ids, labels=ids)
    assert [r.message for r in caplog.records if "router_aux_loss_coef is 0.01" in r.message] != []
    assert len([r for r in caplog.records if "auxiliary loss is off" in r.message]) == 1


@pytest.mark.parametrize(
    "case", [{"output_router_logits": True}, {"router_aux_loss_coef": 0.0}, {"router_loss": "per_layer"}], ids=str
)
def test_no_warning_where_none_is_due(case, caplog):
    hf_model._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="olmoe")
    ids, _ = batch()
    settings = small_config().to_dict() | case
    OlmoeForCausalLM(OlmoeConfig(**settings)).train()(ids, labels=ids)
    assert "auxiliary loss is off" not in caplog.text
