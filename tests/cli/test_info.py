"""`olmoe info`: exact counts of the released configuration, and of what is on disk."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from conftest import make_model
from olmoe.cli.main import main
from olmoe.config import ModelConfig, RopeParameters
from olmoe.io import hub
from olmoe.weights import checkpoint, export, hf_folder

TOTAL, ACTIVE = 6_919_161_856, 1_282_017_280


def info(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["info", *arguments])
    return code, *capsys.readouterr()


def info_json(capsys, *arguments: str) -> dict:
    code, out, err = info(capsys, *arguments, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    return json.loads(out)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of several shards, half precision, with most switches set."""
    model = make_model(
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_bias=True,
        clip_qkv=4.0,
        norm_topk_prob=True,
        rope=RopeParameters(rope_type="linear", factor=2.0),
    )
    export.save(model, tmp_path / "model", dtype=torch.bfloat16, max_shard_bytes=20_000)
    return tmp_path / "model"


def test_the_released_configuration_has_the_published_counts(capsys):
    code, out, err = info(capsys, "1b-7b")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if len(line.split()) > 1}
    assert lines["total"] == ["6,919,161,856"]
    assert lines["active"] == ["1,282,017,280"]
    assert (lines["layers"], lines["experts_per_token"], lines["vocabulary"]) == (["16"], ["8"], ["50,304"])
    assert "None" not in "".join(line for line in out.splitlines() if line.startswith("  "))


def test_the_released_configuration_as_json(capsys):
    facts = info_json(capsys, "1b-7b")
    parameters = dict(facts["parameters"])
    assert (parameters.pop("total"), parameters.pop("active")) == (TOTAL, ACTIVE)
    assert sum(parameters.values()) == TOTAL
    assert facts["bytes"]["bfloat16"] == 2 * TOTAL
    assert facts["bytes"]["float32"] == 4 * TOTAL
    assert facts["bytes"]["on_disk"] is None
    assert facts["bytes"]["kv_cache_per_token_bfloat16"] == 2 * 16 * 2048 * 2
    expected = {
        "model": "1b-7b", "layers": 16, "hidden_size": 2048, "attention_heads": 16, "key_value_heads": 16,
        "head_dim": 128, "experts": 64, "experts_per_token": 8, "expert_width": 1024, "norm_topk_prob": False,
        "vocabulary": 50304, "context": 4096, "rope": {"type": "default", "theta": 10000.0, "factor": 1.0},
        "clip_qkv": None, "tied_embeddings": False,
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected


def test_a_saved_folder_is_described_from_its_files(capsys, folder):
    facts = info_json(capsys, str(folder))
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert facts["bytes"]["on_disk"] == sum(file.stat().st_size for file in files)
    assert facts["bytes"]["stored_as"] == ["BF16"]
    model = checkpoint.load(folder)
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert facts["bytes"]["kv_cache_per_token_bfloat16"] == 2 * 2 * 2 * 2 * 8  # k and v, bytes, layers, heads, width
    expected = {"key_value_heads": 2, "clip_qkv": 4.0, "tied_embeddings": True, "norm_topk_prob": True}
    assert {key: facts[key] for key in expected} == expected
    assert facts["rope"] == {"type": "linear", "theta": 10000.0, "factor": 2.0}
    code, out, _ = info(capsys, str(folder))
    assert code == 0
    assert f"{facts['bytes']['on_disk']:,}" in out
    assert "BF16" in out


def test_no_weight_is_read(capsys, folder, monkeypatch):
    monkeypatch.setattr(hf_folder, "_read_tensors", None)
    monkeypatch.setattr(checkpoint, "load", None)
    assert info(capsys, str(folder))[0] == 0


def test_a_config_file_alone_is_enough(capsys, folder):
    whole = info_json(capsys, str(folder))
    alone = info_json(capsys, str(folder / "config.json"))
    assert alone["parameters"] == whole["parameters"]
    assert (alone["bytes"]["on_disk"], alone["bytes"]["stored_as"]) == (None, None)


def test_active_parameters_leave_out_the_idle_experts(capsys, folder):
    parameters = info_json(capsys, str(folder))["parameters"]
    assert parameters["total"] - parameters["active"] == parameters["experts"] * 5 // 8  # 3 of 8 are used


def test_without_a_name_the_shipped_model_is_described(capsys, folder, monkeypatch):
    monkeypatch.setattr(hub, "SHIPPED", folder)
    facts = info_json(capsys)
    assert facts["model"] == "olmoe-tiny (shipped)"
    assert facts["bytes"]["stored_as"] == ["BF16"]


@pytest.mark.skipif(not hub.SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
def test_the_shipped_model_has_olmoes_structure(capsys):
    facts = info_json(capsys)
    assert (facts["experts"], facts["experts_per_token"], facts["norm_topk_prob"]) == (64, 8, False)
    assert facts["bytes"]["on_disk"] <= 16_000_000


def test_a_folder_named_like_the_released_model_comes_first(capsys, folder, monkeypatch):
    folder.rename(folder.parent / "1b-7b")
    monkeypatch.chdir(folder.parent)
    assert info_json(capsys, "1b-7b")["layers"] == 2


def test_a_name_with_odd_characters_is_printed_without_failing(capsys, folder):
    odd = folder.rename(folder.parent / "caf\udce9 →")  # bytes that are not UTF-8
    code, out, err = info(capsys, str(odd / "config.json"))
    assert (code, err) == (0, "")
    assert "caf? →" in out
    assert info_json(capsys, str(odd / "config.json"))["model"] == str(odd / "config.json")


def truncate(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "There is no file "),
        (lambda f: (f / "config.json").write_text("{"), "{config} is not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "{config} is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "{config} must hold a JSON object"),
        (lambda f: change_config(f, model_type="llama"), "This is a configuration of model type 'llama'"),
        (lambda f: change_config(f, num_hidden_layers=3), "config.json says 3 layers"),
        (lambda f: change_config(f, intermediate_size=13), "Tensor "),
        (truncate, "{folder}/model-00001-of-"),
        (lambda f: min(f.glob("*.safetensors")).unlink(), "The shard "),
        (lambda f: [file.unlink() for file in f.glob("model*")], "{folder} holds neither"),
    ],
)
def test_broken_folders_are_one_sentence_and_2(capsys, folder, damage, sentence):
    damage(folder)
    code, out, err = info(capsys, str(folder))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("olmoe: " + sentence.format(folder=folder, config=folder / "config.json"))
    assert "Traceback" not in err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama"}', '{"model_type": "olmoe"}'])
