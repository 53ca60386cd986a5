"""The key-value cache under either of its names, with any supported version of transformers."""

from __future__ import annotations

import inspect
import logging
import warnings

import pytest
import torch
import transformers
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification, OlmoeModel
from olmoe.errors import UserError
from olmoe.hf.cache_name import CACHE, one_cache

IDS = torch.randint(2, VOCAB_SIZE - 1, (2, 10), generator=torch.Generator().manual_seed(1))
NAMES = ["past_key_values", "cache"]
CLASSES = [OlmoeModel, OlmoeForCausalLM, OlmoeForSequenceClassification]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def build(kind=OlmoeForCausalLM, attention="sdpa"):
    torch.manual_seed(0)
    return kind(OlmoeConfig(**small_config().to_dict(), num_labels=3, attn_implementation=attention)).eval()


def first(output):
    return output[0] if isinstance(output[0], torch.Tensor) else output.logits


def test_the_cache_name_matches_installed_outputs_and_generate():
    for kind in (MoeModelOutputWithPast, MoeCausalLMOutputWithPast):
        assert CACHE in {field for field in kind.__dataclass_fields__ if field in NAMES}
    theirs = inspect.signature(transformers.OlmoeModel.forward).parameters
    assert CACHE in theirs


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_forward_pass_accepts_either_name_and_the_documented_position(kind):
    model = build(kind)
    with torch.no_grad():
        whole = first(model(IDS))[:, -1] if kind is not OlmoeForSequenceClassification else first(model(IDS))
        for name in [*NAMES, None]:
            cache = transformers.DynamicCache(config=model.config)
            model(IDS[:, :6], **{name or "cache": cache})
            assert cache.get_seq_length() == 6
            rest = IDS[:, 6:]
            output = model(rest, **{name: cache}) if name else model(rest, None, None, cache)
            last = first(output)[:, -1] if kind is not OlmoeForSequenceClassification else first(output)
            torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-5)
            assert cache.get_seq_length() == 10
            assert getattr(output, CACHE) is output[CACHE] is output.past_key_values is cache
            assert output["past_key_values"] is cache


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_both_names_at_once_are_refused(kind):
    model = build(kind)
    caches = {name: transformers.DynamicCache(config=model.config) for name in NAMES}
    with pytest.raises(UserError, match=r"^past_key_values \(DynamicCache\) and cache [^.]* give one of them\.$"):
        model(IDS, **caches)
    with pytest.raises(UserError, match="two names of one argument"):
        model(IDS, None, None, caches["past_key_values"], cache=caches["cache"])
    assert all(cache.get_seq_length() == 0 for cache in caches.values())
    assert model(IDS, past_key_values=None, **{"cache": caches["cache"]}) is not None  # one of them and None is fine


def test_an_empty_cache_counts_as_a_cache():
    empty = transformers.DynamicCache()
    assert one_cache(None, empty) is one_cache(empty, None) is empty
    assert one_cache(None, None) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [transformers.DynamicCache, transformers.StaticCache], ids=["dynamic", "static"])
def test_generation_continues_a_cache_under_either_name(kind, name):
    model = build()
    expected = model.generate(IDS, **GREEDY)
    options = {"max_cache_len": 32} if kind is transformers.StaticCache else {}
    cache = kind(config=model.config, **options)
    with torch.no_grad():
        model(IDS[:, :6], **{name: cache})
    output = model.generate(IDS, **{name: cache}, return_dict_in_generate=True, disable_compile=True, **GREEDY)
    assert torch.equal(output.sequences, expected)
    assert output.past_key_values is getattr(output, CACHE) is cache
    assert int(cache.get_seq_length()) == expected.shape[1] - 1
    with pytest.raises(UserError, match="two names of one argument"):
        model.generate(IDS, past_key_values=cache, cache=cache, **GREEDY)


def test_generation_keeps_its_documented_signature():
    theirs = inspect.signature(transformers.GenerationMixin.generate)
    assert inspect.signature(OlmoeForCausalLM.generate) == theirs
    assert OlmoeForCausalLM.can_generate()


def test_our_code_uses_no_deprecated_name(monkeypatch):
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, *text: said.append(text))  # transformers adds it
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = build().train()
        model(IDS, labels=IDS).loss.backward()
        model.eval().generate(IDS, cache=transformers.DynamicCache(config=model.config), **GREEDY)
        for kind in CLASSES:
            build(kind)(IDS, cache=transformers.DynamicCache(config=model.config))
            build(kind)(IDS, None, None, transformers.DynamicCache(config=model.config))
    said += [warning.message for warning in warned]
    assert not [text for text in said if "past_key_values" in str(text)]


@pytest.mark.skipif(CACHE != "cache", reason="transformers before 5.24 has only the old name")
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_old_name_is_accepted_with_one_warning_as_in_transformers(kind):
    model = build(kind)
    calls = [lambda **given: model(IDS, **given)]
    if kind is OlmoeForCausalLM:
        calls.append(lambda **given: model.generate(IDS, **given, **GREEDY))
    for call in calls:
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated") as warned:
            call(past_key_values=transformers.DynamicCache(config=model.config))
        assert len(warned) == 1
        assert kind.__name__ in str(warned[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            call(past_key_values=None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_equals_transformers(attention):
    mine = build(attention=attention)
    config = transformers.OlmoeConfig(**small_config().to_dict(), attn_implementation=attention)
    theirs = transformers.OlmoeForCausalLM(config).eval()
    theirs.load_state_dict(mine.state_dict())
    # By default its cache would take most of the machine's memory.
    small = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    prompts = [IDS[0].tolist(), IDS[1, :7].tolist()]
    texts = []
    for model in (mine, theirs):
        results = model.generate_batch(
            inputs=prompts, generation_config=settings, continuous_batching_config=small
        ).values()
        assert [result.error for result in results] == [None, None]
        texts.append([result.generated_tokens for result in results])
    assert texts[0] == texts[1]
    assert [len(text) for text in texts[0]] == [6, 6]


def test_evaluation_gathers_no_caches(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=1)
    result = transformers.Trainer(build(), arguments).predict(rows)
    assert result.predictions.shape == (2, 10, VOCAB_SIZE)
