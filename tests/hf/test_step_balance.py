"""Load balancing over a whole step: accumulated batches, and two processes of transformers' Trainer."""

from __future__ import annotations

import pytest
import torch

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM
from olmoe.errors import UserError
from olmoe.hf import balanced_over
from rank_processes import on_ranks
from sentences import refused

pytest.importorskip("datasets")
pytest.importorskip("accelerate")  # which transformers' Trainer needs

KINDS = {
    "pooled": {"output_router_logits": True, "router_aux_loss_coef": 1.0},
    "per layer, with z": {"router_loss": "per_layer", "router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.1},
}


def make_model(kind="pooled", **changes):
    torch.manual_seed(0)
    return OlmoeForCausalLM(OlmoeConfig(**small_config(**changes).to_dict() | KINDS[kind])).train()


def batches(count):
    """Six rows with padding and prompts of different lengths, in this many batches."""
    ids = torch.randint(2, VOCAB_SIZE - 1, (6, 11), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(6):
        mask[row, 11 - row :], labels[row, : row % 3] = 0, -100
    labels[mask == 0] = -100
    whole = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [
        dict(zip(whole, parts, strict=True)) for parts in zip(*(t.chunk(count) for t in whole.values()), strict=True)
    ]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(found, expected, way=""):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{way} {n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_accumulated_batches_are_balanced_as_one(kind, dropout):
    """Given the step's number of items, each batch adds its share, whatever prompts and padding it has."""
    found = []
    for count in (1, 2, 3, 6):
        model = make_model(kind, attention_dropout=dropout)
        parts = batches(count)
        items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        torch.manual_seed(1)
        with balanced_over(model, parts):
            for part in parts:
                model(**part, num_items_in_batch=items).loss.backward()
        found.append(gradients(model))
        assert model.whole_step is None
    plain = make_model(kind, attention_dropout=dropout)
    torch.manual_seed(1)
    plain(**batches(1)[0]).loss.backward()
    assert_close(found[0], gradients(plain))  # counting first must draw the same random numbers as training
    for others in found[1:] if dropout == 0 else []:
        assert_close(others, gradients(plain))


def test_without_num_items_the_mean_of_auxiliary_losses_is_that_of_the_step():
    whole = make_model()(**batches(1)[0]).aux_loss
    model, parts = make_model(), batches(3)
    alone = torch.stack([model(**part).aux_loss for part in parts]).mean()
    assert abs(alone - whole) > 1e-3
    with balanced_over(model, parts):
        together = [model(**part).aux_loss for part in parts]
        assert model.eval()(**parts[0]).aux_loss != together[0]  # evaluation treats each batch by itself
    torch.testing.assert_close(torch.stack(together).mean(), whole)


def test_unsupported_balancing_is_refused():
    with pytest.raises(UserError, match="holds no OlmoeForCausalLM"), balanced_over(torch.nn.Linear(2, 2), []):
        pass
    message = refused(lambda: balanced_over(make_model(), [{"pixels": 1}]).__enter__(), UserError)
    assert "only pixels" in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose experts can be split over two ranks."""
    folder = tmp_path_factory.mktemp("model")
    make_model(intermediate_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The steps of one process, by accumulation and balancing."""
    from trainer_processes import step_of

    output = tmp_path_factory.mktemp("alone")
    return {(a, b): step_of(folder, output, a, b) for b in (True, False) for a in (1, 2, 4, 8)}


def test_accumulation_takes_the_same_step_as_the_whole_batch(alone):
    for accumulation in (1, 2, 4, 8):
        assert_close(alone[accumulation, True], alone[1, False])
    gate = "model.layers.0.mlp.gate.weight"
    # Batches that are balanced separately take another step.
    assert (alone[4, False][gate] - alone[1, False][gate]).abs().max() > 1e-3


def test_two_processes_take_the_same_step_as_one(folder, alone, tmp_path):
    """Balanced over the step: the whole batch's; by default: that of one process with twice the accumulation."""
    from trainer_processes import WAYS, steps_of

    cases = [(way, a, b) for way in WAYS for a, b in ((1, True), (2, True), (4, True), (2, False))]
    for results in on_ranks(2, steps_of, folder, tmp_path, 2, cases):
        for (way, accumulation, balanced), found in zip(cases, results, strict=True):
            expected = alone[1, False] if balanced else alone[2 * accumulation, False]
            assert_close(found, expected, f"{way}, accumulation {accumulation}, balanced {balanced}")
