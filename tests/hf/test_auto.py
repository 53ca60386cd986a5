"""`olmoe`'s Auto classes and pipeline: ours for OLMoE checkpoints, transformers' for others, no global changes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

import olmoe
from configurations import VOCAB_SIZE, small_config
from olmoe import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from olmoe.errors import CheckpointError, ConfigError
from olmoe.io import hub
from olmoe.tokenizer import Tokenizer
from sentences import refused

EOS = VOCAB_SIZE - 1
SENTENCE = "the dog ran  to a ball<|endoftext|>caf\u00e9 e\u0301 \u65e5 <|padding|>'s\n\n x"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_file):
    """A folder as olmoe.weights.export.save writes it, with a tokenizer.json and no tokenizer_config.json."""
    from conftest import make_model
    from olmoe.weights import export

    folder = tmp_path_factory.mktemp("checkpoint")
    files = {"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")}
    export.save(make_model(), folder, extra_files=files)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of another model type."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("auto", "ours"),
    [
        (AutoModel, olmoe.OlmoeModel),
        (AutoModelForCausalLM, olmoe.OlmoeForCausalLM),
        (AutoModelForSequenceClassification, olmoe.OlmoeForSequenceClassification),
    ],
    ids=lambda value: value.__name__,
)
def test_auto_classes_load_olmoe_checkpoints_as_ours(auto, ours, checkpoint):
    model = auto.from_pretrained(checkpoint)
    assert type(model) is ours
    assert type(model.config) is olmoe.OlmoeConfig
    assert type(auto.from_config(olmoe.OlmoeConfig(**small_config().to_dict()))) is ours
    assert type(auto.from_config(transformers.OlmoeConfig(**small_config().to_dict()))) is ours


def test_auto_config_loads_ours(checkpoint):
    config, unused = AutoConfig.from_pretrained(checkpoint, return_unused_kwargs=True, surprise=1, clip_qkv=2.0)
    assert type(config) is olmoe.OlmoeConfig
    assert (config.clip_qkv, unused) == (2.0, {"surprise": 1})
    assert type(AutoConfig.for_model("olmoe", hidden_size=64)) is olmoe.OlmoeConfig


def test_impossible_configs_are_refused_with_our_message(checkpoint, tmp_path):
    values = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")) | {"num_experts_per_tok": 99}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert "99" in refused(lambda: AutoConfig.from_pretrained(tmp_path), ConfigError)
    assert "LlamaConfig" in refused(lambda: olmoe.OlmoeModel(transformers.LlamaConfig()), ConfigError)


def test_auto_classes_leave_other_model_types_to_transformers(other):
    assert type(AutoModelForCausalLM.from_pretrained(other)) is transformers.LlamaForCausalLM
    assert type(AutoModel.from_pretrained(other)) is transformers.LlamaModel
    assert type(AutoConfig.from_pretrained(other)) is transformers.LlamaConfig
    assert type(AutoConfig.for_model("llama")) is transformers.LlamaConfig


def test_transformers_itself_is_unchanged(checkpoint):
    code = (
        "import sys, olmoe, transformers\n"
        "from olmoe import AutoConfig, AutoModelForCausalLM, pipeline\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)\n"
        "print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__module__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["transformers.models.olmoe.modeling_olmoe",
                                  "transformers.models.olmoe.configuration_olmoe"]  # fmt: skip


def test_registrations_here_do_not_reach_transformers():
    class MineConfig(transformers.PreTrainedConfig):
        model_type = "mine"

    class Mine(transformers.PreTrainedModel):
        config_class = MineConfig

        def __init__(self, config):
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.zeros(1))

    AutoModel.register(MineConfig, Mine)
    assert type(AutoModel.from_config(MineConfig())) is Mine
    assert MineConfig not in transformers.AutoModel._model_mapping
    with pytest.raises(ValueError, match="MineConfig is already used"):
        AutoModel.register(MineConfig, Mine)


def written_config(checkpoint, folder):
    """`checkpoint` in `folder`, with the tokenizer_config.json that we write for transformers."""
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = Tokenizer.from_folder(folder, eos_ids=(EOS,), pad_id=1).transformers_config(128)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("auto", [AutoTokenizer, transformers.AutoTokenizer], ids=["ours", "transformers"])
@pytest.mark.parametrize("config", [False, True], ids=["without", "with"])
def test_the_tokenizer_encodes_and_ends_texts_like_ours(auto, config, checkpoint, tmp_path):
    folder = written_config(checkpoint, tmp_path) if config else checkpoint
    theirs, ours = auto.from_pretrained(folder), Tokenizer.from_folder(folder, eos_ids=(EOS,), pad_id=1)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (EOS, 1, VOCAB_SIZE)
    encoded = theirs(SENTENCE)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"] == ours.encode(SENTENCE)
    assert theirs.decode(encoded["input_ids"], skip_special_tokens=True) == ours.decode(ours.encode(SENTENCE))
    if config:
        assert theirs.model_max_length == 128
        written = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert written["model_input_names"] == list(encoded)  # transformers 4 adds token_type_ids otherwise


@pytest.mark.parametrize("config", [False, True], ids=["without", "with"])
def test_special_tokens_are_found_by_id_not_by_name(config, checkpoint, tmp_path):
    folder = written_config(checkpoint, tmp_path)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(
        text.replace("<|endoftext|>", "|||STOP|||").replace("<|padding|>", "|||PAD|||"), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").unlink()
    if config:
        written_config(folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("|||STOP|||", EOS)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("|||PAD|||", 1)
    assert len(tokenizer) == VOCAB_SIZE


def test_tokenizer_config_and_arguments_take_precedence(checkpoint, tmp_path):
    folder = written_config(checkpoint, tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|padding|>", "<|endoftext|>"), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == EOS
    assert AutoTokenizer.from_pretrained(checkpoint, pad_token="<|endoftext|>").pad_token_id == EOS
    path.write_text('{"pad_token": "<|endoftext|>"}', encoding="utf-8")  # without any end-of-text setting
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, EOS)


def test_the_chat_template_travels_in_the_tokenizer_config(checkpoint, tmp_path):
    ours = Tokenizer.from_folder(checkpoint, eos_ids=(EOS,), pad_id=1)
    ours.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    folder = written_config(checkpoint, tmp_path)
    (folder / "tokenizer_config.json").write_text(ours.transformers_config(64), encoding="utf-8")
    chat = [{"role": "user", "content": "a dog"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, return_dict=False)
    assert theirs == ours.encode_chat(chat)


def test_the_pipeline_runs_our_model(checkpoint):
    generate = olmoe.pipeline("text-generation", model=str(checkpoint), dtype=torch.bfloat16, device="cpu")
    assert type(generate.model) is olmoe.OlmoeForCausalLM
    assert generate.model.dtype == torch.bfloat16
    assert generate.tokenizer.eos_token_id == EOS
    text = generate("the dog", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("the dog")
    assert type(olmoe.pipeline(model=checkpoint).model) is olmoe.OlmoeForCausalLM  # task from the architecture


def test_the_pipeline_runs_the_other_tasks(checkpoint, tmp_path):
    embed = olmoe.pipeline("feature-extraction", model=checkpoint, model_kwargs={"dtype": torch.float32})
    assert type(embed.model) is olmoe.OlmoeModel
    olmoe.OlmoeForSequenceClassification(olmoe.OlmoeConfig(**small_config().to_dict())).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    classify = olmoe.pipeline(model=tmp_path)
    assert type(classify.model) is olmoe.OlmoeForSequenceClassification
    assert classify("the dog")[0]["label"] in ("LABEL_0", "LABEL_1")
    assert "translation" in refused(lambda: olmoe.pipeline("translation", model=checkpoint), CheckpointError)


def test_the_pipeline_leaves_other_models_and_model_objects_to_transformers(other, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generate = olmoe.pipeline("text-generation", model=str(other), tokenizer=tokenizer)
    assert type(generate.model) is transformers.LlamaForCausalLM
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert olmoe.pipeline("text-generation", model=model, tokenizer=tokenizer).model is model


def test_infer_device_names_a_device_type_of_torch():
    device = olmoe.infer_device()
    assert torch.zeros(1, device=device).device.type == device


@pytest.mark.parametrize("config", [False, True], ids=["without", "with"])
def test_the_released_tokenizer_uses_the_models_end_of_text(config, olmoe_tokenizer_file, tmp_path):
    """In the post-trained models id 50279 ends a text but has another name than in the base models."""
    text = olmoe_tokenizer_file.read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    olmoe.OlmoeConfig().save_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path, eos_ids=(50279,), pad_id=1)
    if config:
        (tmp_path / "tokenizer_config.json").write_text(ours.transformers_config(4096), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (50279, 1)
    assert len(theirs) == ours.vocab_size
    for sentence in ("Bitcoin is", SENTENCE, "Hey, are you conscious? Can you talk to me?"):
        assert theirs(sentence)["input_ids"] == ours.encode(sentence)


@pytest.mark.skipif(not hub.SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
@pytest.mark.parametrize("name", ["olmoe-tiny", "OLMoE-tiny"])
def test_the_shipped_model_loads_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = olmoe.OlmoeForCausalLM.from_pretrained(hub.SHIPPED)
    for load in (olmoe.AutoModelForCausalLM, olmoe.OlmoeForCausalLM):
        model = load.from_pretrained(name)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert type(olmoe.AutoModel.from_pretrained(name)) is olmoe.OlmoeModel
    for config in (olmoe.AutoConfig.from_pretrained(name), olmoe.OlmoeConfig.from_pretrained(name)):
        assert config.hidden_size == expected.config.hidden_size
    tokenizer = olmoe.AutoTokenizer.from_pretrained(name)
    assert tokenizer.eos_token == "<|endoftext|>"
    generate = olmoe.pipeline("text-generation", model=name, device="cpu")
    assert generate("Once", max_new_tokens=2)[0]["generated_text"].startswith("Once")
    four_bit = olmoe.BitsAndBytesConfig(load_in_4bit=True)
    assert olmoe.AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bit).is_loaded_in_4bit
