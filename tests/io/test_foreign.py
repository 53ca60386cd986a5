"""What is no checkpoint of ours is named for what it is, with the remedy, by every way to load a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmoe.cli.main import main
from olmoe.engine.llm import LLM
from olmoe.errors import CheckpointError, UserError
from olmoe.io import hub
from olmoe.weights import checkpoint, export, packed_file
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf.source import GGUFSource
from packed_folders import WHOLE, packed_folder, plain_folder
from sentences import refused

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 13838323\n"
CONTENTS = {
    "lfs": (LFS, "git lfs pull"),
    "html": (b"<!DOCTYPE html><html><body>404", "web page"),
    "html without a doctype": (b"\n<HTML><head>", "web page"),
    "xml": (b"<?xml version='1.0'?><Error>", "XML"),
    "torch": (b"PK\x03\x04" + b"\0" * 99, "torch.save"),
    "error": (b'{"error": "Repository not found"}' + b" " * 50, "error message"),
}


@pytest.fixture
def folder(tmp_path, tokenizer_file):
    return plain_folder(tmp_path / "m", tokenizer_file, **WHOLE)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_file_of_another_kind_is_named(tmp_path, tokenizer_file, name, kind):
    content, told = CONTENTS[name]
    make = plain_folder if kind == "plain" else lambda *a, **k: packed_folder(a[0], "int8", a[1], **k)
    folder = make(tmp_path / "m", tokenizer_file, **WHOLE)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(content)
    for load in (checkpoint.load, open_source, LLM):
        message = refused(lambda load=load: load(folder), CheckpointError)
        assert told in message
        assert "model.safetensors" in message
    weights.write_bytes(whole)
    for text in ("config.json", "tokenizer.json"):
        kept = (folder / text).read_bytes()
        (folder / text).write_bytes(content)
        if not (name == "error" and text == "config.json"):  # which is JSON, and lacks what a configuration has
            assert told in refused(lambda: LLM(folder), UserError)
        (folder / text).write_bytes(kept)
    (tmp_path / "x.gguf").write_bytes(content)
    assert told in refused(lambda: GGUFSource(tmp_path / "x.gguf"), CheckpointError)


def test_an_index_of_another_kind_is_named(tmp_path):
    export.save(checkpoint.load(plain_folder(tmp_path / "m")), tmp_path / "shards", max_shard_bytes=20_000)
    (tmp_path / "shards" / "model.safetensors.index.json").write_bytes(LFS)
    assert "git lfs pull" in refused(lambda: checkpoint.load(tmp_path / "shards"), CheckpointError)


NAMES = {
    "compiled": (lambda n: "_orig_mod." + n, "torch.compile"),
    "compiled inside": (lambda n: n.replace("model.layers", "model._orig_mod.layers"), "torch.compile"),
    "parallel": (lambda n: "module." + n, "DataParallel"),
    "fsdp": (lambda n: n.replace("self_attn", "_fsdp_wrapped_module.self_attn"), "FSDP"),
    "checkpointed": (lambda n: n.replace("mlp.", "_checkpoint_wrapped_module.mlp."), "activation checkpointing"),
    "peft": (lambda n: "base_model.model." + n, "PEFT"),
    "peft layers": (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "merge"),
    "value head": (lambda n: "pretrained_model." + n, "TRL"),
    "decoder": (lambda n: n.removeprefix("model."), "output head"),
    "olmo": (lambda n: n.replace("model.layers", "transformer.blocks"), "convert_olmoe_weights_to_hf"),
    "gptq": (lambda n: n.replace("q_proj.weight", "q_proj.qweight"), "GPTQ"),
    "bitsandbytes": (lambda n: n.replace("norm.weight", "norm.weight.absmax"), "bitsandbytes"),
    "classifier": (lambda n: n.replace("lm_head.weight", "score.weight"), "OlmoeForSequenceClassification"),
    "value head beside": (lambda n: n.replace("lm_head.weight", "v_head.summary.weight"), "TRL"),
    "parts": (lambda n: "language_model." + n, "several parts"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_names_of_wrappers_and_adapters_are_explained(tmp_path, name, kind):
    change, told = NAMES[name]
    folder = (plain_folder if kind == "plain" else packed_folder)(tmp_path / "m", **WHOLE)
    file = folder / packed_file.FILE_NAME
    save_file({change(key): value for key, value in load_file(file).items()}, file)
    for load in (checkpoint.load, open_source):
        assert told in refused(lambda load=load: load(folder), CheckpointError)


def cache(root):
    repository = root / "models--owner--tiny"
    (repository / "snapshots" / "abc123").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / "abc123" / "config.json").write_text("{}")
    return repository


def adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (folder / "adapter_model.safetensors").touch()
    return folder


def run(folder):
    (folder / "best").mkdir(parents=True)
    (folder / "best" / "config.json").touch()
    return folder


def run_of_an_adapter(folder):
    folder.mkdir()
    adapter(folder / "best")
    return folder


def trainer(folder):
    for step in (20, 100):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "config.json").touch()
    return folder


def files(*names):
    def make(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        return folder

    return make


FOLDERS = {
    "hub cache": (cache, ["owner/tiny", "abc123"]),
    "hub cache's snapshots": (lambda f: cache(f) / "snapshots", ["owner/tiny", "abc123"]),
    "whole hub cache": (lambda f: cache(f).parent, ["owner/tiny"]),
    "adapter": (adapter, ["owner/base", "olmoe convert DIR NEW --merge"]),
    "run": (run, ["best"]),
    "run of an adapter": (run_of_an_adapter, ["the output of a training run", "best"]),
    "trainer": (trainer, ["checkpoint-100"]),
    "run without best": (lambda f: trainer(f / "checkpoints").parent, ["checkpoint-100"]),
    "distributed": (files("__0_0.distcp", ".metadata"), ["distributed checkpoint"]),
    "deepspeed": (files("global_step5/x.pt", "latest"), ["distributed checkpoint"]),
    "olmo": (files("config.yaml", "model.pt"), ["convert_olmoe_weights_to_hf"]),
    "original": (files("params.json", "consolidated.00.pth"), ["original format"]),
    "gguf": (files("model-q4.gguf"), ["model-q4.gguf", "olmoe quantize"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_of_another_kind_are_named_by_every_command(tmp_path, name, capsys):
    make, told = FOLDERS[name]
    folder = make(tmp_path / "f")
    message = refused(lambda: hub.resolve(folder), CheckpointError)
    assert all(part in message for part in told), message
    assert refused(lambda: LLM(folder)) == refused(lambda: checkpoint.load(folder)) == message
    commands = (
        ["generate", "x", "--model", str(folder)],
        ["info", str(folder)],
        ["bench", "--model", str(folder)],
        ["quantize", str(folder), str(tmp_path / "out"), "--format", "int8"],
        ["convert", str(folder), str(tmp_path / "out.gguf")],
    )
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2, command
        err = capsys.readouterr().err
        if name == "adapter" and command[0] == "convert":  # which takes adapters, with the model that they name
            assert "owner/base" in err, err
        else:
            assert message in err, err


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.ckpt", "flax_model.msgpack", "m.gguf"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_weights_that_are_not_safetensors(tmp_path, name, kind):
    folder = (plain_folder if kind == "plain" else packed_folder)(tmp_path / "m", **WHOLE)
    (folder / packed_file.FILE_NAME).unlink()
    (folder / name).touch()
    (folder / "training_args.bin").touch()
    message = refused(lambda: checkpoint.load(folder), CheckpointError)
    assert name.rpartition(".")[2] in message
    assert "convert" in message


def test_an_adapter_beside_its_model_is_no_hindrance(tmp_path, tokenizer_file):
    """A folder may hold both, as some fine-tuners leave it; the model is whole."""
    folder = plain_folder(tmp_path / "m", tokenizer_file)
    expected = checkpoint.load(folder).state_dict()
    (folder / "adapter_config.json").write_text("{}")
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint.load(folder).state_dict().items())


def test_an_adapter_with_the_configuration_of_its_base(tmp_path):
    folder = adapter(tmp_path / "a")
    shutil.copy(plain_folder(tmp_path / "m") / "config.json", folder)
    assert "olmoe convert DIR NEW --merge" in refused(lambda: checkpoint.load(folder), CheckpointError)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_generate_says_of_quantized_folders_what_info_says(folder, capsys, method):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": method}}))
    told = []
    for command in (
        ["info", str(folder)],
        ["generate", "x", "--model", str(folder)],
        ["bench", "--model", str(folder)],
    ):
        assert main(command) == 2
        told.append(capsys.readouterr().err)
    assert len(set(told)) == 1
    assert method in told[0]
    assert "olmoe quantize" in told[0]
    assert "remove it" not in told[0]
