"""/v1/completions over a real server: shapes of whole answers and streams, scoring of prompts, every field."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest

from olmoe import SamplingParams

PATH = "/v1/completions"
PROMPT = "Once upon a time"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def ask(server, **fields):
    status, body, _ = server.call(PATH, {**GREEDY, **fields})
    assert status == 200, body
    return body


def refused(server, **fields):
    status, body, _ = server.call(PATH, {**GREEDY, **fields})
    assert status == 400, body
    return body["error"]["param"], body["error"]["message"]


def test_the_text_equals_the_librarys(server, tiny_llm):
    (expected,) = tiny_llm.generate(PROMPT, SamplingParams(max_new_tokens=12))
    body = ask(server)
    (choice,) = body["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == "length"
    assert body["object"] == "text_completion"
    assert body["model"] == "olmoe-tiny"
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == 16


def test_the_default_limit_is_sixteen_tokens(server):
    _, body, _ = server.call(PATH, {"prompt": PROMPT, "ignore_eos": True})
    assert body["usage"]["completion_tokens"] == 16


def test_every_kind_of_prompt_is_accepted(server, tiny_llm):
    ids = tiny_llm.tokenizer.encode(PROMPT)
    texts = [c["text"] for c in ask(server, prompt=[PROMPT, "The dog", PROMPT])["choices"]]
    assert texts[0] == texts[2] != texts[1]
    assert ask(server, prompt=ids)["choices"][0]["text"] == texts[0]
    assert [c["text"] for c in ask(server, prompt=[ids, ids])["choices"]] == [texts[0], texts[0]]
    assert [c["index"] for c in ask(server, prompt=[ids, ids], n=2)["choices"]] == [0, 1, 2, 3]


def test_usage_counts_each_prompt_once(server):
    usage = ask(server, prompt=[PROMPT, PROMPT], n=3, ignore_eos=True)["usage"]
    assert usage["prompt_tokens"] == 8
    assert usage["completion_tokens"] == 6 * 12


def test_stream_parts_add_up_to_the_whole_answer(server):
    whole = ask(server, logprobs=2, n=2, seed=3, temperature=1, echo=True)
    events = server.events(PATH, {**GREEDY, "logprobs": 2, "n": 2, "seed": 3, "temperature": 1, "echo": True,
                                  "stream_options": {"include_usage": True}})  # fmt: skip
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({event["id"] for event in events[:-1]}) == 1
    for index in (0, 1):
        mine = [e["choices"][0] for e in events[:-2] if e["choices"][0]["index"] == index]
        expected = whole["choices"][index]
        assert "".join(c["text"] for c in mine) == expected["text"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        for name, values in expected["logprobs"].items():
            assert [value for c in mine if c["logprobs"] for value in c["logprobs"][name]] == values


def test_usage_can_be_streamed_continuously(server):
    # Long enough that no single event covers everything, however slow the reader is.
    body = {**GREEDY, "max_tokens": 100, "ignore_eos": True}
    events = server.events(PATH, {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    counts = [event["usage"]["completion_tokens"] for event in events[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 100
    assert counts[0] < 100


@pytest.mark.parametrize("chat", [False, True])
def test_continuous_usage_counts_only_what_was_sent(server, chat):
    """Not what the engine has generated in the meantime."""
    path = "/v1/chat/completions" if chat else PATH
    body = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    body |= {"max_tokens": 40, "n": 3, "ignore_eos": True, "return_token_ids": True}
    events = server.events(path, {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    told = 0
    for event in events[:-2]:
        told += len(event["choices"][0].get("token_ids", ()))
        assert event["usage"]["completion_tokens"] == told
    assert told == events[-2]["usage"]["completion_tokens"] == 120


def test_an_echo_scores_the_prompt(server, tiny_llm):
    (expected,) = tiny_llm.generate(PROMPT, SamplingParams(max_new_tokens=1, prompt_logprobs=3, logprobs=3))
    choice = ask(server, echo=True, max_tokens=1, logprobs=3)["choices"][0]
    scored = choice["logprobs"]
    assert choice["text"] == PROMPT + expected.text
    assert "".join(scored["tokens"]) == choice["text"]
    assert scored["token_logprobs"][0] is None
    assert scored["top_logprobs"][0] is None
    ours = [each.logprob for each in [*expected.prompt_logprobs[1:], *expected.logprobs]]
    assert scored["token_logprobs"][1:] == pytest.approx(ours, abs=1e-6)
    values, tops = scored["token_logprobs"], scored["top_logprobs"]
    for token, value, top in list(zip(scored["tokens"], values, tops, strict=True))[1:]:
        assert top[token] == value
        assert 3 <= len(top) <= 4
    places = zip(scored["text_offset"], scored["tokens"], strict=True)
    assert [choice["text"].startswith(token, at) for at, token in places] == [True] * 5


def test_no_new_tokens_score_the_prompt_alone(server):
    body = ask(server, echo=True, max_tokens=0, logprobs=1)
    (choice,) = body["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 4
    assert body["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"
    assert refused(server, max_tokens=0)[0] == "max_tokens"
    events = server.events(PATH, {**GREEDY, "echo": True, "max_tokens": 0, "logprobs": 1})
    assert [e if e == "[DONE]" else e["choices"][0]["text"] for e in events] == [PROMPT, "[DONE]"]


def test_tokens_of_partial_characters_have_their_own_text(server, tiny_llm):
    ids = tiny_llm.tokenizer.encode("é☃𝄞")
    choice = ask(server, prompt=ids, echo=True, max_tokens=1, logprobs=0)["choices"][0]
    assert choice["text"].startswith("é☃𝄞")
    assert all("\ufffd" not in token for token in choice["logprobs"]["tokens"])
    assert any(token.startswith("bytes:\\x") for token in choice["logprobs"]["tokens"])
    assert choice["logprobs"]["text_offset"][: len(ids)][-1] <= 3


def test_prompt_logprobs_in_vllms_shape(server, tiny_llm):
    choice = ask(server, prompt_logprobs=2, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == tiny_llm.tokenizer.encode(PROMPT)
    assert len(choice["token_ids"]) == 12
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token_id, entry in zip(choice["prompt_token_ids"][1:], others, strict=True):
        assert {"logprob", "rank", "decoded_token"} == set(entry[str(token_id)])
        assert 2 <= len(entry) <= 3


def test_routing_is_what_the_library_reports(server, tiny_llm):
    (expected,) = tiny_llm.generate(PROMPT, SamplingParams(max_new_tokens=12, routing=True, prompt_routing=True))

    def unpack(packed):
        shape = (packed["tokens"], packed["layers"], packed["k"])
        ids = np.frombuffer(base64.b64decode(packed["experts"]), packed["dtype"]).reshape(shape)
        return ids, np.frombuffer(base64.b64decode(packed["weights"]), "<f2").reshape(shape)

    choice = ask(server, routing=True, prompt_routing=True)["choices"][0]
    for name, ours in (("routing", expected.routing), ("prompt_routing", expected.prompt_routing)):
        ids, weights = unpack(choice[name])
        assert (ids == np.stack([each.expert_ids for each in ours])).all()
        np.testing.assert_allclose(weights, np.stack([each.weights for each in ours]), atol=1e-3)
    events = server.events(PATH, {**GREEDY, "routing": True})
    parts = [unpack(e["choices"][0]["routing"])[0] for e in events[:-1] if e["choices"][0]["routing"]]
    assert (np.concatenate(parts) == unpack(choice["routing"])[0]).all()


def test_a_router_policy_changes_the_text_and_shows(server):
    plain = ask(server, routing=True)["choices"][0]
    ids = np.frombuffer(base64.b64decode(plain["routing"]["experts"]), "u1")
    favourite = int(np.bincount(ids).argmax())
    banned = ask(server, routing=True, router_policy={"ban": [{"expert": favourite}]})["choices"][0]
    assert favourite not in np.frombuffer(base64.b64decode(banned["routing"]["experts"]), "u1")
    few = ask(server, routing=True, logprobs=0, router_policy={"k": 2})["choices"][0]
    usual = ask(server, logprobs=0)["choices"][0]
    assert few["logprobs"]["token_logprobs"][0] != usual["logprobs"]["token_logprobs"][0]
    assert (np.frombuffer(base64.b64decode(few["routing"]["experts"]), "u1").reshape(12, 4, -1)[:, :, 2:] == 255).all()
    assert refused(server, router_policy={"ban": [{"expert": 64}]})[0] == "router_policy.ban[0].expert"
    assert refused(server, router_policy={"boost": [{"expert": 1, "layer": 9, "bias": 1}]})[0].endswith("layer")
    assert refused(server, router_policy={"k": 65})[0] == "router_policy"


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"stop": " there"}, lambda c: (c["text"], c["finish_reason"], c["stop_reason"]) == (",", "stop", " there")),
        ({"stop": [" there"], "include_stop_str_in_output": True}, lambda c: c["text"] == ", there"),
        ({"logit_bias": {"11": -100, "13": -100}}, lambda c: "," not in c["text"]),
        ({"seed": 5, "temperature": 1.5, "top_k": -1, "top_p": 0.9, "min_p": 0.01}, lambda c: c["text"]),
        ({"repetition_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 1}, lambda c: c["text"]),
        ({"user": "me", "cache_salt": "a", "priority": -3, "add_special_tokens": True, "n": None}, lambda c: c["text"]),
        ({"truncate_prompt_tokens": 1, "return_token_ids": True}, lambda c: len(c["prompt_token_ids"]) == 1),
        ({"model": "olmoe-tiny", "nonsense": 1, "suffix": None, "best_of": None}, lambda c: c["text"]),
    ],
)  # fmt: skip
def test_fields_take_effect(server, fields, check):
    assert check(ask(server, **fields)["choices"][0])


def test_stop_ids_and_allowed_ids(server, tiny_llm):
    comma = ask(server, return_token_ids=True, max_tokens=1)["choices"][0]["token_ids"][0]
    choice = ask(server, stop_token_ids=[comma])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"], choice["text"]) == ("stop", comma, "")
    ids = ask(server, allowed_token_ids=[5, 6, 7], return_token_ids=True, ignore_eos=True)["choices"][0]["token_ids"]
    assert set(ids) <= {5, 6, 7}
    assert len(ids) == 12


def test_special_ids_have_no_text_and_ignore_eos_continues(server, tiny_llm):
    eos = tiny_llm.tokenizer.eos_ids[0]
    fields = {"allowed_token_ids": [eos], "max_tokens": 9, "return_token_ids": True}
    choice = ask(server, **fields)["choices"][0]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("stop", 1)
    choice = ask(server, **fields, ignore_eos=True)["choices"][0]
    assert (choice["finish_reason"], choice["text"], choice["token_ids"]) == ("length", "", [eos] * 9)


def test_bad_words_are_never_generated(server):
    text = ask(server, max_tokens=30)["choices"][0]["text"]
    assert " little girl" in text
    choice = ask(server, max_tokens=30, bad_words=["little girl", ","])["choices"][0]
    assert " little girl" not in choice["text"]
    assert "," not in choice["text"]


def test_choices_of_one_seed_differ_and_repeat(server):
    fields = {"n": 4, "seed": 9, "temperature": 1.2}
    texts = [c["text"] for c in ask(server, **fields)["choices"]]
    assert len(set(texts)) == 4
    assert texts == [c["text"] for c in ask(server, **fields)["choices"]]
    assert texts[1] == ask(server, seed=10, temperature=1.2)["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": PROMPT * 300}, "prompt"),
        ({"prompt": ["a"] * 600}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"best_of": 2}, "best_of"),
        ({"allowed_token_ids": [5] * 70_000}, "allowed_token_ids"),
        ({"stop_token_ids": [5] * 70_000}, "stop_token_ids"),
        ({"router_policy": {"ban": [{"expert": 1}] * 20_000}}, "router_policy.ban"),
        ({"top_k": -2}, "top_k"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"seed": -1}, None),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"priority": 2**40}, "priority"),
        ({"stream_options": {"include_usage": "?"}}, "stream_options.include_usage"),
    ],
)  # fmt: skip
def test_mistakes_are_named(server, fields, param):
    if param is None:
        assert server.call(PATH, {**GREEDY, **fields})[0] in (200, 400)
        return
    assert refused(server, **fields)[0] == param


def test_unknown_models_are_refused(server):
    status, body, _ = server.call(PATH, {**GREEDY, "model": "gpt-9"})
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")


def test_a_limit_beyond_the_context_ends_with_length(server):
    body = ask(server, max_tokens=5000, ignore_eos=True)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 512


def test_streams_never_split_characters(server):
    events = server.events(PATH, {"prompt": "é☃", "temperature": 2, "seed": 1, "max_tokens": 300, "ignore_eos": True,
                                  "allowed_token_ids": list(range(256))})  # fmt: skip
    texts = [e["choices"][0]["text"] for e in events[:-1]]
    whole = server.call(PATH, {"prompt": "é☃", "temperature": 2, "seed": 1, "max_tokens": 300, "ignore_eos": True,
                               "allowed_token_ids": list(range(256))})[1]["choices"][0]["text"]  # fmt: skip
    assert "".join(texts) == whole


def test_logprobs_are_raw_regardless_of_sampling(server):
    cold = ask(server, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]["token_logprobs"][0]
    warm = ask(server, logprobs=1, max_tokens=1, temperature=5, top_k=1)["choices"][0]["logprobs"]["token_logprobs"][0]
    assert cold == warm
    assert -math.inf < cold < 0


def test_top_p_0_is_greedy_and_best_of_n_equals_n_is_accepted(server):
    body = {"prompt": "Once upon a time", "max_tokens": 12}
    greedy = server.call(PATH, {**body, "temperature": 0})[1]["choices"][0]["text"]
    for seed in range(3):
        answer = server.call(PATH, {**body, "top_p": 0, "seed": seed, "temperature": 1.5, "best_of": 1})
        assert answer[1]["choices"][0]["text"] == greedy
    status, answer, _ = server.call(PATH, {**body, "n": 2, "best_of": 2})
    assert (status, len(answer["choices"])) == (200, 2)


def test_many_texts_share_their_parameters(server):
    """500 texts with 2,000 biases each used to make 500 dictionaries, and blocked everyone else for seconds."""
    biases = {str(i): -1.5 for i in range(2000)}
    body = {"prompt": [[5]] * 500, "max_tokens": 1, "seed": 1, "logit_bias": biases}
    made = []
    original = server.state.engine.request
    server.state.engine.request = lambda ids, params, **rest: made.append(params) or original(ids, params, **rest)
    try:
        status, answer, _ = server.call(PATH, {**body, "n": 1})
    finally:
        del server.state.engine.request
    assert (status, len(answer["choices"])) == (200, 500)
    assert len({id(params.logit_bias) for params in made}) == 1
    status, answer, _ = server.call(PATH, {**body, "logit_bias": {str(i): -1.5 for i in range(3000)}})
    assert (status, answer["error"]["param"]) == (400, "logit_bias")
    assert "a call for 500 texts may have 2097" in answer["error"]["message"]
