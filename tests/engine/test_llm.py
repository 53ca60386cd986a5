"""`LLM`: cached and batched generation against whole-sequence recomputation, and every finish reason."""

from __future__ import annotations

import json
import logging
import shutil
import types
from pathlib import Path

import pytest
import torch

from configurations import CASES, VOCAB_SIZE
from conftest import make_model
from olmoe.config import RopeParameters
from olmoe.engine import engine as engine_module
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import CheckpointError, ConfigError, TokenizerError, UserError
from olmoe.model import CausalLM, causal_attend
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint, export

PROMPTS = ["Once upon a time", "O", "The dog ran to the park. They were very happy. The end.", "😀 dog"]
EOS = VOCAB_SIZE - 1


@pytest.fixture(scope="module")
def llm(tokenizer) -> LLM:
    return LLM.from_parts(make_model(), tokenizer)


def with_eos(tokenizer_file: Path, *eos_ids: int, **changes) -> LLM:
    return LLM.from_parts(make_model(**changes), Tokenizer.from_file(tokenizer_file, eos_ids=eos_ids))


@torch.inference_mode()
def recomputed(model: CausalLM, prompt_ids: list[int], count: int, allowed: int = VOCAB_SIZE) -> list[int]:
    """Greedy ids without a cache, running the whole sequence through the network for every token."""
    ids = list(prompt_ids)
    for _ in range(count):
        batch = torch.tensor([ids])
        hidden = model(batch, torch.arange(len(ids))[None], causal_attend).hidden
        ids.append(int(model.logits(hidden[0, -1])[:allowed].argmax()))
    return ids[len(prompt_ids) :]


def up_to_first(ids: list[int], *ends: int) -> list[int]:
    return ids[: next(i for i, token in enumerate(ids) if token in ends) + 1]


# ---- the same text with and without a cache, alone and in a batch ----


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("released", "gqa", "mqa", "linear_rope", "dynamic_rope_short", "tied")],
    ids=lambda case: case.name,
)  # fmt: skip
def test_greedy_equals_recomputing_the_whole_sequence(case, tokenizer):
    model = make_model(seed=3, **case.changes)
    llm = LLM.from_parts(model, tokenizer)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert completion.token_ids == recomputed(model, tokenizer.encode(prompt), 30)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "one_token"], ids=lambda case: case.name)
def test_a_batch_gives_each_prompt_the_text_it_gets_alone(case, tokenizer):
    llm = LLM.from_parts(make_model(seed=4, **case.changes), tokenizer)
    for params in (
        SamplingParams(max_new_tokens=14),
        SamplingParams(max_new_tokens=14, temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.2, seed=7),
    ):
        together = llm.generate(PROMPTS, params)
        assert together == [llm.generate(prompt, params)[0] for prompt in PROMPTS]
        assert len({tuple(completion.token_ids) for completion in together}) > 1


def test_texts_that_end_early_do_not_affect_the_rest_of_the_batch(llm):
    limits = [12, 1, 30, 2]
    params = [SamplingParams(max_new_tokens=n, temperature=0.8 * (n % 4 == 0), seed=n) for n in limits]
    together = llm.generate(PROMPTS, params)
    assert [len(c.token_ids) for c in together] == limits
    assert together == [llm.generate(prompt, p)[0] for prompt, p in zip(PROMPTS, params, strict=True)]


