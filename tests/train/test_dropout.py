"""Dropout around a forward pass: what it drops, how much and when, and that it is reproducible."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from olmoe.model import CausalLM, causal_attend
from olmoe.train.dropout import residual_dropout


@pytest.fixture
def model() -> CausalLM:
    return make_model(hidden_size=64)


def branches(model: CausalLM) -> list[torch.nn.Module]:
    layers = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    return [model.model.embed_tokens, *layers]


def forward(model: CausalLM) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The final hidden states, and what the embeddings and each block add to the residual stream."""
    seen: list[torch.Tensor] = []

    def watch(module, arguments, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [branch.register_forward_hook(watch) for branch in branches(model)]
    ids = torch.arange(40).view(2, 20)
    hidden = model(ids, torch.arange(20).expand(2, 20), causal_attend).hidden
    for handle in handles:
        handle.remove()
    return hidden, seen


def test_values_are_dropped_everywhere_and_the_rest_scaled_up(model):
    _, whole = forward(model)
    with residual_dropout(model, 0.25, seed=0):
        _, dropped = forward(model)
    assert len(dropped) == 1 + 2 * len(model.model.layers)
    kept = dropped[0] != 0  # the embeddings: their input is the same as without dropout
    torch.testing.assert_close(dropped[0][kept], whole[0][kept] / 0.75)
    for values in dropped:
        assert float((values == 0).float().mean()) == pytest.approx(0.25, abs=0.04)
    assert not torch.equal(dropped[1] == 0, dropped[2] == 0)


def test_the_seed_decides_and_the_global_generator_is_untouched(model):
    before = torch.get_rng_state()
    outputs = []
    for seed in (1, 1, 2):
        with residual_dropout(model, 0.1, seed):
            outputs.append(forward(model)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_through_kept_values_only(model):
    seen = {}

    def watch(module, arguments, output):
        output.retain_grad()
        seen["before"] = output

    handle = model.model.embed_tokens.register_forward_hook(watch)
    with residual_dropout(model, 0.5, seed=0):
        hidden, outputs = forward(model)
    handle.remove()
    hidden.square().sum().backward()  # outside of the context, as training does
    gone = outputs[0] == 0
    assert (seen["before"].grad[gone] == 0).all()
    assert (seen["before"].grad[~gone] != 0).all()


def test_nothing_is_dropped_at_probability_0_or_outside_the_context(model):
    whole = forward(model)[0]
    with residual_dropout(model, 0.0, seed=0):
        assert torch.equal(forward(model)[0], whole)
    with pytest.raises(KeyboardInterrupt), residual_dropout(model, 0.5, seed=0):
        raise KeyboardInterrupt
    assert torch.equal(forward(model)[0], whole)
