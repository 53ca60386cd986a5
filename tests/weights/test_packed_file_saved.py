"""What `save_pretrained` made of packed models, read without transformers: shards, nf4, fp4, int8, tied heads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import olmoe
from olmoe.cli.main import main
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import CheckpointError
from olmoe.model import causal_attend, set_backend
from olmoe.weights import checkpoint, packed_file
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf.to_gguf import to_gguf
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES
from packed_folders import WHOLE, packed_folder, plain_folder
from sentences import refused

IDS = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
WISHES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "q_proj"]},
}


def ours(folder, dtype=None):
    model = checkpoint.load(folder, dtype=dtype)
    set_backend(model, "torch")
    with torch.inference_mode():
        return model.logits(model(IDS, torch.arange(16).expand(2, 16), causal_attend).hidden)


def theirs(folder):
    model = olmoe.OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_backend(model, "torch")
    with torch.inference_mode():
        return model(IDS).logits


def off(a, b):
    return float((a - b).abs().max() / b.abs().max())


def saved(plain, target, wish, size="5GB"):
    wishes = olmoe.BitsAndBytesConfig(**WISHES[wish])
    model = olmoe.OlmoeForCausalLM.from_pretrained(plain, quantization_config=wishes, dtype=torch.float32)
    model.save_pretrained(target, max_shard_size=size)
    for text in plain.glob("tokenizer.json"):
        shutil.copy(text, target)
    return target


@pytest.mark.parametrize("size", ["5GB", "50KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("wish", WISHES)
def test_what_the_hugging_face_face_saved_gives_the_same_logits(tmp_path, wish, tied, size):
    folder = saved(plain_folder(tmp_path / "plain", tie_word_embeddings=tied, **WHOLE), tmp_path / "m", wish, size)
    assert (folder / "model.safetensors.index.json").exists() == (size == "50KB")
    limit = 0.02 if wish == "nf4 double" else 2e-6  # where products are rounded to bf16
    assert off(ours(folder), theirs(folder)) < limit
    layer = checkpoint.load(folder).model.layers[0]
    assert layer.mlp.experts.formats["down_proj"].name == wish.split()[0]
    assert hasattr(layer.self_attn.q_proj, "formats") == (wish != "int8")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_shards_of_a_packed_folder_are_the_folder(tmp_path, tied):
    whole = packed_folder(tmp_path / "m", "int4", tie_word_embeddings=tied, **WHOLE)
    model = olmoe.OlmoeForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / packed_file.FILE_NAME).exists()
    assert torch.equal(ours(tmp_path / "shards"), ours(whole))
    assert torch.equal(ours(tmp_path / "shards", torch.bfloat16), ours(whole, torch.bfloat16))


@pytest.mark.parametrize("wish", [*WISHES, "shards"])
def test_every_command_reads_it(tmp_path, tokenizer_file, capsys, wish):
    plain = plain_folder(tmp_path / "plain", tokenizer_file, **WHOLE)
    if wish == "shards":
        folder = tmp_path / "m"
        pack(open_source(plain), tmp_path / "whole", RECIPES["int8"])
        model = olmoe.OlmoeForCausalLM.from_pretrained(tmp_path / "whole")
        model.save_pretrained(folder, max_shard_size="20KB")
        shutil.copy(tokenizer_file, folder)
    else:
        folder = saved(plain, tmp_path / "m", wish, "50KB")
    llm = LLM(folder, device="cpu")
    [completion] = llm.generate("Once upon", SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True))
    assert len(completion.token_ids) == 6
    assert main(["generate", "Once", "--model", str(folder), "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert main(["bench", "--model", str(folder), "--prefill", "4", "--decode", "2", "--context", "4", "--json"]) == 0
    capsys.readouterr()
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    kinds = {k: v for k, v in facts["packed"].items() if k != "bits_per_weight"}
    assert sum(kind["weights"] for kind in kinds.values()) == facts["parameters"]["total"]
    assert facts["bytes"]["on_disk"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    to_gguf(folder, tmp_path / "m.gguf", "f32")
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "back"), "--type", "f32", "--quiet"]) == 0
    limit = 0.02 if wish == "nf4 double" else 2e-6
    assert off(ours(tmp_path / "back"), ours(folder)) < limit
    assert main(["quantize", str(folder), str(tmp_path / "again"), "--format", "int8", "--quiet"]) == 0
    again, before = ours(tmp_path / "again"), ours(folder)
    assert (again - before).norm() < 0.1 * before.norm()  # rounding makes some tokens choose other experts


def test_a_tied_packed_folder_may_call_its_matrix_lm_head(tmp_path):
    folder = packed_folder(tmp_path / "m", "int4", tie_word_embeddings=True, **WHOLE)
    expected = ours(folder)
    tensors = load_file(folder / packed_file.FILE_NAME)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / packed_file.FILE_NAME)
    assert torch.equal(ours(folder), expected)
    source = open_source(folder)
    assert source.read("model.embed_tokens.weight").shape == (320, 32)


# ---- what is refused ----


def test_shards_that_do_not_belong_together(tmp_path):
    folder = saved(plain_folder(tmp_path / "plain", **WHOLE), tmp_path / "m", "nf4", "50KB")
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    values = json.loads(text)
    values["weight_map"]["model.layers.9.x"] = sorted(values["weight_map"].values())[0]
    index.write_text(json.dumps(values))
    assert "model.layers.9.x" in refused(lambda: checkpoint.load(folder), CheckpointError)
    index.write_text(text)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    kept = second.read_bytes()
    save_file(load_file(second) | {"model.norm.weight": torch.ones(32)}, second)
    save_file(load_file(first) | {"model.norm.weight": torch.ones(32)}, first)
    assert "is in both" in refused(lambda: checkpoint.load(folder), CheckpointError)
    second.write_bytes(kept)
    second.unlink()
    assert second.name in refused(lambda: checkpoint.load(folder), CheckpointError)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"surprise": 1}, "surprise"),
        ({"compute_dtype": "int3"}, "int3"),
        ({"compute_dtype": ["x"]}, "compute_dtype"),
        ({"double_quant": "maybe"}, "maybe"),
        ({"double_quant": True}, "absmax"),
        ({"weight_format": "int8"}, "has shape"),
        ({"overrides": {"lm_head": "q8_0"}}, "overrides"),
    ],
)
def test_configurations_that_contradict_the_tensors(tmp_path, change, told):
    folder = saved(plain_folder(tmp_path / "plain", **WHOLE), tmp_path / "m", "nf4")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    assert told in refused(lambda: checkpoint.load(folder), CheckpointError)