def test_every_member_of_a_batch_draws_with_its_own_seed(llm):
    params = [SamplingParams(max_new_tokens=12, temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    first, second, third = llm.generate([PROMPTS[0]] * 3, params)
    assert first == third != second
    # One SamplingParams for all gives each the same seed, so equal prompts give equal texts.
    assert llm.generate([PROMPTS[0]] * 2, params[0]) == [first, first]


def test_unseeded_sampling_varies_and_does_not_touch_the_global_generator(llm):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    params = SamplingParams(max_new_tokens=20, temperature=2.0)
    assert llm.generate("dog", params) != llm.generate("dog", params)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_chooses_near_optimal_tokens(tokenizer):
    exact = make_model(seed=2)
    for dtype in (torch.bfloat16, torch.float16):
        model = make_model(seed=2).to(dtype)
        llm = LLM.from_parts(model, tokenizer)
        completions = llm.generate(PROMPTS, SamplingParams(max_new_tokens=16, ignore_eos=True))
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            ids = tokenizer.encode(prompt)
            whole = torch.tensor([ids + completion.token_ids])
            hidden = exact(whole, torch.arange(whole.shape[1])[None], causal_attend).hidden
            scores = exact.logits(hidden[0, len(ids) - 1 : -1])
            chosen = scores.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert (scores.amax(1) - chosen).max() < 0.15 * scores.std()


def test_padding_rows_of_the_output_head_are_never_generated(tokenizer):
    model = make_model(vocab_size=VOCAB_SIZE + 32)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] *= 100.0
    llm = LLM.from_parts(model, tokenizer)
    for params in (SamplingParams(max_new_tokens=30), SamplingParams(max_new_tokens=30, temperature=5.0, seed=1)):
        for completion in llm.generate(PROMPTS, params):
            assert max(completion.token_ids) < VOCAB_SIZE
    greedy = llm.generate("dog", SamplingParams(max_new_tokens=9, ignore_eos=True))[0].token_ids
    assert greedy == recomputed(model, tokenizer.encode("dog"), 9)
    assert greedy != recomputed(model, tokenizer.encode("dog"), 9, allowed=VOCAB_SIZE + 32)


# ---- how a text ends ----


@pytest.fixture(scope="module")
def free_run(llm) -> list[int]:
    """Greedy ids of PROMPTS[0] that nothing ends early."""
    return llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True))[0].token_ids


def test_max_new_tokens_ends_a_text(llm, free_run, tokenizer):
    for count in (1, 2, 17):
        (completion,) = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=count))
        assert (completion.finish_reason, completion.token_ids) == ("length", free_run[:count])
        assert completion.text == tokenizer.decode(free_run[:count])
        assert completion.prompt_tokens == len(tokenizer.encode(PROMPTS[0]))


def test_any_of_several_eos_ids_ends_a_text(tokenizer_file, free_run):
    distinct = list(dict.fromkeys(free_run))
    for eos_ids in ([distinct[2]], [distinct[3], distinct[1]], [EOS, distinct[4]]):
        llm = with_eos(tokenizer_file, *eos_ids)
        (completion,) = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=40))
        assert completion.token_ids == up_to_first(free_run, *eos_ids)
        assert completion.finish_reason == "eos"
        assert completion.text == llm.tokenizer.decode(completion.token_ids[:-1])


def test_eos_as_the_last_allowed_token_is_still_the_finish_reason(tokenizer_file, free_run):
    eos = list(dict.fromkeys(free_run))[2]
    count = len(up_to_first(free_run, eos))
    (completion,) = with_eos(tokenizer_file, eos).generate(PROMPTS[0], SamplingParams(max_new_tokens=count))
    assert (completion.finish_reason, len(completion.token_ids)) == ("eos", count)


def test_ignore_eos_continues_and_emits_no_text_for_it(tokenizer_file, free_run):
    eos = list(dict.fromkeys(free_run))[2]
    llm = with_eos(tokenizer_file, eos)
    (completion,) = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True))
    assert (completion.finish_reason, completion.token_ids) == ("length", free_run)
    assert completion.text == llm.tokenizer.decode([i for i in free_run if i != eos])


def test_eos_in_a_prompt_does_not_end_the_text(llm, free_run, tokenizer):
    assert EOS not in free_run
    (completion,) = llm.generate([EOS, *tokenizer.encode("dog"), EOS], SamplingParams(max_new_tokens=5))
    assert len(completion.token_ids) == 5


def test_stop_strings_end_a_text_across_tokens(llm, free_run, tokenizer):
    text = tokenizer.decode(free_run)
    stop = text[8:11]  # three characters, which are at least two tokens of this model's output
    assert all(stop not in tokenizer.token_bytes(i).decode(errors="replace") for i in free_run)
    (completion,) = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=40, stop=["never this", stop]))
    assert completion.finish_reason == "stop"
    assert completion.text == text[: text.find(stop)]
    assert stop in tokenizer.decode(completion.token_ids)  # the ids are all that were generated
    assert stop not in tokenizer.decode(completion.token_ids[:-1])


