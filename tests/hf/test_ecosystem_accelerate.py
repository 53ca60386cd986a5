"""accelerate's placement of our model, and safetensors shards."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import olmoe
from configurations import VOCAB_SIZE, small_config

accelerate = pytest.importorskip("accelerate")

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return olmoe.OlmoeForCausalLM(olmoe.OlmoeConfig(**small_config().to_dict())).eval()


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    original.save_pretrained(folder)
    return folder


def test_device_map_auto_and_to_work_as_documented(original, folder):
    model = olmoe.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto").to("cpu")
    assert torch.equal(model(IDS).logits, original(IDS).logits)


@pytest.mark.parametrize("where", ["disk", "cpu hook"])
def test_offloaded_layers_give_the_same_logits_and_text(where, original, folder, tmp_path):
    layers = {"model.layers.1": "disk"} if where == "disk" else {"model.layers.1": "cpu"}
    placement = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
        "lm_head": "cpu", **layers,
    }  # fmt: skip
    model = olmoe.AutoModelForCausalLM.from_pretrained(folder, device_map=placement, offload_folder=tmp_path)
    if where == "disk":
        assert {p.device.type for p in model.model.layers[1].parameters()} == {"meta"}
    with torch.no_grad():
        # Layers run by torch and by the kernels: logits reach 4, and either is 1.7e-6 from the reference.
        assert torch.allclose(model(IDS).logits, original(IDS).logits, atol=2e-6)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **settings), original.generate(IDS, **settings))


def test_blocks_are_never_split_between_devices(original):
    from accelerate import infer_auto_device_map

    size = sum(p.numel() * 4 for p in original.parameters())
    placement = infer_auto_device_map(
        original, max_memory={"cpu": size // 2, "disk": 2 * size}, no_split_module_classes=original._no_split_modules
    )
    assert set(placement.values()) == {"cpu", "disk"}
    assert not [name for name in placement if name.startswith("model.layers.") and name.count(".") > 2]


def test_a_model_prepared_by_accelerate_trains(original):
    model = olmoe.OlmoeForCausalLM(original.config)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    losses = []
    for _ in range(6):
        with accelerator.accumulate(model):
            loss = model(IDS, labels=IDS).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loader", [olmoe.AutoModelForCausalLM, transformers.OlmoeForCausalLM], ids=["ours", "theirs"])
def test_shards_are_complete_and_load(loader, original, tmp_path):
    original.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    # On disk as on the hub: one tensor per expert projection.
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in index["weight_map"]
    loaded = loader.from_pretrained(tmp_path)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_our_own_loader_reads_the_shards(original, tmp_path):
    from olmoe.weights import checkpoint

    original.save_pretrained(tmp_path, max_shard_size="30KB")
    network = checkpoint.load(tmp_path)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in network.state_dict().items())