def test_broken_config_files_are_one_sentence_and_2(capsys, tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    code, out, err = info(capsys, str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("olmoe: ")


def test_unknown_models_are_one_sentence_and_2(capsys):
    for name in ("no-such-model", "./no/such", "a/b/c"):
        code, out, err = info(capsys, name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"olmoe: There is no folder '{name}'")


def test_a_configuration_round_trips_through_its_file(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(ModelConfig().to_json("bfloat16"))
    assert info_json(capsys, str(path))["parameters"]["active"] == ACTIVE


def test_a_gguf_file_is_described_from_its_header(capsys, folder, tmp_path):
    from olmoe.io import hub
    from olmoe.weights.gguf.to_gguf import to_gguf

    to_gguf(hub.SHIPPED, tmp_path / "m.gguf", "q4_0")
    facts = info_json(capsys, str(tmp_path / "m.gguf"))
    assert facts["bytes"]["on_disk"] == (tmp_path / "m.gguf").stat().st_size
    assert facts["bytes"]["stored_as"] == ["F32", "Q4_0"]
    shipped = info_json(capsys, str(hub.SHIPPED))
    same = ("layers", "experts", "vocabulary", "parameters", "rope")
    assert {key: facts[key] for key in same} == {key: shipped[key] for key in same}
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    code, _, error = info(capsys, str(tmp_path / "m.gguf"))
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert "not valid JSON" not in error


@pytest.mark.parametrize("name", ["1B-7B", "OLMoE-1B-7B", "olmoe-1b-7b-0924", "Allenai/OLMoE-1B-7B-0125-Instruct"])
def test_the_released_models_are_known_by_name_before_any_download(capsys, name, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    facts = info_json(capsys, name)
    assert (facts["parameters"]["total"], facts["bytes"]["on_disk"]) == (TOTAL, None)


def test_sizes_of_every_format_in_gigabytes_with_the_cache(capsys, folder):
    gigabytes = info_json(capsys, "1b-7b")["gigabytes"]
    cache = 2 * 16 * 2048 * 2 * 4096 / 1e9  # keys and values, layers, width, 16 bits, context
    assert list(gigabytes) == ["float32", "bfloat16", "int8", "int4", "int4-high", "q4_0"]
    assert gigabytes["bfloat16"]["weights"] == 2 * TOTAL / 1e9
    assert gigabytes["int4"]["weights"] == pytest.approx(3.92, abs=0.01)
    assert gigabytes["int4"]["cache"] == pytest.approx(cache)
    for parts in gigabytes.values():
        assert parts["total"] == pytest.approx(parts["weights"] + parts["cache"])
    _, out, _ = info(capsys, "1b-7b")
    assert [line.split() for line in out.splitlines() if line.startswith("  int4 ")] == [
        ["int4", "3.92", "0.537", "4.46"]
    ]
    assert "cache of 4,096 tokens" in out
    scaled = info_json(capsys, str(folder))  # RoPE stretches its context of 128 twice
    assert scaled["gigabytes"]["int8"]["cache"] == pytest.approx(2 * 2 * 2 * 8 * 2 * 256 / 1e9)


@pytest.mark.skipif(not hub.SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
@pytest.mark.parametrize("name", ["olmoe-tiny", "OLMoE-Tiny"])
def test_the_shipped_model_is_known_by_name(capsys, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert info_json(capsys, name)["parameters"] == info_json(capsys)["parameters"]
    assert main(["generate", "Once", "--model", name, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert main(["quantize", name, "int8", "--format", "int8", "--quiet"]) == 0
    assert main(["convert", name, "x.gguf", "--quiet"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8", "x.gguf"]


def test_a_hub_model_is_described_from_its_configuration_alone(capsys, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **options: str(folder / file))
    facts = info_json(capsys, "owner/model")
    assert facts["parameters"] == info_json(capsys, str(folder))["parameters"]
    assert facts["bytes"]["on_disk"] is None