def test_held_back_text_appears_at_the_end(tokenizer_file, llm, free_run, tokenizer):
    text = tokenizer.decode(free_run)
    stop = text[-2:] + "never this"
    (completion,) = llm.generate(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True, stop=stop))
    assert (completion.text, completion.finish_reason) == (text, "length")
    assert "".join(llm.stream(PROMPTS[0], SamplingParams(max_new_tokens=40, ignore_eos=True, stop=stop))) == text

    eos = list(dict.fromkeys(free_run))[3]
    before = tokenizer.decode(up_to_first(free_run, eos)[:-1])
    params = SamplingParams(max_new_tokens=40, stop=before[-1] + "never this")
    (completion,) = with_eos(tokenizer_file, eos).generate(PROMPTS[0], params)
    assert (completion.text, completion.finish_reason) == (before, "eos")


def test_a_batch_may_mix_all_finish_reasons(tokenizer_file, free_run, tokenizer):
    eos = list(dict.fromkeys(free_run))[3]
    llm = with_eos(tokenizer_file, eos)
    params = [
        SamplingParams(max_new_tokens=40),
        SamplingParams(max_new_tokens=40, ignore_eos=True, stop=tokenizer.decode(free_run)[6:8]),
        SamplingParams(max_new_tokens=3, ignore_eos=True),
    ]
    completions = llm.generate([PROMPTS[0]] * 3, params)
    assert [c.finish_reason for c in completions] == ["eos", "stop", "length"]
    assert completions == [llm.generate(PROMPTS[0], p)[0] for p in params]


def test_a_full_context_ends_a_text_with_a_warning(llm, tokenizer, caplog):
    prompt = [5] * 120
    with caplog.at_level(logging.WARNING, logger="olmoe"):
        (completion,) = llm.generate(prompt, SamplingParams(max_new_tokens=50, ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (8, "length")
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "only 8 of 50 new tokens fit the context of 128"
    ]
    caplog.clear()
    llm.generate(prompt, SamplingParams(max_new_tokens=8))
    assert not caplog.records


def test_the_last_position_of_the_context_can_be_used(llm):
    (completion,) = llm.generate([5] * 127, SamplingParams(max_new_tokens=1))
    assert len(completion.token_ids) == 1


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (RopeParameters(), 16),
        (RopeParameters(rope_type="linear", factor=2.5), 40),
        (RopeParameters(rope_type="dynamic", factor=4.0), 64),
    ],
)
def test_scaled_rope_stretches_the_context(tokenizer, rope, context):
    llm = LLM.from_parts(make_model(max_position_embeddings=16, rope=rope), tokenizer)
    assert llm.context_length == context
    (completion,) = llm.generate([5] * 10, SamplingParams(max_new_tokens=100, ignore_eos=True))
    assert len(completion.token_ids) == context - 10


# ---- what a caller may pass ----


def test_every_form_of_prompt_is_accepted(llm, tokenizer):
    params = SamplingParams(max_new_tokens=4)
    ids = tokenizer.encode("The dog")
    (expected,) = llm.generate("The dog", params)
    for one in (["The dog"], ids, tuple(ids), [ids], ("The dog",)):
        assert llm.generate(one, params) == [expected]
    assert llm.generate(["The dog", ids, tuple(ids)], [params] * 3) == [expected] * 3
    assert llm.generate([]) == []
    assert llm.generate([], []) == []
    assert len(llm.generate("dog")[0].token_ids) > 4  # parameters have defaults


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("", r"^The prompt is empty; give at least one character\.$"),
        (["dog", ""], r"^The prompt is empty"),
        ([[5], []], r"^The prompt is empty"),
        ([5, VOCAB_SIZE], rf"^The prompt holds the id {VOCAB_SIZE}, outside the vocabulary of {VOCAB_SIZE}\.$"),
        ([[5, 6], [7, -1]], r"^The prompt holds the id -1, outside"),
        ([5] * 128, r"^The prompt has 128 tokens, but the model's context ends at 128; shorten it\.$"),
        ("dog " * 200, r"^The prompt has \d+ tokens, but the model's context ends at 128; shorten it\.$"),
        ("dog \udcff", r"^The text is not valid Unicode"),
    ],
)  # fmt: skip
def test_invalid_prompts_are_refused_before_anything_runs(llm, prompts, sentence):
    with pytest.raises(UserError, match=sentence):
        llm.generate(prompts)
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        with pytest.raises(UserError, match=sentence):
            llm.stream(prompts)


