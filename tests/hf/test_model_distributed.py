"""Tensor, expert and FSDP parallelism as transformers documents them: two processes match one."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from configurations import small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM
from parallel_processes import IDS, PROCESSES, WAYS, evaluate, run, step

# Biases because row-wise sharding must add them once; fewer KV heads because k_norm is as wide as all of them.
CHANGES = {"attention_bias": True, "num_key_value_heads": 2, "intermediate_size": 16}


def make_model():
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**small_config(**CHANGES).to_dict()))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processes(folder):
    """The results of each process."""
    return run(folder)


@pytest.fixture(scope="module")
def expected():
    """The results of a single process."""
    return evaluate(make_model())


def assert_close(actual, expected, name=None):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_match_one(way, processes, expected):
    for found in processes:
        assert_close(found[way]["logits"], expected["logits"])
        assert torch.equal(found[way]["text"], expected["text"])


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_like_one(way, processes, expected):
    for found in processes:
        assert_close(found[way]["loss"], expected["loss"])
        assert found[way]["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert_close(found[way]["gradients"][name], gradient, name)


@pytest.mark.parametrize("way", WAYS)
def test_every_process_holds_its_share(way, processes):
    for found in processes:
        held = found[way]["held"]
        for matrix in ("gate_up_proj", "down_proj"):
            assert held[f"model.layers.1.mlp.experts.{matrix}"] == 1 / PROCESSES
        assert held["model.layers.1.self_attn.q_proj.weight"] == held["lm_head.weight"] == 1 / PROCESSES


@pytest.mark.parametrize("way", WAYS)
def test_the_experts_implementation_of_a_distributed_model_can_change(way, processes, expected):
    for found in processes:
        other, calls, ours, calls_after = found[way]["switched"]
        assert calls == calls_after == 2  # one per layer, none of them ours
        assert_close(other, expected["logits"])
        assert_close(ours, expected["logits"])


@pytest.mark.parametrize("way", WAYS)
def test_a_distributed_model_saves_whole_weights(way, processes, folder):
    saved, original = (load_file(place / "model.safetensors") for place in (folder / way, folder))
    assert saved.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in saved.items())


def test_manually_wrapped_blocks_take_the_same_training_step(processes):
    original = {name: value.detach().clone() for name, value in make_model().named_parameters()}
    expected = step(make_model(), IDS)
    assert all(not torch.equal(value, original[name]) for name, value in expected.items())
    for found in processes:
        assert found["blocks"] == ["model.layers.0", "model.layers.1"]
        for name, value in expected.items():
            assert_close(found["step"][name], value, name)


def test_distributing_a_quantized_model_is_refused(processes):
    for found in processes:
        assert "cannot be distributed" in found["refusal"]


def test_parallel_plans_equal_transformers_and_name_existing_modules():
    model = make_model()
    theirs = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**small_config(**CHANGES).to_dict()))
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters()]]
    patterns = {replace_layer_number_by_wildcard(name) for name in names}
    for plan in ("tp_plan", "ep_plan", "fsdp_plan"):
        assert getattr(model, plan) == getattr(theirs, plan)
        assert getattr(model, plan).keys() <= patterns


def test_accelerate_wraps_decoder_layers():
    accelerate = pytest.importorskip("accelerate")
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    model = make_model()
    plugin.set_auto_wrap_policy(model)
    wrapped = [
        name
        for name, module in model.named_modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    ]
    assert wrapped == ["model.layers.0", "model.layers.1"]
