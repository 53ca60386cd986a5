"""Settings that a configuration inherits from its starting checkpoint and from the tokenizer."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import transformers

from configurations import VOCAB_SIZE, small_config
from olmoe.config import ModelConfig, RopeParameters
from olmoe.errors import ConfigError, UserError
from olmoe.hf.auto import AutoTokenizer
from olmoe.io import hub
from olmoe.model import CausalLM, initialize
from olmoe.train.config import load_config
from olmoe.train.inheritance import derive_eos, start_folder
from olmoe.train.loop import train
from olmoe.train.state import recorded_names
from olmoe.weights import export
from sentences import refused
from training_runs import DEFAULTS, assert_same_run, to_toml, write_run

EOS = VOCAB_SIZE - 1
CONFIG = small_config(
    max_position_embeddings=32, eos_token_id=EOS, rope=RopeParameters(rope_theta=500.0), rms_norm_eps=1e-6
)


@pytest.fixture
def start(tmp_path, tokenizer_file):
    """A checkpoint to start from, with tokenizer and chat template."""
    model = CausalLM(CONFIG)
    initialize(model, 0)
    export.save(model, tmp_path / "start")
    shutil.copy(tokenizer_file, tmp_path / "start" / "tokenizer.json")
    (tmp_path / "start" / "chat_template.jinja").write_text("T{{ messages[0].content }}", encoding="utf-8")
    return tmp_path / "start"


def write(folder, model=None, tokenizer=None, **run):
    """A configuration with only these sections besides data and schedule."""
    path = write_run(folder, "none.json", run=run)
    tables = {name: DEFAULTS[name] for name in ("data", "batch", "optimizer", "schedule", "evaluation", "checkpoint")}
    tables["run"] = DEFAULTS["run"] | run
    tables |= {name: table for name, table in (("model", model), ("tokenizer", tokenizer)) if table is not None}
    path.write_text(to_toml(tables), encoding="utf-8")
    return path


def test_a_run_inherits_architecture_and_tokenizer_from_its_checkpoint(start, tmp_path):
    path = write(tmp_path / "r", initialize_from="../start")
    config = load_config(path)
    assert config.model == ModelConfig.from_file(start / "config.json")
    assert config.model.rope.rope_theta == 500.0
    best = train(config, show_progress=False)
    assert ModelConfig.from_file(best / "config.json") == config.model
    assert (best / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(best).chat_template == "T{{ messages[0].content }}"


def test_written_settings_override_inherited_ones(start, tmp_path):
    model = {"max_position_embeddings": 64, "router_aux_loss_coef": 0.5}
    config = load_config(write(tmp_path / "r", model, {"path": "../mine.json"}, initialize_from="../start"))
    assert config.model == dataclasses.replace(ModelConfig.from_file(start / "config.json"), **model)
    assert config.tokenizer.path == "../mine.json"
    path = write(tmp_path / "r", {"hidden_sise": 3}, initialize_from="../start")
    assert "hidden_sise" in refused(lambda: load_config(path), ConfigError)


def test_a_run_resumes_after_its_starting_checkpoint_was_deleted(start, tmp_path):
    reference = tmp_path / "a" / "r"
    train(load_config(write(reference, initialize_from=str(start))), show_progress=False)
    path = write(tmp_path / "b" / "r", initialize_from=str(start))
    train(load_config(path), show_progress=False)
    shutil.rmtree(tmp_path / "b" / "r" / "out" / "checkpoints" / "step-0000012")
    shutil.rmtree(start)
    assert "start" in refused(lambda: load_config(path), UserError)
    train(load_config(path, resume=True), resume=True, show_progress=False)
    assert_same_run(tmp_path / "b" / "r" / "out", reference / "out")
    assert recorded_names(tmp_path / "b" / "r" / "out" / "checkpoints" / "step-0000012") == ["r-train", "r-valid"]


def test_a_missing_checkpoint_is_reported_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("../none", "./none", "/none", "a/b/c"):
        assert name.split("/")[-1] in refused(lambda name=name: load_config(write(tmp_path, initialize_from=name)))
    assert "'model'" in refused(lambda: load_config(write(tmp_path, tokenizer={"path": "x"})), ConfigError)


# ---- the id that ends a document ----


def test_the_end_of_text_id_comes_from_the_tokenizer(tmp_path, tokenizer_file):
    outputs = []
    for name, eos in (("a", EOS), ("b", None)):
        path = write_run(tmp_path / name / "r", tokenizer_file, model={"eos_token_id": eos})
        config = load_config(path)
        assert config.eos_is_written == (eos is not None)
        train(config, show_progress=False)
        outputs.append(tmp_path / name / "r" / "out")
    assert_same_run(outputs[1], outputs[0])  # config.json with its eos_token_id included
    train(load_config(tmp_path / "b" / "r" / "run.toml"), resume=True, show_progress=False)


def test_the_end_of_text_is_found_by_name_or_id_or_refused(tmp_path, tokenizer_file, olmoe_tokenizer_file):
    model = ModelConfig()
    assert derive_eos(olmoe_tokenizer_file, model).eos_token_id == 50279
    assert derive_eos(tokenizer_file, model).eos_token_id == EOS
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|padding|>"}), encoding="utf-8")
    assert derive_eos(path, model).eos_token_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}), encoding="utf-8")
    assert "</s>" in refused(lambda: derive_eos(path, model), ConfigError)
    (tmp_path / "tokenizer_config.json").unlink()
    path.write_text(path.read_text(encoding="utf-8").replace("<|endoftext|>", "<end>"), encoding="utf-8")
    assert "model.eos_token_id" in refused(lambda: derive_eos(path, model), ConfigError)
    # In post-trained models the id is OLMoE's, but the name belongs to another token.
    contents = json.loads(olmoe_tokenizer_file.read_text(encoding="utf-8"))
    swapped = {0: "<|endoftext|>", 50279: "|||IP_ADDRESS|||"}
    for token in contents["added_tokens"]:
        token["content"] = swapped.get(token["id"], token["content"])
    contents["model"]["vocab"] |= {v: k for k, v in swapped.items() if v in contents["model"]["vocab"]}
    path.write_text(json.dumps(contents), encoding="utf-8")
    assert derive_eos(path, model).eos_token_id == 50279


def test_transformers_reads_a_run_with_the_same_end_of_text(tmp_path, tokenizer_file):
    path = write_run(tmp_path, tokenizer_file, schedule={"total_tokens": 64, "warmup_tokens": 0})
    best = train(load_config(path), show_progress=False)
    theirs = transformers.AutoTokenizer.from_pretrained(best)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (EOS, 1, VOCAB_SIZE)
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "dog"}]
    masks = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert sum(masks) >= 2


@pytest.mark.parametrize("name", ["olmoe-tiny", "OLMoE-tiny", "OLMOE-TINY"])
def test_a_run_may_start_from_the_shipped_model_by_name(tmp_path, name):
    assert start_folder(name, tmp_path / name) == hub.SHIPPED
    (tmp_path / name).mkdir()  # a folder of that name beside the file takes precedence
    assert start_folder(name, tmp_path / name) == tmp_path / name


def test_a_model_name_in_a_file_is_looked_up_beside_the_file(tmp_path):
    (tmp_path / "runs" / "best").mkdir(parents=True)
    assert start_folder("best", tmp_path / "runs" / "best") == tmp_path / "runs" / "best"
    assert start_folder(str(tmp_path / "runs"), tmp_path / "runs") == tmp_path / "runs"
    message = refused(lambda: start_folder("../none/such", tmp_path / "runs" / ".." / "none" / "such"))
    assert "no folder" in message
