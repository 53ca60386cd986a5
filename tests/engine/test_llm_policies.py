"""Router policies of an `LLM`: a default for all calls, which sampling parameters can replace."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import make_model
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.runner import RouterPolicy
from olmoe.weights.checkpoint import Checkpoint
from packed_folders import WHOLE, plain_folder

PROMPT = "Once upon a time"
PLAIN = SamplingParams(max_new_tokens=12, ignore_eos=True, routing=True)
BANNED = {"ban": [{"expert": 0}, {"expert": 1}], "k": 2}


def changed(**fields):
    return SamplingParams(max_new_tokens=12, ignore_eos=True, routing=True, **fields)


@pytest.fixture(scope="module")
def llm(tokenizer):
    return LLM.from_parts(make_model(), tokenizer)


def ids(llm, params=PLAIN):
    return llm.generate(PROMPT, params)[0].token_ids


def test_a_requests_policy_replaces_the_default(llm, tokenizer):
    plain, other = ids(llm), ids(llm, changed(router_policy=BANNED))
    assert plain != other
    ours = LLM.from_parts(make_model(), tokenizer, router_policy=BANNED)
    assert ids(ours) == other
    assert [c.token_ids for c in ours.generate([PROMPT, PROMPT], [PLAIN, changed(router_policy=RouterPolicy())])] == [
        other,
        plain,
    ]
    assert ids(ours, changed(router_policy={"k": 1})) == ids(llm, changed(router_policy={"k": 1})) != other
    assert "".join(ours.stream(PROMPT, PLAIN)) == ours.generate(PROMPT, PLAIN)[0].text
    ours.router_policy = None
    assert ids(ours) == plain


def test_a_default_policy_works_with_a_prefix_cache(tokenizer):
    """Keys computed under one policy are not reused under another."""
    prompt = [7 + i % 50 for i in range(100)]
    ours = LLM.from_parts(make_model(), tokenizer, prefix_cache=True)
    fresh = LLM.from_parts(make_model(), tokenizer)
    for policy in (None, {"pin": [{"expert": 0}]}, {"pin": [{"expert": 1}]}, {"temperature": 0.25}, None):
        ours.router_policy = fresh.router_policy = policy
        assert ours.generate(prompt, PLAIN)[0].token_ids == fresh.generate(prompt, PLAIN)[0].token_ids


def test_policies_come_from_files_mappings_and_arrays(llm, tmp_path):
    (tmp_path / "p.json").write_text('{"pin": [{"expert": 3}]}', encoding="utf-8")
    pinned = np.zeros((llm.config.num_hidden_layers, llm.config.num_experts), dtype=bool)
    pinned[:, 3] = True
    given = [tmp_path / "p.json", str(tmp_path / "p.json"), {"pin": [{"expert": 3}]}, RouterPolicy(pinned=pinned)]
    answers = [llm.generate(PROMPT, changed(router_policy=each))[0] for each in given]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert all((token.expert_ids == 3).any(axis=1).all() for token in answers[0].routing)


def test_an_empty_policy_costs_nothing(llm):
    """Its requests count as having no policy and share prefixes with those that have none."""
    (request,) = llm._requests([PROMPT], changed(router_policy={}))
    assert request.policy is None


def test_invalid_policies_are_refused(llm, tokenizer, tmp_path):
    for wrong in (3, ["x"]):
        with pytest.raises(UserError, match="router_policy must be a RouterPolicy, a file or a mapping, not"):
            SamplingParams(router_policy=wrong)
        with pytest.raises(UserError, match="router_policy must be a RouterPolicy, a file or a mapping, not"):
            LLM.from_parts(make_model(), tokenizer, router_policy=wrong)
    with pytest.raises(UserError, match="the expert 99, but the model's are 0 to 7"):
        llm.router_policy = {"ban": [{"expert": 99}]}
    assert llm.router_policy is None
    with pytest.raises(UserError, match="none.json cannot be read"):
        llm.generate(PROMPT, changed(router_policy=tmp_path / "none.json"))


def test_an_invalid_policy_is_refused_before_loading_weights(monkeypatch, tmp_path, tokenizer_file):
    folder = plain_folder(tmp_path / "model", tokenizer_file, **WHOLE)
    monkeypatch.setattr(Checkpoint, "load", None)
    with pytest.raises(UserError, match="the expert 99"):
        LLM(folder, router_policy={"ban": [{"expert": 99}]})
