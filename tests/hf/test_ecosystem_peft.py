"""PEFT's LoRA on attention and routed experts: train, save, load, merge; prefix tuning."""

from __future__ import annotations

import pytest
import torch
import transformers

import olmoe
from configurations import VOCAB_SIZE, small_config

peft = pytest.importorskip("peft")

TARGETS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "both": {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    olmoe.OlmoeForCausalLM(olmoe.OlmoeConfig(**small_config().to_dict())).save_pretrained(folder)
    return folder


def batch():
    return torch.randint(2, VOCAB_SIZE - 1, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", TARGETS)
def test_train_save_load_merge(targets, base, tmp_path):
    model = olmoe.AutoModelForCausalLM.from_pretrained(base)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **TARGETS[targets])
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids, losses = batch(), []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2, losses
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        # From PEFT, from our Auto class, merged, and merged on disk.
        loaded = peft.PeftModel.from_pretrained(olmoe.AutoModelForCausalLM.from_pretrained(base), tmp_path)
        assert torch.equal(loaded.eval()(ids).logits, expected)
        auto = olmoe.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(auto) is olmoe.OlmoeForCausalLM
        assert torch.equal(auto(ids).logits, expected)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = olmoe.OlmoeForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(reloaded(ids).logits, merged(ids).logits)
        # Without the adapter the model is unchanged.
        plain = model.unload()
        assert all(torch.equal(plain.state_dict()[name], value) for name, value in frozen.items())


def test_an_adapted_model_generates_as_its_merged_one(base):
    model = olmoe.AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **TARGETS["experts"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    settings = {"input_ids": batch(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    adapted = model.eval().generate(**settings)
    assert torch.equal(adapted, model.merge_and_unload().generate(**settings))


def test_gradient_checkpointing_works_with_adapters_on_experts(base):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = olmoe.AutoModelForCausalLM.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **TARGETS["both"])).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable()
        model(batch(), labels=batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    for name, value in gradients[0].items():
        assert torch.allclose(gradients[1][name], value, atol=1e-6), name
    assert any(value.abs().sum() > 0 for value in gradients[1].values())


def test_prefix_tuning_has_the_gradients_of_transformers(base):
    """The model is frozen, and gradients flow only through the cache."""
    ids, gradients = batch()[:1, :4], []  # few enough that the kernels would run them
    for library in (olmoe, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
