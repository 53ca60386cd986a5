"""`OlmoeLM` answers as lm-evaluation-harness' `hf` backend does with transformers' own classes, token for token."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra `ecosystem` is not installed")

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from conftest import make_model
from olmoe.engine.llm import LLM
from olmoe.errors import UserError
from olmoe.evaluate import OlmoeLM
from olmoe.io.hub import SHIPPED
from olmoe.runner import RouterPolicy

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
TASKS = Path(__file__).parents[2] / "examples" / "eval"
PAIRS = [
    ("Once upon a time", " there was a little girl named Lily."),
    ("Once upon a time", " there was a little boy named Tom."),
    ("Once upon a time", " there"),
    ("Once upon a time", " they"),
    ("Once upon a time ", "there was a dog."),  # the space goes to the continuation
    ("Once upon a time", "\n\nthere was a dog."),
    ("", "Once upon a time"),
    ("", "<|endoftext|>Once upon a time"),
    ("<|endoftext|>She had a red", " ball and a big dog. They played all day."),
    ("One day<|endoftext|>", " the cat saw a 𝄞 and a ☃."),
    (STORY * 40, " The end."),
    (STORY * 40, " She was very happy."),
    ("x" * 70, "y" * 70),
]


def instances(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def likelihoods(model, pairs=PAIRS) -> list[tuple[float, bool]]:
    return model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def texts(model, *asked) -> list[str]:
    return model.generate_until(instances("generate_until", asked), disable_tqdm=True)


# ---- what goes in ----


def test_encoding_is_the_hf_backends(ours, theirs):
    given = [*(context for context, _ in PAIRS), *(text for _, text in PAIRS), "|||IP_ADDRESS||| <|padding|>", " "]
    for text in given:
        for special in (None, False, True):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)
        assert ours.tok_encode(text, left_truncate_len=3) == theirs.tok_encode(text, left_truncate_len=3)
    for context, continuation in PAIRS:
        if context:
            assert ours._encode_pair(context, continuation) == theirs._encode_pair(context, continuation)


def test_what_the_harness_asks_about_a_model(ours, theirs):
    for name in ("eot_token_id", "prefix_token_id", "max_length", "max_gen_toks", "rank", "world_size", "backend"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.tokenizer_name == "olmoe-tiny"
    assert ours.get_model_info()["model_num_parameters"] == theirs.get_model_info()["model_num_parameters"]
    assert ours.get_model_info()["model_dtype"] == theirs.get_model_info()["model_dtype"]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|endoftext|> you"}]


def test_chats_are_those_of_the_hf_backend(ours, theirs):
    for chat, options in (
        (CHAT, {}),
        (CHAT[1:], {"add_generation_prompt": True}),
        ([*CHAT, {"role": "assistant", "content": "Once upon"}], {"add_generation_prompt": False}),
    ):
        text = ours.apply_chat_template(chat, **options)
        assert text == theirs.apply_chat_template(chat, **options)
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None


def test_a_template_that_takes_no_system_message_does_without(ours, monkeypatch, caplog):
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    monkeypatch.setattr(ours.tokenizer, "chat_template", template + "{% endfor %}")
    with caplog.at_level(logging.WARNING, "olmoe"):
        assert ours.apply_chat_template(CHAT) == CHAT[1]["content"]
    assert "no system message" in caplog.text
    monkeypatch.setattr(ours.tokenizer, "chat_template", "{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="never"):
        ours.apply_chat_template(CHAT[1:])


# ---- what comes out ----


def test_log_likelihoods_are_the_hf_backends(ours, theirs):
    for (mine, greedy), (reference, reference_greedy) in zip(likelihoods(ours), likelihoods(theirs), strict=True):
        assert mine == pytest.approx(reference, abs=1e-4)
        assert greedy == reference_greedy
    assert {greedy for _, greedy in likelihoods(ours)} == {True, False}


def test_contexts_lose_their_beginning_as_in_the_hf_backend(theirs, monkeypatch):
    short = OlmoeLM(dtype="float32", max_length=24, show_progress=False)
    monkeypatch.setattr(theirs, "_max_length", 24)
    long = [(STORY, " The end."), (STORY, " Lily" * 20), (" She", " Lily" * 20)]
    for mine, reference in zip(likelihoods(short, long), likelihoods(theirs, long), strict=True):
        assert mine[0] == pytest.approx(reference[0], abs=1e-4)
    asked = [(STORY * 3, {"until": ["\n"], "max_gen_toks": 12})]
    assert texts(short, *asked) == texts(theirs, *asked)


def test_rolling_log_likelihoods_are_the_hf_backends(ours, theirs, monkeypatch):
    given = [(STORY,), (STORY * 30,), ("",), ("One",)]
    asked = instances("loglikelihood_rolling", given)
    for mine, reference in ((ours, theirs), (OlmoeLM(dtype="float32", max_length=20, show_progress=False), theirs)):
        monkeypatch.setattr(theirs, "_max_length", mine.max_length)
        expected = reference.loglikelihood_rolling(asked, disable_tqdm=True)
        assert mine.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, abs=2e-3, rel=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"until": ["."], "max_gen_toks": 30},
        {"until": "\n\n", "max_gen_toks": 10, "do_sample": False, "temperature": 0.7},
        {"until": ["girl", "Lily", " a"], "max_new_tokens": 20},
        {"until": [], "max_tokens": 25, "temperature": 0.0},
        {"until": ["zzz"], "max_gen_toks": 1},
        {"max_gen_toks": 12, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_texts_are_the_hf_backends(ours, theirs, arguments):
    contexts = ["Once upon a time", "The dog ran to the", STORY, "One day, Tom and Lily", "<|endoftext|>"]
    asked = [(context, arguments) for context in contexts]
    assert texts(ours, *asked) == texts(theirs, *asked)


def test_the_end_of_a_text_ends_it_and_shows_nowhere(ours, theirs):
    asked = [("They all lived happily ever after. The end.", {"until": ["zzz"], "max_gen_toks": 40})]
    assert texts(ours, *asked) == texts(theirs, *asked)
    assert "<|endoftext|>" not in texts(ours, *asked)[0]


@pytest.mark.parametrize("task", ["next_sentence", "pages", "retell"])
def test_scores_are_the_hf_backends(ours, theirs, task):
    found = []
    for model in (ours, theirs):
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        results = lm_eval.simple_evaluate(
            model=model, tasks=[task], task_manager=manager, limit=24, bootstrap_iters=0, log_samples=True
        )
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        found.append((results["results"][task], [sample["filtered_resps"] for sample in samples]))
    (scores, answers), (reference, expected) = found
    numbers = {name: value for name, value in reference.items() if isinstance(value, float)}
    assert numbers
    for name, value in numbers.items():
        assert scores[name] == pytest.approx(value, abs=1e-3, rel=1e-5), name
    if task == "retell":
        assert answers == expected
    elif task == "next_sentence":
        for mine, theirs_ in zip(answers, expected, strict=True):
            assert [float(score) for score, _ in mine] == pytest.approx([float(s) for s, _ in theirs_], abs=1e-4)


# ---- options ----


def test_it_is_registered_and_takes_the_harness_arguments():
    assert get_model("olmoe") is OlmoeLM
    model = OlmoeLM.create_from_arg_string(
        f"pretrained={SHIPPED},dtype=float32,max_length=100",
        {"batch_size": "4", "max_batch_size": None, "device": "cpu"},
    )
    assert (model.max_length, model._rows, str(model.device)) == (100, 4, "cpu")
    assert model.name == str(SHIPPED)
    assert "/" not in model.tokenizer_name
    assert OlmoeLM.create_from_arg_obj({"threads": None}, {"batch_size": 1})._rows == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_gpu_that_the_harness_command_names_need_not_be_there():
    assert str(OlmoeLM(device="cuda:0").device) == "cpu"


def test_an_llm_is_taken_as_it_is(tokenizer):
    llm = LLM.from_parts(make_model(), tokenizer, cache_dtype="float16")
    model = OlmoeLM(llm, show_progress=False)
    assert model.llm is llm
    assert likelihoods(model, [("the", " dog")])[0][0] < 0
    assert model.name == "olmoe"


def test_prefix_token_and_bos(ours):
    model = OlmoeLM(ours.llm, prefix_token_id=5, add_bos_token=True, show_progress=False)
    assert model.prefix_token_id == 5
    assert model.tok_encode("Once") == [5, *ours.tok_encode("Once")]
    assert model.tok_encode("Once", add_special_tokens=False) == ours.tok_encode("Once")
    (first,) = likelihoods(model, [("", "Once upon")])
    (second,) = likelihoods(ours, [("", "Once upon")])
    assert first != second
    begun = model.tokenizer.decode([5], skip_special_tokens=False)
    assert model.tok_encode(begun + " x")[0] == model.tokenizer.encode(begun + " x")[0]


def test_a_prefix_that_the_text_begins_with_is_its_context(ours, theirs):
    pairs = [("", "<|endoftext|> Once")]
    assert likelihoods(ours, pairs)[0][0] == pytest.approx(likelihoods(theirs, pairs)[0][0], abs=1e-4)


def test_small_batches_and_memory_change_nothing(ours):
    small = OlmoeLM(
        LLM(dtype="float32", cache_bytes=2**20), batch_size=2, show_progress=False,
    )  # fmt: skip
    assert likelihoods(small) == likelihoods(ours)
    asked = [(context, {"until": ["."], "max_gen_toks": 12}) for context, _ in PAIRS[:6]]
    assert texts(small, *asked) == texts(ours, *asked)


def test_samples_can_be_repeated_and_differ(ours):
    asked = [("Once upon a time", {"until": ["."], "max_gen_toks": 20, "do_sample": True, "temperature": 1.2})] * 3
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(texts(ours, *asked))
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) > 1


@pytest.mark.parametrize("mark", [" girl", "id"])
def test_an_answer_begins_behind_the_thinking(ours, theirs, monkeypatch, mark):
    token = ours.tok_encode(" girl")[-1] if mark == "id" else mark
    model = OlmoeLM(ours.llm, think_end_token=str(token), show_progress=False)
    monkeypatch.setattr(theirs, "think_end_token", token)
    asked = [("Once upon a time", {"until": ["."], "max_gen_toks": 30})]
    assert texts(model, *asked) == texts(theirs, *asked)
    assert texts(model, *asked) != texts(ours, *asked)


def test_a_router_policy_counts_everywhere(ours):
    model = OlmoeLM(ours.llm, router_policy=RouterPolicy(top_k=1), show_progress=False)
    assert likelihoods(model, PAIRS[:3]) != likelihoods(ours, PAIRS[:3])
    asked = [("Once upon a time", {"until": ["."], "max_gen_toks": 20})]
    assert texts(model, *asked) != texts(ours, *asked)


def test_answers_are_kept_for_the_next_run(ours, tmp_path, monkeypatch):
    pytest.importorskip("sqlitedict")
    asked = instances("generate_until", [("Once upon a time", {"until": ["."], "max_gen_toks": 5})])
    pairs = instances("loglikelihood", PAIRS[:4])
    first = CachingLM(ours, str(tmp_path / "cache.db"))
    try:
        found = first.loglikelihood(pairs), first.generate_until(asked)
        first.dbdict.close()
        second = CachingLM(ours, str(tmp_path / "cache.db"))
        monkeypatch.setattr(ours, "_loglikelihood_tokens", None)
        monkeypatch.setattr(ours.llm, "as_completed", None)
        assert (second.loglikelihood(pairs), second.generate_until(asked)) == found
        second.dbdict.close()
    finally:
        ours.set_cache_hook(type(ours.cache_hook)(None))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_length": 10**6}, "max_length is 1000000, but the model's context ends at"),
        ({"max_length": 1}, "max_length"),
        ({"batch_size": "many"}, "batch_size must be a whole number, at least 1, not 'many'"),
        ({"batch_size": 0}, "batch_size"),
        ({"prefix_token_id": 10**6}, "The prefix token 1000000 is outside the vocabulary"),
        ({"router_policy": "nowhere.json"}, "nowhere.json cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(ours, options, what):
    with pytest.raises(UserError, match=what):
        OlmoeLM(ours.llm, **options)


def test_what_a_task_cannot_ask_for_is_said(ours):
    with pytest.raises(UserError, match=r"generation argument num_beams=4, which olmoe does not know"):
        texts(ours, ("Once", {"until": ["."], "num_beams": 4}))
    with pytest.raises(UserError, match="5000 new tokens leave no room"):
        texts(ours, ("Once", {"until": ["."], "max_gen_toks": 5000}))
    with pytest.raises(UserError, match="A continuation of 0 tokens after 1 cannot be scored"):
        ours._loglikelihood_tokens([(("a", ""), [5], [])])


def test_bos_is_added_as_in_the_hf_backend(ours):
    theirs = HFLM(pretrained=str(SHIPPED), dtype="float32", device="cpu", add_bos_token=True)
    model = OlmoeLM(ours.llm, add_bos_token=True, show_progress=False)
    for text in ("Once", "<|endoftext|>Once", ""):
        for special in (None, False, True):
            assert model.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)
