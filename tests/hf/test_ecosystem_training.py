"""transformers' Trainer and TRL's SFTTrainer on our model."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import olmoe
from configurations import VOCAB_SIZE, small_config
from conftest import TEXT
from quantized_models import IDS, QuantizedModels

datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")  # which transformers' Trainer needs


@pytest.fixture
def model():
    torch.manual_seed(0)
    return olmoe.OlmoeForCausalLM(olmoe.OlmoeConfig(**small_config().to_dict()))


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("tokenizer")
    olmoe.OlmoeConfig(**small_config().to_dict()).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    return olmoe.AutoTokenizer.from_pretrained(folder)


def arguments(folder):
    return {
        "output_dir": str(folder), "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0,
    }  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_learns_saves_and_resumes(model, tmp_path, text_tokenizer):
    ids = text_tokenizer(TEXT)["input_ids"]
    rows = [{"input_ids": ids[i : i + 16], "labels": ids[i : i + 16]} for i in range(0, len(ids) - 16, 8)]
    data = datasets.Dataset.from_list(rows)
    settings = arguments(tmp_path) | {"save_strategy": "steps", "save_steps": 6}
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**settings), train_dataset=data)
    trainer.train()
    whole = losses(trainer)
    assert whole[-1] < whole[0] - 0.5, whole
    evaluated = trainer.evaluate(data)["eval_loss"]
    assert evaluated == pytest.approx(whole[-1], abs=1.5)
    final = {name: value.clone() for name, value in model.state_dict().items()}

    again = transformers.Trainer(
        olmoe.OlmoeForCausalLM(model.config), transformers.TrainingArguments(**settings), train_dataset=data
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, value in again.model.state_dict().items():
        assert torch.allclose(value, final[name], atol=1e-5), name
    loaded = olmoe.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert all(torch.equal(value, final[name]) for name, value in loaded.state_dict().items())


def test_trainer_adds_the_auxiliary_loss_when_enabled(model, tmp_path):
    ids = torch.randint(2, VOCAB_SIZE - 1, (4, 12)).tolist()
    data = datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 1.0
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(**arguments(tmp_path) | {"max_steps": 1}), train_dataset=data
    )
    trainer.train()
    # K=3 is the minimum of the pooled loss, log(V) about the cross-entropy of a random model.
    assert losses(trainer)[0] > 3 + 4


@pytest.mark.parametrize(
    "loss",
    [{"output_router_logits": True}, {"router_loss": "per_layer", "router_z_loss_coef": 0.5}],
    ids=["pooled", "per layer, with z"],
)
def test_gradient_accumulation_does_not_change_router_gradients(loss, tmp_path):
    """Eight equal rows, so that every split has the same mean; transformers' own goes from 0.041 to 0.782."""
    row = torch.randint(2, VOCAB_SIZE - 1, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    data = datasets.Dataset.from_list([{"input_ids": row, "labels": [-100] * 4 + row[4:]}] * 8)
    config = olmoe.OlmoeConfig(**small_config().to_dict() | {"router_aux_loss_coef": 1.0} | loss)
    steps = []
    for accumulated in (1, 2, 8):
        torch.manual_seed(0)
        model = olmoe.OlmoeForCausalLM(config)
        before = model.model.layers[0].mlp.gate.weight.detach().clone()
        settings = arguments(tmp_path) | {
            "max_steps": 1, "per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated,
            "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
        }  # fmt: skip
        transformers.Trainer(model, transformers.TrainingArguments(**settings), train_dataset=data).train()
        steps.append(model.model.layers[0].mlp.gate.weight.detach() - before)
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-4, atol=1e-6)


def test_trl_fine_tunes_on_chats(model, tmp_path, text_tokenizer):
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_dict({"text": [line for line in TEXT.splitlines() if line]})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path), max_length=24),
        train_dataset=data,
        processing_class=text_tokenizer,
    )
    trainer.train()
    values = losses(trainer)
    assert values[-1] < values[0] - 0.5, values


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapters on experts"])
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_trl_trains_on_preferences(kind, adapted, model, tmp_path, text_tokenizer):
    trl = pytest.importorskip("trl")
    options = {} if adapted else {"ref_model": copy.deepcopy(model)}
    if adapted:
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj"]
        )
    words = ["ball", "dog", "girl", "park"]
    pairs = [(f"the {a}", " ran to the park.", " and the and the.") for a in words for _ in range(2)]
    if kind == "DPO":
        rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in pairs]
    else:
        rows = [{"prompt": p, "completion": c, "label": c == g} for p, g, b in pairs for c in (g, b)]
    settings = arguments(tmp_path) | {"router_aux_loss_coef": 0.01, "max_length": 24}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=text_tokenizer,
        **options,
    )
    trainer.train()
    values = losses(trainer)
    assert values[-1] < values[0] - 0.05, values
    assert all(entry["aux_loss"] > 2.9 for entry in trainer.state.log_history if "loss" in entry)  # at least k = 3


def test_trl_with_adapters_on_attention_and_experts(model, tmp_path, text_tokenizer):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    data = datasets.Dataset.from_dict({"text": [line for line in TEXT.splitlines() if line]})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path), max_length=24),
        train_dataset=data,
        processing_class=text_tokenizer,
        peft_config=peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], target_parameters=["mlp.experts.gate_up_proj"]
        ),
    )
    trainer.train()
    values = losses(trainer)
    assert values[-1] < values[0] - 0.2, values
    assert {type(layer.mlp.experts).__name__ for layer in model.model.layers} == {"RoutedParamWrapper"}


@pytest.mark.parametrize("format", ["nf4", "int8", "q4_0"])
def test_trl_with_adapters_on_quantized_experts(format, tmp_path, text_tokenizer):
    """TRL multiplies with the head's weight itself, which q4_0 packs too."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    model = QuantizedModels(tmp_path).load(format)
    data = datasets.Dataset.from_dict({"text": [line for line in TEXT.splitlines() if line]})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**arguments(tmp_path / "run"), max_length=24, gradient_checkpointing=True),
        train_dataset=data,
        processing_class=text_tokenizer,
        peft_config=peft.LoraConfig(
            r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    )
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    values = losses(trainer)
    assert values[-1] < values[0] - 0.2, values
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_trainer_resumes_adapters_on_quantized_experts(tmp_path):
    peft = pytest.importorskip("peft")
    models, ends = QuantizedModels(tmp_path), []
    data = datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1).tolist()])
    settings = arguments(tmp_path / "run") | {"save_strategy": "steps", "save_steps": 6}
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-6")):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
        model = peft.get_peft_model(models.load("q4_0"), config)
        trainer = transformers.Trainer(model, transformers.TrainingArguments(**settings), train_dataset=data)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, value in ends[0].items():
        assert torch.allclose(ends[1][name], value, atol=1e-5), name
