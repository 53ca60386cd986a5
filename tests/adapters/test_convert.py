"""Adapters for other software: merged, in PEFT's layouts, and as GGUF files; and by the options of the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from adapter_cases import logits, random_adapter
from conftest import make_model
from olmoe import adapters
from olmoe.cli.main import EXIT_USER_ERROR, main
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import CheckpointError
from olmoe.weights import checkpoint, export
from olmoe.weights.checkpoint import open_source
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES
from packed_folders import WHOLE
from sentences import refused

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_file):
    """A base, an adapter that names it, and what the two compute together."""
    folder = tmp_path_factory.mktemp("adapters")
    model = make_model(**WHOLE)
    files = {"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")}
    export.save(model, folder / "base", extra_files=files)
    (folder / "adapter").mkdir()
    adapter = random_adapter(model.config)
    adapters.write_adapter(adapter, folder / "adapter", str(folder / "base"))
    (folder / "adapter" / "tokenizer.json").write_text(files["tokenizer.json"], encoding="utf-8")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "adapter" / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    model = checkpoint.load(folder / "base")
    adapters.merge(model, adapters.read_adapter(folder / "adapter", model.config))
    return logits(model).detach()


def test_merged_checkpoints_are_ordinary_ones(folder, expected, tmp_path):
    assert main(["convert", str(folder / "adapter"), str(tmp_path / "merged"), "--merge", "--quiet"]) == 0
    torch.testing.assert_close(logits(checkpoint.load(tmp_path / "merged")), expected)
    assert LLM(tmp_path / "merged").tokenizer.chat_template.startswith("{% for m in messages %}")
    command = ["convert", str(folder / "adapter"), str(tmp_path / "merged"), "--merge", "--type", "bf16", "--overwrite"]
    assert main(command) == 0
    assert next(checkpoint.load(tmp_path / "merged").parameters()).dtype == torch.bfloat16


def test_layouts_hold_the_same(folder, expected, tmp_path):
    source = folder / "adapter"
    for layout in ("per_expert", "fused"):
        target = tmp_path / layout
        assert main(["convert", str(source), str(target), "--layout", layout, "--quiet"]) == 0
        model = checkpoint.load(folder / "base")
        adapters.merge(model, adapters.read_adapter(target, model.config))
        torch.testing.assert_close(logits(model), expected)
        source = target
    assert (source / "adapter_model.safetensors").read_bytes() == (
        folder / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["x"], "with --merge or --layout"),
        (["x.gguf", "--merge"], "leave --merge and --layout out"),
        (["x", "--merge", "--layout", "fused"], "so --layout fused means nothing"),  # was ignored
        (["x", "--type", "bf16", "--layout", "fused"], "--type bf16 does not suit"),
        (["x", "--merge", "--base", "packed"], "is packed"),
    ],
)
def test_mistakes_are_named(folder, tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    pack(open_source(folder / "base"), tmp_path / "packed", RECIPES["int8"])
    assert main(["convert", str(folder / "adapter"), *options]) == EXIT_USER_ERROR
    assert says in capsys.readouterr().err
    assert main(["convert", str(folder / "base"), "y", "--merge"]) == EXIT_USER_ERROR
    assert "--merge is for adapters" in capsys.readouterr().err


def test_models_are_served_with_their_adapter(folder, tmp_path, capsys):
    """Merged into plain weights; beside packed ones."""
    main(["convert", str(folder / "adapter"), str(tmp_path / "merged"), "--merge", "--quiet"])
    text = LLM(tmp_path / "merged").generate("the dog", GREEDY, show_progress=False)[0].text
    plain = LLM(folder / "base").generate("the dog", GREEDY, show_progress=False)[0].text
    assert text != plain
    llm = LLM(adapter=folder / "adapter")
    assert llm.generate("the dog", GREEDY, show_progress=False)[0].text == text
    assert llm.tokenizer.chat_template.startswith("{% for m in messages %}")
    pack(open_source(folder / "base"), tmp_path / "packed", RECIPES["int8"])
    packed = LLM(tmp_path / "packed", adapter=folder / "adapter")
    close = [logits(packed.model), logits(LLM(tmp_path / "merged").model)]
    assert (close[0] - close[1]).abs().max() < 0.1 * close[1].abs().max()
    assert len(packed.generate("the dog", GREEDY, show_progress=False)[0].token_ids) == 8
    command = [
        "generate",
        "the dog",
        "--adapter",
        str(folder / "adapter"),
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
    ]
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == f"the dog{text}".strip()


def test_adapters_that_name_no_model_are_refused(folder, tmp_path):
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert "does not name the model" in refused(lambda: LLM(adapter=tmp_path), CheckpointError)
    assert "holds no adapter" in refused(lambda: LLM(adapter=tmp_path / "none"), CheckpointError)
    (tmp_path / "run").mkdir()
    shutil.copytree(folder / "adapter", tmp_path / "run" / "best")
    assert f"give {tmp_path / 'run' / 'best'}." in refused(lambda: LLM(adapter=tmp_path / "run"), CheckpointError)


@pytest.mark.parametrize("place", ["file", "tokenizer_config.json", "none"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapters_chat_template_wins_where_there_is_one(folder, tmp_path, place, tokenizer):
    """With a tokenizer beside it, or alone, as PEFT's users keep them; in either of transformers' two places."""
    base, own = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(folder / "base", base)
    shutil.copytree(folder / "adapter", own)
    settings = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    (base / "chat_template.jinja").write_text("of the base", encoding="utf-8")
    (own / "chat_template.jinja").unlink()
    if not tokenizer:
        (own / "tokenizer.json").unlink()
    if place == "file":
        (own / "chat_template.jinja").write_text("of the adapter", encoding="utf-8")
    if place == "tokenizer_config.json":
        (own / place).write_text(json.dumps({"chat_template": "of the adapter"}), encoding="utf-8")
    expected = "of the base" if place == "none" else "of the adapter"
    assert LLM(adapter=own).tokenizer.chat_template == expected
    assert LLM(base, adapter=own).tokenizer.chat_template == expected
    assert main(["convert", str(own), str(tmp_path / "merged"), "--merge", "--quiet"]) == 0
    assert LLM(tmp_path / "merged").tokenizer.chat_template == expected