def test_a_wrong_number_of_parameters_is_refused(llm):
    with pytest.raises(UserError, match=r"^2 sampling parameters were given for 1 prompts\.$"):
        llm.generate("dog", [SamplingParams()] * 2)


def test_a_broken_model_is_reported_in_one_sentence(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        LLM.from_parts(model, tokenizer).generate("dog")


# ---- streaming ----


def test_a_stream_gives_the_text_of_generate_in_parts(llm):
    for params in (
        SamplingParams(max_new_tokens=25),
        SamplingParams(max_new_tokens=25, temperature=1.0, seed=3),
        SamplingParams(max_new_tokens=25, temperature=1.0, seed=3, stop=["th", "a"]),
    ):
        stream = llm.stream("Once upon", params)
        assert stream.completion is None
        pieces = list(stream)
        assert all(pieces)
        assert stream.completion == llm.generate("Once upon", params)[0]
        assert "".join(pieces) == stream.completion.text


def test_a_stream_yields_tokens_as_generated_but_holds_back_possible_stop_strings(llm, tokenizer):
    text = llm.generate("dog", SamplingParams(max_new_tokens=30, temperature=1.0, seed=1))[0].text
    assert len(text) > 20
    stop = text[10:14]
    stream = llm.stream("dog", SamplingParams(max_new_tokens=30, temperature=1.0, seed=1, stop=stop))
    shown = ""
    for piece in stream:
        shown += piece
        assert stream.completion is None
        assert text[: text.find(stop)].startswith(shown)  # never a character of the stop string
    assert shown == text[: text.find(stop)]


def test_streams_may_be_interleaved_and_abandoned(llm):
    params = [SamplingParams(max_new_tokens=15, temperature=1.0, seed=s) for s in (1, 2)]
    alone = [list(llm.stream("dog", p)) for p in params]
    abandoned = iter(llm.stream("dog", params[0]))
    next(abandoned)
    first, second = (iter(llm.stream("dog", p)) for p in params)
    woven: list[list[str]] = [[], []]
    for pieces, source in [(woven[0], first), (woven[1], second)] * 20:
        pieces += [piece for piece in [next(source, "")] if piece]
    assert woven == alone


def test_a_stream_does_not_change_its_readers_gradient_mode(llm):
    for _ in llm.stream("dog", SamplingParams(max_new_tokens=5)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_statistics_count_tokens(llm, tokenizer):
    stream = llm.stream("The dog", SamplingParams(max_new_tokens=7, ignore_eos=True))
    list(stream)
    statistics = stream.statistics
    assert statistics.prompt_tokens == len(tokenizer.encode("The dog"))
    assert (statistics.new_tokens, statistics.decode_tokens) == (7, 6)  # prefill yields the first
    assert statistics.prefill_seconds > 0
    assert statistics.decode_seconds > 0


def test_statistics_exclude_the_readers_time(llm, monkeypatch):
    clock = [1.0]
    monkeypatch.setattr(engine_module, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    forward = type(llm._runner).forward

    def timed(runner, batch, *arguments):
        clock[0] += bool(batch.lengths[0])
        return forward(runner, batch, *arguments)

    monkeypatch.setattr(type(llm._runner), "forward", timed)
    stream = llm.stream("dog", SamplingParams(max_new_tokens=6, ignore_eos=True))
    for _ in stream:
        clock[0] += 1000.0
    assert stream.statistics.decode_seconds == 5.0


# ---- loading ----


@pytest.fixture
def folder(tmp_path, tokenizer_file) -> Path:
    target = tmp_path / "model"
    model = make_model(seed=9, vocab_size=VOCAB_SIZE + 8)
    export.save(model, target, extra_files={"tokenizer.json": tokenizer_file.read_text(encoding="utf-8")})
    return target


def test_a_loaded_folder_gives_the_texts_of_the_saved_model(folder, tokenizer):
    params = SamplingParams(max_new_tokens=20, temperature=0.7, seed=0)
    expected = LLM.from_parts(make_model(seed=9, vocab_size=VOCAB_SIZE + 8), tokenizer).generate(PROMPTS, params)
    for place in (folder, str(folder)):
        llm = LLM(place)
        assert llm.generate(PROMPTS, params) == expected
        assert (llm.tokenizer.eos_ids, llm.tokenizer.pad_id, llm.device.type) == ((EOS,), 1, "cpu")


def test_loading_reports_its_progress(folder):
    seen: list[tuple[int, int]] = []
    LLM(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 10


def test_the_dtype_is_the_stored_or_the_requested_one(folder, tokenizer_file, tmp_path):
    assert next(LLM(folder).model.parameters()).dtype == torch.float32
    for name, dtype in (("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", torch.float32)):
        llm = LLM(folder, dtype=name)
        assert {p.dtype for p in llm.model.parameters()} == {dtype}
        assert len(llm.generate("dog", SamplingParams(max_new_tokens=3, ignore_eos=True))[0].token_ids) == 3
    text = tokenizer_file.read_text(encoding="utf-8")
    export.save(make_model(), tmp_path / "half", dtype=torch.bfloat16, extra_files={"tokenizer.json": text})
    assert next(LLM(tmp_path / "half").model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("generation_config", "eos_ids"),
    [
        ('{"eos_token_id": [5, 6]}', (5, 6)),
        ('{"eos_token_id": 7}', (7,)),
        ('{"eos_token_id": null}', (EOS,)),
        ('{"eos_token_id": []}', (EOS,)),
        ('{"eos_token_id": ["a"]}', (EOS,)),
        ("{}", (EOS,)),
        (None, (EOS,)),
    ],
)
def test_eos_ids_come_from_generation_config_then_config(folder, generation_config, eos_ids):
    path = folder / "generation_config.json"
    path.unlink()
    if generation_config is not None:
        path.write_text(generation_config)
    assert LLM(folder).tokenizer.eos_ids == eos_ids


def test_eos_ids_of_generation_config_end_texts(folder):
    greedy = LLM(folder).generate("dog", SamplingParams(max_new_tokens=30, ignore_eos=True))[0].token_ids
    distinct = list(dict.fromkeys(greedy))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [distinct[3], distinct[2]]}))
    (completion,) = LLM(folder).generate("dog", SamplingParams(max_new_tokens=30))
    assert (completion.token_ids, completion.finish_reason) == (up_to_first(greedy, *distinct[2:4]), "eos")


def test_incomplete_folders_are_refused_before_weights_are_read(folder, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(checkpoint, "load", never)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config.json is not a JSON object"):
        LLM(folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(UserError, match="^Unknown dtype 'int3'"):
        LLM(folder, dtype="int3")
    for device in ("quantum", "meta", "mps"):
        with pytest.raises(UserError, match=f"'{device}'.*use auto, cpu, cuda"):
            LLM(folder, device=device)
    shutil.move(folder / "tokenizer.json", folder / "elsewhere.json")
    with pytest.raises(TokenizerError, match=r"^There is no .*tokenizer\.json; a checkpoint folder needs"):
        LLM(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"^There is no .*config\.json"):
        LLM(folder)
    with pytest.raises(CheckpointError, match="^There is no folder"):
        LLM(folder / "nowhere")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(folder, olmoe_tokenizer_file, tokenizer):
    sentence = r"^The tokenizer has \d+ ids, but the model has only \d+; they do not belong together\.$"
    shutil.copy(olmoe_tokenizer_file, folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=sentence):
        LLM(folder)
    with pytest.raises(CheckpointError, match=sentence):
        LLM.from_parts(make_model(vocab_size=VOCAB_SIZE - 1), tokenizer)


def test_the_released_vocabulary_with_its_24_padding_rows(olmoe_tokenizer_file):
    model = make_model(vocab_size=50304, num_hidden_layers=1, eos_token_id=50279)
    with torch.no_grad():
        model.lm_head.weight[50280:] *= 100.0
    llm = LLM.from_parts(model, Tokenizer.from_file(olmoe_tokenizer_file, eos_ids=model.config.eos_token_ids))
    ids = llm.tokenizer.encode_chat([{"role": "user", "content": "日本語 😀"}])
    (completion,) = llm.generate(ids, SamplingParams(max_new_tokens=40, temperature=1.5, seed=0))
    assert max(completion.token_ids) < 50280
    assert completion.prompt_tokens == len(ids)
