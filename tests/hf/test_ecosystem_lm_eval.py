"""lm-evaluation-harness' Hugging Face backend on our model, with a task on local data."""

from __future__ import annotations

import json
import math

import pytest
import torch

import olmoe
from configurations import small_config

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

QUESTIONS = [
    {"question": "She had a red", "choices": [" ball", " park"], "answer": 0},
    {"question": "The dog ran to the", "choices": [" girl", " ball"], "answer": 1},
    {"question": "One day the girl and the dog went to the", "choices": [" park", " time"], "answer": 0},
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory, tokenizer_file):
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    olmoe.OlmoeForCausalLM(olmoe.OlmoeConfig(**small_config().to_dict())).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    model = olmoe.AutoModelForCausalLM.from_pretrained(folder)
    return HFLM(pretrained=model, tokenizer=olmoe.AutoTokenizer.from_pretrained(folder), batch_size=2)


def evaluate(backend, folder, **task):
    from lm_eval.tasks import TaskManager

    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        **task,
    }
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=backend, tasks=[config], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return results["results"]["local"], results["samples"]["local"]


def log_probability(backend, question, choice):
    tokenizer, model = backend.tokenizer, backend.model
    prompt, ids = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return sum(float(scores[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))


def test_multiple_choice_scores_are_the_models_log_probabilities(backend, tmp_path):
    results, samples = evaluate(
        backend, tmp_path, output_type="multiple_choice", doc_to_text="{{question}}", doc_to_choice="{{choices}}",
        doc_to_target="answer", target_delimiter="",
    )  # fmt: skip
    expected = [[log_probability(backend, row["question"], c) for c in row["choices"]] for row in QUESTIONS]
    for sample in samples:
        scores = [float(answer[0]) for answer in sample["filtered_resps"]]
        assert scores == pytest.approx(expected[sample["doc_id"]], abs=1e-4)
    right = [max(range(2), key=e.__getitem__) == row["answer"] for e, row in zip(expected, QUESTIONS, strict=True)]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))


def test_perplexity_and_generation(backend, tmp_path):
    (tmp_path / "a").mkdir()
    results, _ = evaluate(
        backend, tmp_path / "a", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )  # fmt: skip
    assert 0 < results["bits_per_byte,none"] < 2 * math.log2(320)
    (tmp_path / "b").mkdir()
    _, samples = evaluate(
        backend, tmp_path / "b", output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{answer}}",
        generation_kwargs={"max_gen_toks": 4, "until": ["\n"], "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    assert all(isinstance(sample["filtered_resps"][0], str) for sample in samples)


def test_the_backend_uses_our_registered_class_for_a_folder(backend):
    from lm_eval.models.huggingface import HFLM

    import olmoe.hf

    folder = backend.model.config._name_or_path
    olmoe.hf.register()
    try:
        by_name = HFLM(pretrained=folder, batch_size=2, device="cpu")
    finally:
        olmoe.hf.unregister()
    assert type(by_name.model) is olmoe.OlmoeForCausalLM
    assert by_name.eot_token_id == backend.tokenizer.eos_token_id
