"""The objective against formulas written with plain loops, and against transformers' own auxiliary loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conftest import make_model
from olmoe.model import CausalLM, RouterOutput, causal_attend, set_backend
from olmoe.train.config import LossConfig
from olmoe.train.losses import load_balancing, objective, router_z

NO_AUXILIARY = LossConfig(load_balancing=0.0, router_z=0.0)


def routers(layers: int = 3, tokens: int = 7, experts: int = 5, k: int = 2, seed: int = 0) -> list[RouterOutput]:
    """Decisions of random routers; the logits are leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for _ in range(layers):
        logits = torch.randn(tokens, experts, generator=generator).mul(2).requires_grad_()
        outputs.append(RouterOutput(logits, *logits.detach().softmax(-1).topk(k)))
    return outputs


def probabilities(row: Tensor) -> list[float]:
    exponentials = [math.exp(x) for x in row.tolist()]
    return [x / sum(exponentials) for x in exponentials]


def shares(router: RouterOutput) -> list[float]:
    """n_e / (N K), counted one by one."""
    chosen = [e for row in router.expert_ids.tolist() for e in row]
    return [chosen.count(e) / len(chosen) for e in range(router.logits.shape[1])]


@torch.no_grad()
def load_balancing_by_hand(outputs: list[RouterOutput]) -> float:
    total = 0.0
    for router in outputs:
        rows = [probabilities(row) for row in router.logits]
        for e, share in enumerate(shares(router)):
            total += router.logits.shape[1] * share * sum(row[e] for row in rows) / len(rows)
    return total / len(outputs)


@torch.no_grad()
def router_z_by_hand(outputs: list[RouterOutput]) -> float:
    total = 0.0
    for router in outputs:
        n, k = router.expert_ids.shape
        for row in router.logits.tolist():
            total += math.log(sum(math.exp(x) for x in row)) ** 2 / (len(outputs) * n * k)
    return total


@torch.no_grad()
def cross_entropy_by_hand(model: CausalLM, windows: Tensor) -> float:
    """The summed nats of every prediction inside each window."""
    total = 0.0
    for row in windows:
        positions = torch.arange(len(row)).unsqueeze(0)
        logits = model.logits(model(row.unsqueeze(0), positions, causal_attend).hidden)[0].double()
        for t in range(len(row) - 1):
            total -= float(logits[t].log_softmax(-1)[row[t + 1]])
    return total


