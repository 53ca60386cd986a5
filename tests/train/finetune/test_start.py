"""Training adapters over plain and packed weights: what is written, exact resumption, and what gets gradients."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from finetuning_runs import interrupt, run, write_run
from olmoe.engine.llm import LLM
from olmoe.errors import ConfigError
from olmoe.io import hub
from olmoe.train.finetune.config import SFTConfig, load_config
from olmoe.train.finetune.start import load_model, open_start
from olmoe.weights.quantize import quantize
from packed_folders import packed_folder, plain_folder
from sentences import refused
from training_runs import copy_of, files, fixed, read_metrics


@pytest.fixture(scope="module", params=["plain", "nf4", "packed", "nf4 folder in bf16"])
def finished(request, tmp_path_factory, tokenizer_file) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    adapter = {"rank": 4, "alpha": 8.0}
    if request.param == "nf4":
        adapter["pack"] = "nf4"
    if request.param == "packed":
        packed_folder(folder / "start", "int4", tokenizer_file, max_position_embeddings=256)
    if request.param == "nf4 folder in bf16":
        quantize(plain_folder(folder / "plain", tokenizer_file, max_position_embeddings=256), folder / "start", "nf4")
        adapter["precision"] = "bf16"
    return run(write_run(folder, tokenizer_file, adapter=adapter, optimizer={"learning_rate": 2e-2}))


def test_adapters_learn_and_are_small(finished):
    held_out = [next(iter(r["held_out_loss"].values())) for r in read_metrics(finished) if "held_out_loss" in r]
    assert held_out[0] > 4
    assert held_out[-1] < 2
    texts = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert files(finished / "best") == ["adapter_config.json", "adapter_model.safetensors", *texts]
    llm = LLM(adapter=finished / "best")  # which names its base model
    assert llm.chat([{"role": "user", "content": "a ball "}], show_progress=False)[0].text.startswith("T")


def test_an_interrupted_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    folder = copy_of(finished, tmp_path)
    interrupt(monkeypatch, folder / "run.toml", number=signal.SIGINT, step=7)
    output = run(folder / "run.toml", resume=True)
    assert list(map(fixed, read_metrics(output))) == list(map(fixed, read_metrics(finished)))
    for file in ("best/adapter_model.safetensors", "evaluation.json"):
        assert (output / file).read_bytes() == (finished / file).read_bytes()


@pytest.mark.parametrize("targets", [["experts"], ["router"]])
def test_only_targeted_modules_are_trained(tmp_path, tokenizer_file, targets):
    config = load_config(write_run(tmp_path, tokenizer_file, adapter={"targets": targets}), SFTConfig)
    model, trained = load_model(open_start(config), config, torch.device("cpu"))
    named = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(named) == len(list(trained.parameters)) == (8 if targets == ["experts"] else 4)
    assert all((".gate." in name) == (targets == ["router"]) for name in named)


def test_the_shipped_model_can_be_fine_tuned(tmp_path):
    text = f"""
[run]
output = "out"
initialize_from = "{hub.SHIPPED}"
[data]
train = [{{ path = "a.jsonl" }}]
sequence_length = 512
[batch]
sequences = 1
"""
    (tmp_path / "run.toml").write_text(text)
    start = open_start(load_config(tmp_path / "run.toml", SFTConfig))
    assert start.tokenizer.eos_ids == (4095,)
    assert set(start.files) == {"tokenizer.json", "tokenizer_config.json"}  # with its own template
    (tmp_path / "run.toml").write_text(text.replace("512", "513"))
    message = refused(lambda: open_start(load_config(tmp_path / "run.toml", SFTConfig)), ConfigError)
    assert "exceeds the 512 positions" in message


def test_a_packed_folder_trains_like_one_packed_on_loading(tmp_path, tokenizer_file):
    """Including frozen weights in bf16: the losses of the first steps are equal bit for bit."""
    found = []
    for name, pack in (("at once", "nf4"), ("before", None)):
        plain = plain_folder(tmp_path / name / "plain", tokenizer_file, max_position_embeddings=256)
        if pack is None:
            quantize(plain, tmp_path / name / "start", "nf4")
        else:
            plain.rename(tmp_path / name / "start")
        adapter = {"rank": 4} | ({} if pack is None else {"pack": pack})
        output = run(write_run(tmp_path / name, tokenizer_file, adapter=adapter, schedule={"epochs": 1}))
        found.append([record["loss"] for record in read_metrics(output) if "loss" in record])
    assert found[0] == found[1]
    assert len(found[0]) > 1


def test_packing_a_packed_model_is_refused(tmp_path, tokenizer_file):
    packed_folder(tmp_path / "start", "int4", tokenizer_file, max_position_embeddings=256)
    path = write_run(tmp_path, tokenizer_file, adapter={"pack": "nf4"})
    assert "packed already" in refused(lambda: run(path), ConfigError)
    path = write_run(tmp_path / "other", tokenizer_file, adapter={"pack": "q3"})
    assert "'q3' is unknown" in refused(lambda: run(path), ConfigError)
