"""The report's numbers against their definitions, computed in one piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import make_model
from olmoe.analysis import quality
from olmoe.errors import UserError
from olmoe.model import causal_attend
from olmoe.runner import TorchRunner, make_runner

IDS = torch.randint(0, 320, (150,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def models():
    reference, candidate = make_model(), make_model()
    with torch.no_grad():
        for parameter in candidate.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return reference, candidate


@pytest.mark.parametrize("length", [32, 149, 1000, 1])
def test_numbers_are_those_of_their_definitions(models, length, monkeypatch):
    monkeypatch.setattr(quality, "BATCH_TOKENS", 64)
    monkeypatch.setattr(quality, "LOGIT_TOKENS", 48)
    report = quality.compare(*models, IDS, length)
    log_ps, kept = [], []
    with torch.inference_mode():
        for start in range(0, 149, length):
            ids = torch.tensor([IDS[start : start + length + 1]])
            positions = torch.arange(ids.shape[1] - 1).unsqueeze(0)
            outputs = [model(ids[:, :-1], positions, causal_attend) for model in models]
            log_ps.append([m.logits(o.hidden)[0].log_softmax(-1) for m, o in zip(models, outputs, strict=True)])
            kept.append(
                torch.tensor(
                    [
                        [
                            len(set(p.tolist()) & set(q.tolist())) / 3
                            for p, q in zip(a.expert_ids, b.expert_ids, strict=True)
                        ]
                        for a, b in zip(outputs[0].routers, outputs[1].routers, strict=True)
                    ]
                )
            )
    log_p, log_q = (torch.cat(parts) for parts in zip(*log_ps, strict=True))
    labels = torch.tensor(IDS[1:]).unsqueeze(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert report.tokens == 149
    assert report.reference_perplexity == pytest.approx(float((-log_p.gather(1, labels)).mean().exp()), rel=1e-4)
    assert report.perplexity == pytest.approx(float((-log_q.gather(1, labels)).mean().exp()), rel=1e-4)
    assert report.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert report.kl_p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-3)
    assert report.same_top_token == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
    assert report.routing_agreement == pytest.approx(torch.cat(kept, 1).mean(1).tolist())
    assert 0.3 < report.routing_mean < 1


def test_a_model_beside_itself(models):
    report = quality.compare(models[0], models[0], IDS, 64)
    assert report.kl_mean == report.kl_p99 == 0
    assert report.perplexity == report.reference_perplexity
    assert report.same_top_token == report.routing_mean == 1


def test_table_and_json(models):
    seen = []
    report = quality.compare(*models, IDS, 64, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (149, 149)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["routing_mean"] == report.routing_mean
    assert values["tokens"] == 149
    for text in (f"{report.kl_mean:.5f} nats", f"{report.perplexity:.4f}", "by layer: "):
        assert text in report.table()


def test_too_little_text(models):
    with pytest.raises(UserError, match="fewer than two tokens"):
        quality.compare(*models, [5], 64)


@pytest.mark.parametrize("length", [32, 149, 1000, 1])
def test_of_caches_numbers_are_those_of_their_definitions(models, length, monkeypatch):
    """A cache that rounds beside one that does not, against the network with the same rounding written out."""
    monkeypatch.setattr(quality, "LOGIT_TOKENS", 48)

    def rounded(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale

    model = models[0]
    report = quality.compare_caches(TorchRunner(model, "reference"), IDS, length, torch.float32, torch.int8)
    log_ps = []
    with torch.inference_mode():
        for start in range(0, 149, length):
            ids = torch.tensor([IDS[start : start + length + 1]])
            positions = torch.arange(ids.shape[1] - 1).unsqueeze(0)
            outputs = [
                model(ids[:, :-1], positions, attend)
                for attend in (causal_attend, lambda q, k, v, layer: causal_attend(q, rounded(k), rounded(v), layer))
            ]
            log_ps.append([model.logits(o.hidden)[0].log_softmax(-1) for o in outputs])
    log_p, log_q = (torch.cat(parts) for parts in zip(*log_ps, strict=True))
    labels = torch.tensor(IDS[1:]).unsqueeze(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert report.tokens == 149
    assert report.reference_perplexity == pytest.approx(float((-log_p.gather(1, labels)).mean().exp()), rel=1e-4)
    assert report.perplexity == pytest.approx(float((-log_q.gather(1, labels)).mean().exp()), rel=1e-4)
    assert report.kl_mean == pytest.approx(float(kl.mean()), rel=0.02)
    assert report.kl_mean > 0
    assert 0.9 < report.routing_mean <= 1


def test_a_cache_beside_itself(models):
    seen = []
    report = quality.compare_caches(
        make_runner(models[0]), IDS, 64, torch.int8, torch.int8, lambda done, total: seen.append((done, total))
    )
    assert report.kl_mean == report.kl_p99 == 0
    assert report.perplexity == report.reference_perplexity
    assert report.same_top_token == report.routing_mean == 1
    assert seen == [(64, 149), (128, 149), (149, 149)]
    with pytest.raises(UserError, match="fewer than two tokens"):
        quality.compare_caches(make_runner(models[0]), [1], 64)


def test_an_int8_cache_costs_olmoe_tiny_next_to_nothing():
    """The figures of docs/journal/2026-11-25-int8-cache.md; int4 weights cost a KL of 0.008."""
    import olmoe

    tiny = Path(olmoe.__file__).parent / "assets" / "olmoe-tiny"
    report = quality.measure_cache(tiny, "int8", tokens=4096)
    assert report.tokens == 4095
    assert 1e-5 < report.kl_mean < 6e-4
    assert abs(report.perplexity / report.reference_perplexity - 1) < 2e-3
    assert report.routing_mean > 0.99
    with pytest.raises(UserError, match="cannot be of int4"):
        quality.measure_cache(tiny, "int4")