def windows(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(320, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: CausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("experts", "k"), [(5, 2), (4, 1), (3, 3)])
def test_auxiliary_losses_match_the_formulas_of_olmoes_training_code(experts, k):
    outputs = routers(experts=experts, k=k)
    assert load_balancing(outputs).item() == pytest.approx(load_balancing_by_hand(outputs), rel=1e-5)
    assert router_z(outputs).item() == pytest.approx(router_z_by_hand(outputs), rel=1e-5)


def test_router_z_survives_logits_whose_exponential_overflows():
    logits = torch.full((2, 4), 200.0)
    output = RouterOutput(logits, *logits.softmax(-1).topk(2))
    assert float(router_z([output])) == pytest.approx((200 + math.log(4)) ** 2 / 2, rel=1e-5)


def test_load_balancing_is_one_when_the_load_is_uniform_and_the_number_of_experts_over_k_when_it_collapses():
    even = torch.arange(8).view(4, 2)  # 4 tokens, 8 experts, each chosen once
    flat = RouterOutput(torch.zeros(4, 8), torch.full((4, 2), 1 / 8), even)
    assert float(load_balancing([flat])) == pytest.approx(1.0)
    certain = torch.full((4, 8), -100.0)
    certain[:, :2] = 100.0
    collapsed = RouterOutput(certain, torch.full((4, 2), 0.5), torch.tensor([[0, 1]] * 4))
    assert float(load_balancing([collapsed])) == pytest.approx(8 / 2)


def test_every_layer_is_balanced_separately():
    # Layer 1 uses experts 0 and 1, layer 2 the others: balanced together, but not separately.
    halves = []
    for first in (0, 2):
        logits = torch.full((4, 4), -100.0)
        logits[:, first : first + 2] = 100.0
        halves.append(RouterOutput(logits, torch.full((4, 2), 0.5), torch.tensor([[first, first + 1]] * 4)))
    assert float(load_balancing(halves)) == pytest.approx(2.0)


def test_transformers_loss_of_one_layer_is_k_times_ours():
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    (output,) = routers(layers=1, tokens=50, experts=8, k=3)
    theirs = load_balancing_loss_func((output.logits,), num_experts=8, top_k=3)
    assert theirs.item() == pytest.approx(3 * load_balancing([output]).item(), rel=1e-5)


def test_counts_carry_no_gradient():
    """With the shares held constant, dLB/dlogit_tj = E / (L N) * p_tj * (share_j - sum_e share_e p_te)."""
    outputs = routers()
    load_balancing(outputs).backward()
    for router in outputs:
        n, experts = router.logits.shape
        share = shares(router)
        for t, row in enumerate(router.logits.detach()):
            p = probabilities(row)
            mean = sum(s * q for s, q in zip(share, p, strict=True))
            for j in range(experts):
                expected = experts / (len(outputs) * n) * p[j] * (share[j] - mean)
                assert float(router.logits.grad[t, j]) == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_is_averaged_over_all_positions_of_the_step():
    model, ids = make_model(), windows(batch=3, length=6)
    losses = objective(model, ids, NO_AUXILIARY, positions_in_step=3 * 6, microbatches=1)
    assert float(losses.cross_entropy) == pytest.approx(cross_entropy_by_hand(model, ids) / 18, rel=1e-5)
    assert losses.objective.item() == float(losses.cross_entropy)
    # The same windows as half a step: the denominator is the step's, not the microbatch's.
    half = objective(model, ids, NO_AUXILIARY, positions_in_step=36, microbatches=2)
    assert float(half.cross_entropy) == pytest.approx(float(losses.cross_entropy) / 2, rel=1e-6)


def test_terms_are_weighted_and_auxiliary_losses_averaged_over_microbatches():
    model, ids = make_model(), windows()
    config = LossConfig(load_balancing=0.3, router_z=0.07)
    losses = objective(model, ids, config, positions_in_step=24, microbatches=2)
    outputs = model(ids, torch.arange(6).expand(2, 6), causal_attend).routers
    assert float(losses.load_balancing) == pytest.approx(load_balancing_by_hand(outputs), rel=1e-5)
    assert float(losses.router_z) == pytest.approx(router_z_by_hand(outputs), rel=1e-5)
    expected = float(losses.cross_entropy) + (0.3 * float(losses.load_balancing) + 0.07 * float(losses.router_z)) / 2
    assert losses.objective.item() == pytest.approx(expected, rel=1e-6)
    parts = (losses.cross_entropy, losses.load_balancing, losses.router_z, losses.counts_LE)
    assert losses.objective.requires_grad
    assert not any(part.requires_grad for part in parts)
    for counts, router in zip(losses.counts_LE.tolist(), outputs, strict=True):
        assert counts == [round(share * 2 * 6 * 3) for share in shares(router)]


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    model, ids = make_model(), windows(batch=4)
    objective(model, ids, NO_AUXILIARY, positions_in_step=24, microbatches=1).objective.backward()
    whole = gradients(model)
    for part in ids.chunk(2):
        objective(model, part, NO_AUXILIARY, positions_in_step=24, microbatches=2).objective.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulated_balance_is_the_mean_over_microbatches_not_that_of_the_pooled_tokens():
    model, ids = make_model(), windows(batch=4)
    config = LossConfig(load_balancing=1.0, router_z=0.5)
    halves = [objective(model, part, config, positions_in_step=24, microbatches=2) for part in ids.chunk(2)]
    for half in halves:
        half.objective.backward()
    accumulated = gradients(model)
    objective(model, ids, NO_AUXILIARY, positions_in_step=24, microbatches=1).objective.backward()
    for part in ids.chunk(2):
        outputs = model(part, torch.arange(6).expand(2, 6), causal_attend).routers
        (0.5 * load_balancing(outputs) + 0.5 * 0.5 * router_z(outputs)).backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    pooled = objective(model, ids, config, positions_in_step=24, microbatches=1).load_balancing
    assert float(pooled) != pytest.approx(float(halves[0].load_balancing + halves[1].load_balancing) / 2, rel=1e-3)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_objective_stays_fp32_under_autocast(dtype, backend):
    """Routers, their losses and the cross-entropy stay fp32; gradients differ only by the rounding of products."""
    model, ids, config = make_model(), windows(), LossConfig(load_balancing=0.1, router_z=0.1)
    set_backend(model, backend)
    exact = objective(model, ids, config, positions_in_step=12, microbatches=1)
    exact.objective.backward()
    expected = torch.cat([g.flatten() for g in gradients(model).values()])
    with torch.autocast("cpu", dtype):
        losses = objective(model, ids, config, positions_in_step=12, microbatches=1)
        routers = model(ids, torch.arange(6).expand(2, 6), causal_attend).routers
    losses.objective.backward()
    found = torch.cat([g.flatten() for g in gradients(model).values()])
    assert {t.dtype for t in (*losses[:4], *routers[0][:2])} == {torch.float32}
    assert float(losses.objective.detach()) == pytest.approx(float(exact.objective.detach()), rel=2e-3)
    assert float((found - expected).norm() / expected.norm()) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_losses_of_routers_that_score_in_half_precision_are_fp32():
    outputs = [RouterOutput(r.logits.detach().bfloat16(), r.weights, r.expert_ids) for r in routers()]
    wide = [r._replace(logits=r.logits.float()) for r in outputs]
    for loss in (load_balancing, router_z):
        for mask in (None, torch.arange(7) < 5):
            assert loss(outputs, mask).dtype == torch.float32
            assert float(loss(outputs, mask)) == float(loss(wide, mask))


def test_masked_tokens_count_for_nothing():
    outputs, mask = routers(), torch.arange(7) % 3 > 0
    kept = [RouterOutput(*(t[mask] for t in router)) for router in outputs]
    with torch.no_grad():
        assert float(load_balancing(outputs, mask)) == pytest.approx(float(load_balancing(kept)), rel=1e-6)
        assert float(router_z(outputs, mask)) == pytest.approx(float(router_z(kept)), rel=1e-6)


def test_hessian_vector_products_match_the_reference():
    """Of all terms: the fast backend against the reference, which torch differentiates by itself."""
    ids, config = windows(), LossConfig(load_balancing=0.1, router_z=0.1)
    found = {}
    for backend in ("auto", "reference"):
        model = make_model()
        set_backend(model, backend)
        parameters = list(model.parameters())
        loss = objective(model, ids, config, positions_in_step=12, microbatches=1).objective
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(first)]
        product = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        found[backend] = torch.cat([g.flatten() for g in torch.autograd.grad(product, parameters)])
    error = (found["auto"] - found["reference"]).norm() / found["reference"].norm()
    assert float(error) < 1e-4


def test_per_window_gradients_can_be_computed():
    model, ids, config = make_model(), windows(batch=3), LossConfig(load_balancing=0.1, router_z=0.1)
    wrapped = torch.nn.ModuleDict({"model": model})
    wrapped.forward = lambda w: objective(model, w, config, positions_in_step=6, microbatches=1).objective
    parameters = {name: p.detach() for name, p in wrapped.named_parameters()}
    gradient = torch.func.grad(lambda p, w: torch.func.functional_call(wrapped, p, (w,)))
    mapped = torch.vmap(gradient, in_dims=(None, 0))(parameters, ids.unsqueeze(1))
    for row in range(3):
        alone = gradient(parameters, ids[row : row + 1])
        for name, value in alone.items():
            torch.testing.assert_close(mapped[name][row], value, rtol=1e-4, atol=1e-6)
