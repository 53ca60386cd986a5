"""Adapters in PEFT's files: what PEFT computes with them, what it wrote itself, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import olmoe
from adapter_cases import CASES, IDS, logits, random_adapter
from configurations import small_config
from conftest import make_model
from olmoe import adapters
from olmoe.adapters.files import LAYOUTS
from olmoe.errors import CheckpointError
from olmoe.weights import export
from sentences import refused

# D = 2 F, as in olmoe-tiny, where the shapes of the stacks are most alike; and D = F.
SHAPES = [{}, {"intermediate_size": 16}, {"intermediate_size": 32}]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_hold_all(tmp_path, layout, changes):
    config = small_config(**changes)
    adapter = random_adapter(config)
    adapters.write_adapter(adapter, tmp_path, "base", layout)
    read = adapters.read_adapter(tmp_path, config)
    assert (read.rank, read.alpha) == (3, 6.0)
    if layout == "per_expert":  # which calls a router's matrix a module
        assert "gate" in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert read.factors.keys() == adapter.factors.keys()
    for name in adapter.factors:
        torch.testing.assert_close(read.delta(name), adapter.delta(name), msg=name)


@pytest.mark.parametrize("targets", CASES)
def test_peft_computes_the_same_with_ours(tmp_path, targets):
    peft = pytest.importorskip("peft")
    model = make_model()
    export.save(model, tmp_path / "base")
    adapter = random_adapter(model.config, CASES[targets])
    (tmp_path / "adapter").mkdir()
    adapters.write_adapter(adapter, tmp_path / "adapter", str(tmp_path / "base"))
    base = olmoe.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(model).detach()
    adapters.merge(model, adapter)
    expected = logits(model).detach()
    assert not torch.allclose(plain, expected, atol=1e-2)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)


def test_what_peft_wrote_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model()
    export.save(model, tmp_path / "base")
    base = olmoe.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    adapters.merge(model, adapters.read_adapter(tmp_path / "adapter", model.config))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs.eval()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "of the type 'IA3'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model's own weights"),  # was read as if it did not
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),  # adapts only what follows these
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"r": 0}, "r = 0"),
        ({"r": 6}, "of the rank 3, but adapter_config.json says r = 6"),  # was half as strong
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ],
)
def test_other_methods_are_refused(tmp_path, changes, says):
    config = small_config()
    adapters.write_adapter(random_adapter(config), tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert says in refused(lambda: adapters.read_adapter(tmp_path, config), CheckpointError)


def test_adapters_of_other_models_are_refused(tmp_path):
    adapters.write_adapter(random_adapter(small_config()), tmp_path, "base")
    for changes in ({"hidden_size": 64}, {"num_experts": 5}, {"num_hidden_layers": 1}):
        message = refused(lambda c=changes: adapters.read_adapter(tmp_path, small_config(**c)), CheckpointError)
        assert "does not fit this model" in message
    assert "no adapter" in refused(lambda: adapters.read_adapter(tmp_path / "none", small_config()), CheckpointError)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert "cannot be read" in refused(lambda: adapters.read_adapter(tmp_path, small_config()), CheckpointError)


def test_factors_of_a_norm_are_refused(tmp_path):
    config = small_config()
    adapter = random_adapter(config, CASES["attention"])
    adapter.factors["model.norm.weight"] = adapters.Factors(torch.ones(3, 1), torch.ones(32, 3))
    adapters.write_adapter(adapter, tmp_path, "base")
    message = refused(lambda: adapters.read_adapter(tmp_path, config), CheckpointError)
    assert "does not fit this model: its factors of model.norm.weight" in message  # was a traceback
