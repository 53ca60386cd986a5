"""From measurements to a policy: which experts are a domain's, and what becomes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import make_model
from olmoe.analysis.analyze import analyze
from olmoe.analysis.domain_policy import domain_policy
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.errors import UserError
from olmoe.runner.policy_file import NamedPolicy
from olmoe.tokenizer import Tokenizer
from packed_folders import WHOLE, plain_folder

# Two layers of six experts, of which a token chooses two. An even share is 1/3.
SHARES = {
    "code": [[0.9, 0.5, 0.4, 0.1, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4, 1.0]],
    "law": [[0.9, 0.1, 0.1, 0.4, 0.5, 0.0], [0.3, 0.3, 0.3, 0.3, 0.4, 0.4]],
}


def metrics(**changes):
    domains = {
        name: {"layers": {str(layer): {"top_k": row} for layer, row in enumerate(rows)}}
        for name, rows in SHARES.items()
    }
    every = {str(layer): {"top_k": np.mean([r[layer] for r in SHARES.values()], axis=0).tolist()} for layer in (0, 1)}
    found = {
        "schema": "olmoe-metrics-1",
        "layers_count": 2,
        "experts": 6,
        "top_k": 2,
        "domains": domains,
        "layers": every,
    }
    return found | changes


def places(layer, *experts):
    return tuple((layer, expert) for expert in experts)


def test_only_the_experts_with_more_than_an_even_share():
    assert domain_policy(metrics(), "code") == NamedPolicy(allow=places(0, 0, 1, 2) + places(1, 4, 5))
    assert domain_policy(metrics(), "code", experts=4) == NamedPolicy(
        allow=places(0, 0, 1, 2, 3) + places(1, 2, 3, 4, 5)
    )


def test_boosts_and_pins():
    chosen = places(0, 0, 1, 2) + places(1, 4, 5)
    assert domain_policy(metrics(), "code", how="boost").boost == tuple((*place, 2.0) for place in chosen)
    assert domain_policy(metrics(), "code", how="boost", strength=5, experts=1).boost == ((0, 0, 5.0), (1, 5, 5.0))
    assert domain_policy(metrics(), "code", how="pin") == NamedPolicy(pin=places(0, 0) + places(1, 5))
    assert domain_policy(metrics(), "law", how="pin", experts=2) == NamedPolicy(pin=places(0, 0, 4) + places(1, 4, 5))


def test_by_contrast_an_expert_that_everything_chooses_is_nobodys():
    assert domain_policy(metrics(), "code", how="pin", by="contrast") == NamedPolicy(pin=places(0, 1) + places(1, 5))


def test_at_least_as_many_as_a_token_chooses():
    """Where one expert has all that is above an even share."""
    shares = {"top_k": [1.0, 0.2, 0.2, 0.2, 0.2, 0.2]}
    found = metrics(domains={"code": {"layers": {"0": shares, "1": shares}}})
    assert domain_policy(found, "code") == NamedPolicy(allow=places(0, 0, 1) + places(1, 0, 1))


@pytest.mark.parametrize(
    ("found", "options", "sentence"),
    [
        (metrics(), {"domain": "books"}, "There is no domain 'books'; the measurements have code, law"),
        (metrics(), {"experts": 1}, "there can be 2 to 6 experts of a domain in a layer, not 1; each token chooses 2"),
        (metrics(), {"experts": 3, "how": "pin"}, "there can be 1 to 2 experts"),
        (metrics(), {"experts": 7, "how": "boost"}, "there can be 1 to 6 experts"),
        (metrics(), {"experts": True}, "not True"),
        (metrics(), {"how": "ban"}, "cannot be forced by 'ban'; choose one of only, boost, pin"),
        (metrics(), {"by": "name"}, "cannot be forced by 'name'; choose one of share, contrast"),
        (metrics(), {"how": "boost", "strength": 0}, "must be above 0 and at most 10000, not 0"),
        (metrics(schema="x"), {}, "the schema 'x', not olmoe-metrics-1; make them with olmoe analyze"),
        ({"schema": "olmoe-metrics-1"}, {}, "incomplete .'layers_count'.; make them with olmoe analyze"),
        (metrics(experts=7), {}, "a layer lacks its 7 shares"),
        (metrics(layers={}), {}, "incomplete .'0'."),
    ],
)
def test_mistakes(found, options, sentence):
    with pytest.raises(UserError, match=sentence):
        domain_policy(found, **({"domain": "code"} | options))


def test_from_an_analysis_to_texts(tmp_path, tokenizer_file):
    """What a model measured about itself is a policy that it can follow."""
    folder = plain_folder(tmp_path / "model", tokenizer_file, **WHOLE)
    (tmp_path / "dogs.txt").write_text("The dog ran to the ball. " * 20, encoding="utf-8")
    (tmp_path / "codes.txt").write_text("x = 1; y = 2; " * 30, encoding="utf-8")
    texts = {"dogs": str(tmp_path / "dogs.txt"), "codes": str(tmp_path / "codes.txt")}
    analyze(str(folder), texts, tmp_path / "out", window=16, report=False)
    config = make_model(**WHOLE).config
    policies = [
        domain_policy(source, "dogs", experts=4)
        for source in (tmp_path / "out", tmp_path / "out" / "metrics.json", str(tmp_path / "out"))
    ]
    assert policies[0] == policies[1] == policies[2]
    llm = LLM.from_parts(make_model(**WHOLE), Tokenizer.from_file(tokenizer_file))
    (answer,) = llm.generate(
        "x = 1;", SamplingParams(max_new_tokens=8, routing=True, ignore_eos=True, router_policy=policies[0])
    )
    shares = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["domains"]["dogs"]["layers"]
    for layer in range(config.num_hidden_layers):
        best = set(np.argsort(-np.array(shares[str(layer)]["top_k"]), kind="stable")[:4].tolist())
        assert {e for token in answer.routing for e in token.expert_ids[layer].tolist()} <= best
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file"):
        domain_policy(tmp_path / "none.json", "dogs")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="are not a JSON object"):
        domain_policy(tmp_path / "list.json", "dogs")
