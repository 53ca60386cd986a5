"""Texts packed into one row do not see each other; when a cache is used; left padding does not count as a text."""

from __future__ import annotations

import pytest
import torch
import transformers

from configurations import VOCAB_SIZE, small_config
from olmoe import OlmoeConfig, OlmoeForCausalLM, OlmoeForSequenceClassification
from olmoe.errors import UserError
from peers import decoded, difference, peers

LENGTHS = (4, 1, 6, 3)
TEXTS = [torch.randint(2, VOCAB_SIZE - 1, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
ROW = torch.cat(TEXTS, dim=1)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
ONES = torch.ones_like(ROW)


@pytest.fixture(scope="module")
def model():
    return peers()[0]


def apart(model, texts=TEXTS):
    with torch.no_grad():
        return torch.cat([model(text, use_cache=False).logits for text in texts], dim=1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("labels", [False, True], ids=["", "labels"])
@pytest.mark.parametrize("mask", [None, ONES, ONES.bool()], ids=["no mask", "ones", "bool"])
@pytest.mark.parametrize("use_cache", [None, False, True], ids=["default", "no cache", "cache"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_texts_packed_into_one_row_are_isolated(model, attention, labels, mask, use_cache, gradients):
    model.set_attn_implementation(attention)
    options = {"position_ids": POSITIONS, "attention_mask": mask, "use_cache": use_cache}
    with torch.set_grad_enabled(gradients):
        output = model(ROW, **options, labels=ROW if labels else None)
    assert difference(output.logits, apart(model)) < 2e-5
    made = (not labels) if use_cache is None else use_cache
    assert (output.past_key_values is not None) == made


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, ONES], ids=["no mask", "ones"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_packed_training_has_the_gradients_of_separate_texts(attention, mask, checkpointing):
    model = peers(attention)[0].train()
    labels = ROW.clone()
    labels[POSITIONS == 0] = -100
    if checkpointing:
        model.gradient_checkpointing_enable()
    output = model(ROW, position_ids=POSITIONS, attention_mask=mask, labels=labels)
    output.loss.backward()
    assert output.past_key_values is None
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    predicted = sum(n - 1 for n in LENGTHS)
    for text in TEXTS:
        if text.shape[1] > 1:
            (model(text, labels=text).loss * (text.shape[1] - 1) / predicted).backward()
    for name, p in model.named_parameters():
        assert difference(found[name], p.grad) < 1e-4, name


def test_training_creates_no_cache_unless_requested(model):
    model.train()
    try:
        assert model(ROW).past_key_values is None
        assert model(ROW, use_cache=True).past_key_values is not None
        cache = transformers.DynamicCache(config=model.config)
        model(ROW, past_key_values=cache)
        assert cache.get_seq_length() == ROW.shape[1]
    finally:
        model.eval()
    assert model(ROW).past_key_values is not None
    assert model(ROW, labels=ROW).past_key_values is None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_packed_texts_fill_a_given_empty_cache(model, kind):
    cache = (
        transformers.DynamicCache(config=model.config)
        if kind == "dynamic"
        else transformers.StaticCache(config=model.config, max_cache_len=32)
    )
    with torch.no_grad():
        actual = model(ROW, position_ids=POSITIONS, past_key_values=cache).logits
    assert difference(actual, apart(model)) < 2e-5


def test_a_nonempty_cache_refuses_restarting_positions(model):
    with torch.no_grad():
        cache = model(ROW, use_cache=True).past_key_values
        with pytest.raises(UserError, match="14 tokens"):
            model(ROW, position_ids=POSITIONS, past_key_values=cache)
        on = torch.arange(14, 18).unsqueeze(0)
        whole = model(torch.cat([ROW, ROW[:, :4]], dim=1)).logits[:, 14:]
        assert difference(model(ROW[:, :4], position_ids=on, past_key_values=cache).logits, whole) < 2e-5


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_batch_of_packed_rows_with_padding(model, side):
    left, right = {"left": (3, 0), "right": (0, 3), "both": (2, 1)}[side]
    short = TEXTS[:1] + TEXTS[2:3] + TEXTS[1:2]  # 11 tokens
    fill = torch.full((1, 3), 1)
    ids = torch.cat([ROW, torch.cat([fill[:, :left], *short, fill[:, :right]], dim=1)])
    positions = torch.cat([torch.arange(n) for n in (4, 6, 1)])
    for value in (0, 1):
        row = torch.cat([torch.full((left,), value), positions, torch.full((right,), value)])
        mask = torch.ones_like(ids)
        mask[1, :left] = mask[1, 14 - right :] = 0
        for use_cache in (None, False):
            with torch.no_grad():
                options = {"position_ids": torch.stack([POSITIONS[0], row]), "attention_mask": mask}
                logits = model(ids, **options, use_cache=use_cache).logits
            assert difference(logits[:1], apart(model)) < 2e-5
            assert difference(logits[1:, left : 14 - right], apart(model, short)) < 2e-5


@pytest.mark.parametrize("fill", [0, 1, "arange"])
def test_left_padding_does_not_start_another_text(fill):
    pair = peers()
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    ids = ROW.repeat(2, 1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0 if fill == "arange" else fill)
    if fill == "arange":
        positions = torch.arange(14).expand(2, -1)
    kept = mask.bool()
    for use_cache in (True, False):
        ours, theirs = (
            m(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits[kept] for m in pair
        )
        assert difference(ours, theirs) < 2e-5
    texts = [m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None) for m in pair]
    assert torch.equal(*texts)


def test_gaps_in_a_mask_do_not_start_another_text():
    pair = peers()
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, 4:7] = 0
    for positions in (None, torch.arange(14).unsqueeze(0), (mask.cumsum(-1) - 1)):
        ours, theirs = (m(ROW, attention_mask=mask, position_ids=positions).logits[mask.bool()] for m in pair)
        assert difference(ours, theirs) < 2e-5


def test_continuing_positions_do_not_start_another_text():
    pair = peers()
    for positions in (2 * torch.arange(14), torch.arange(14) + 7, torch.tensor([*range(5), *range(20, 29)])):
        options = {"position_ids": positions.unsqueeze(0), "use_cache": True}
        ours, theirs = (m(ROW, **options).logits for m in pair)
        assert difference(ours, theirs) < 2e-5


def test_four_dimensional_masks_are_used_as_given():
    pair = peers()
    mask = torch.ones(14, 14, dtype=torch.bool).tril()[None, None]
    for use_cache in (True, False):
        options = {"position_ids": POSITIONS, "attention_mask": mask, "use_cache": use_cache}
        ours, theirs = (m(ROW, **options).logits for m in pair)
        assert difference(ours, theirs) < 2e-5


@pytest.mark.parametrize("flash", [False, True], ids=["", "flash arguments"])
@pytest.mark.parametrize("positions", [False, True], ids=["", "positions"])
@pytest.mark.parametrize("numbers", [False, True], ids=["", "seq_idx"])
def test_output_of_the_flattening_collator_is_isolated(model, flash, positions, numbers):
    if not (flash or positions or numbers):
        pytest.skip("nothing would tell the texts apart")
    collator = transformers.DataCollatorWithFlattening(
        return_position_ids=positions, return_flash_attn_kwargs=flash, return_seq_idx=numbers
    )
    batch = collator([{"input_ids": text[0].tolist()} for text in TEXTS])
    batch = {key: value for key, value in batch.items() if key != "labels"}
    for use_cache in (None, False, True):
        with torch.no_grad():
            assert difference(model(**batch, use_cache=use_cache).logits, apart(model)) < 1e-4


def test_classifiers_isolate_packed_texts():
    torch.manual_seed(0)
    classifier = OlmoeForSequenceClassification(OlmoeConfig(**small_config().to_dict(), num_labels=3)).eval()
    with torch.no_grad():
        expected = classifier(TEXTS[-1]).logits
        for mask in (None, ONES):
            options = {"position_ids": POSITIONS, "attention_mask": mask}
            assert difference(classifier(ROW, **options).logits, expected) < 2e-5
            output = classifier(ROW, **options, labels=torch.tensor([1]))
            assert difference(output.logits, expected) < 2e-5
            assert output.past_key_values is None


def test_compiled_graphs_isolate_packed_texts():
    model = peers(num_hidden_layers=1)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for options in ({}, {"use_cache": False}, {"attention_mask": ONES}):
            assert difference(compiled(ROW, position_ids=POSITIONS, **options).logits, apart(model)) < 2e-5


def test_steps_after_a_prompt_with_positions_are_unchanged(model):
    with torch.no_grad():
        cache = model(ROW, position_ids=torch.arange(14).unsqueeze(0), use_cache=True).past_key_values
        for i in range(3):
            at = torch.tensor([[14 + i]])
            logits = model(ROW[:, i : i + 1], position_ids=at, past_key_values=cache).logits
    assert difference(logits, decoded(model, ROW, 3)[:, -1:]) < 2e-5


def test_loaded_models_isolate_packed_texts(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert difference(loaded(ROW, position_ids=POSITIONS).logits, apart(model)) < 2e-5
