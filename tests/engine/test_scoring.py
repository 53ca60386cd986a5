"""Scoring: the results of one pass over each whole text, while common prefixes are computed once."""

from __future__ import annotations

import random

import pytest
import torch

from configurations import VOCAB_SIZE
from conftest import make_model
from olmoe.config import RopeParameters
from olmoe.engine.scoring import Scorer
from olmoe.errors import UserError
from olmoe.model import causal_attend
from olmoe.ops.cpu import extension
from olmoe.runner import RouterPolicy, make_runner, position_bytes

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(extension.unavailable()), reason="no kernels")),
    "torch",
]
BACKEND = "torch" if extension.unavailable() else "cpu"


@pytest.fixture(scope="module")
def model():
    return make_model(num_key_value_heads=2, max_position_embeddings=512)


@torch.inference_mode()
def expected(model, ids: list[int], first: int) -> tuple[float, bool]:
    """Scores from one pass of the modules over the text, without cache or engine."""
    batch = torch.tensor([ids])
    hidden = model(batch, torch.arange(len(ids))[None], causal_attend).hidden
    logits = model.logits(hidden[0])[first - 1 : -1]
    wanted = batch[0, first:]
    chosen = logits.double().log_softmax(-1).gather(1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(2, VOCAB_SIZE) for _ in range(count)]


def some_texts(seed: int = 0) -> list[tuple[list[int], int]]:
    """All kinds of texts: shared contexts that end anywhere in a block, prefixes of others, duplicates, loners."""
    rng = random.Random(seed)
    shots = words(rng, 70)
    texts = []
    for length in (1, 30, 63, 64, 65, 130):
        context = shots + words(rng, length)
        for new in (1, 1, 2, 9, 70):
            texts.append((context + words(rng, new), len(context)))
        texts.append((context + texts[-1][0][len(context) :][:5], len(context)))  # the beginning of another
        texts.append((texts[-2][0], len(context) + 3))  # the same text with less of it scored
        texts.append(texts[-3])
    texts += [(words(rng, n), 1) for n in (2, 3, 64, 65, 200)]
    rng.shuffle(texts)
    return texts


def score(runner, texts, **options) -> list:
    scorer = Scorer(runner, **options)
    found = dict(scorer.score(texts))
    assert sorted(found) == list(range(len(texts)))
    return [found[number] for number in range(len(texts))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_equal_one_pass_over_each_text(model, backend):
    texts = some_texts()
    for text, scored in zip(texts, score(make_runner(model, backend), texts), strict=True):
        logprob, greedy = expected(model, *text)
        assert scored.logprob == pytest.approx(logprob, abs=1e-4)
        assert scored.greedy == greedy


def test_the_greedy_flag_is_exact(model):
    """A greedily decoded text counts as greedy, and with any scored token changed it does not."""
    runner = make_runner(model, BACKEND)
    ids = words(random.Random(1), 40)
    first = len(ids)
    with torch.inference_mode():
        for _ in range(6):
            hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal_attend).hidden
            ids = [*ids, int(model.logits(hidden[0, -1:]).argmax())]
    others = [[*ids[:at], (ids[at] + 1) % VOCAB_SIZE, *ids[at + 1 :]] for at in range(first, len(ids))]
    found = score(runner, [(ids, first), *((other, first) for other in others)])
    assert [each.greedy for each in found] == [True] + [False] * len(others)
    (same,) = score(runner, [(ids, 1)])
    assert not same.greedy


@pytest.mark.skipif(BACKEND != "cpu", reason="torch adds in another order in batches")
@pytest.mark.parametrize("budget", [1, 7, 64, 512])
def test_scores_are_bit_identical_in_any_batch_chunking_and_memory(model, budget):
    runner, texts = make_runner(model, BACKEND), some_texts()
    alone = [score(runner, [text])[0] for text in texts]
    block = 64 * runner.position_bytes
    # One block is too little for the longest text, which still gets what it needs.
    for blocks in (1, 9, 1000):
        for rows in (1, 3, 256):
            assert score(runner, texts, token_budget=budget, cache_bytes=blocks * block, max_rows=rows) == alone


def test_common_prefixes_are_computed_once(model):
    rng = random.Random(3)
    shots, runner = words(rng, 100), make_runner(model, BACKEND)
    texts = []
    for question in range(5):
        context = [*shots, 2 + question, *words(rng, 20)]
        texts += [([*context, 2 + choice, *words(rng, 9)], len(context)) for choice in range(4)]
    scorer = Scorer(runner)
    list(scorer.score(texts))
    assert scorer.given_tokens == 20 * (121 + 10 - 1)
    assert scorer.computed_tokens == 100 + 5 * 21 + 20 * 9
    # Single-token choices are read from the context's own logits.
    single = Scorer(runner)
    list(single.score([([*shots, 2 + choice], 100) for choice in range(4)]))
    assert (single.given_tokens, single.computed_tokens) == (400, 100)


def test_logits_are_computed_only_for_scored_rows(model, monkeypatch):
    runner, texts = make_runner(model, BACKEND), []
    context = words(random.Random(4), 90)
    for choice in range(3):
        texts.append((context + words(random.Random(choice), 5), 90))
    rows, forward = [], type(runner).forward

    def counted(self, batch, cache, want):
        rows.append(len(want.logits))
        return forward(self, batch, cache, want)

    monkeypatch.setattr(type(runner), "forward", counted)
    list(Scorer(runner).score(texts))
    assert sum(rows) == 1 + 3 * 4  # the context's last row serves all choices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_scores_for_any_cache_dtype(model, dtype):
    runner, texts = make_runner(model, BACKEND), some_texts(5)
    found = score(runner, texts, cache_dtype=dtype)
    assert position_bytes(runner.config, dtype) > 0
    exact = [expected(model, *text)[0] for text in texts]
    bound = {torch.float32: 1e-4, torch.float16: 0.05, torch.int8: 1.0}[dtype]
    assert [each.logprob for each in found] == pytest.approx(exact, abs=bound)
    if BACKEND == "cpu":
        assert found == [score(runner, [text], cache_dtype=dtype)[0] for text in texts]


def test_keys_that_depend_on_the_text_length_are_not_shared():
    rope = RopeParameters(rope_type="dynamic", factor=2.0)
    model = make_model(max_position_embeddings=64, rope=rope)
    texts = some_texts(6)[:20]
    scorer = Scorer(make_runner(model, BACKEND))
    found = dict(scorer.score(texts))
    for number, text in enumerate(texts):
        inputs = text[0][:-1]
        with torch.inference_mode():
            hidden = model(torch.tensor([inputs]), torch.arange(len(inputs))[None], causal_attend).hidden
            logits = model.logits(hidden[0])[text[1] - 1 :].log_softmax(-1)
        exact = float(logits.gather(1, torch.tensor(text[0][text[1] :])[:, None]).sum())
        assert found[number].logprob == pytest.approx(exact, abs=1e-3)
    assert scorer.computed_tokens == scorer.given_tokens


def test_a_policy_changes_the_routers_choices(model):
    runner, texts = make_runner(model, BACKEND), some_texts(7)[:6]
    policy = RouterPolicy(top_k=1).resolve(model.config)
    found = score(runner, texts, policy=policy)
    assert found != score(runner, texts)
    assert found == score(runner, texts, policy=policy)


def test_nonfinite_logits_are_an_error():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite.*try dtype float32"):
        list(Scorer(make_runner(model, BACKEND)).score([([5, 6, 7], 1)]))


def test_scoring_nothing_returns_nothing(model):
    assert list(Scorer(make_runner(model, BACKEND)).score([])) == []
