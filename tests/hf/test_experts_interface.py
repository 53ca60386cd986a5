"""Our experts inside transformers' own models, against transformers' "eager" experts: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import olmoe.hf
from configurations import VOCAB_SIZE
from olmoe.errors import BackendUnavailableError
from olmoe.hf.experts_interface import LAYOUT, check_layout, experts_forward, plain_activation
from olmoe.ops import cpu, dispatch
from sentences import refused

COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 1,
}  # fmt: skip
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "intermediate_size": 20}
MODELS = {
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, num_experts_per_tok=3),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, intermediate_size=16, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**COMMON, **QWEN, shared_expert_intermediate_size=10),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**COMMON, **QWEN, head_dim=8),
}
# Widths: 12 and 16 use the grouped product in fp32, 5 (below) the loop; these are our two paths.


@pytest.fixture(autouse=True)
def registered():
    olmoe.hf.register()
    yield
    olmoe.hf.unregister()


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-12))


def outcome(model, implementation, ids):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def kernel_calls(monkeypatch):
    """Names of the expert operations that the C++ kernels run from here on."""
    if not cpu.available():
        pytest.skip(f"{cpu.unavailable()}")
    calls = []
    for name in ("moe", "experts"):
        known = dispatch._REGISTRY[name]["cpu"]

        def noted(*arguments, name=name, function=known.function):
            calls.append(name)
            return function(*arguments)

        monkeypatch.setitem(dispatch._REGISTRY[name], "cpu", replace(known, function=noted))
    return calls


def stock(name, dtype=torch.float32):
    """A random model of transformers' own class for that family."""
    torch.manual_seed(0)
    config = MODELS[name]()
    kind = transformers.OlmoeForCausalLM if name == "olmoe" else None  # registered: the Auto class would give ours
    model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_equal_eager_in_forward_and_backward(name):
    model = stock(name)
    ids = torch.randint(2, VOCAB_SIZE, (2, 17))
    expected, gradients = outcome(model, "eager", ids)
    calls = []
    module = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "act_fn"))
    module.act_fn.register_forward_hook(lambda *_: calls.append(1))
    logits, ours = outcome(model, "olmoe", ids)
    # One activation for all rows in forward and one in backward (of the first layer), not one per expert.
    assert len(calls) == 2
    assert relative(logits, expected) < 1e-5
    assert ours.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        assert relative(ours[parameter], gradient) < 2e-5, parameter


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_inference_uses_the_kernels_in_every_layer(name, dtype, mode, kernel_calls):
    """Parameters require gradients, as in any loaded model, but gradients are disabled here."""
    model, ids = stock(name, dtype), torch.randint(2, VOCAB_SIZE, (1, 4))
    model.set_experts_implementation("eager")
    with mode():
        expected = model(ids).logits.float()
        model.set_experts_implementation("olmoe")
        assert relative(model(ids).logits.float(), expected) < (1e-5 if dtype == torch.float32 else 4e-2)
    assert kernel_calls == ["moe"] * 2


def test_training_does_not_use_the_kernels(kernel_calls):
    model, ids = stock("mixtral"), torch.randint(2, VOCAB_SIZE, (1, 4))
    model.set_experts_implementation("olmoe")
    model(ids, labels=ids).loss.backward()
    assert not kernel_calls
    assert model.model.layers[0].mlp.experts.down_proj.grad.any()


def test_a_compiled_graph_uses_the_kernels_and_trains(kernel_calls):
    module, x, ids = experts(), torch.randn(3, 16), torch.tensor([[0, 1], [2, 0], [1, 3]])
    weights = torch.rand(3, 2)
    expected = module(x, ids, weights)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.config._experts_implementation = "olmoe"
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mode in (torch.no_grad, torch.inference_mode):
        kernel_calls.clear()
        with mode():
            assert relative(compiled(x, ids, weights), expected) < 1e-5
        assert kernel_calls == ["moe"]
    module.zero_grad()
    compiled(x, ids, weights).square().sum().backward()
    assert len(kernel_calls) == 1
    for p, gradient in zip(module.parameters(), gradients, strict=True):
        assert relative(p.grad, gradient) < 2e-5


def test_only_a_plain_silu_counts_as_silu(kernel_calls):
    class Scaled(torch.nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, scaled, hooked, replaced = torch.nn.SiLU(), Scaled(), torch.nn.SiLU(), torch.nn.SiLU()
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    replaced.forward = torch.relu
    assert plain_activation(plain) is torch.nn.functional.silu
    module, x, ids = experts(), torch.randn(2, 16), torch.tensor([[0, 1], [2, 0]])
    for other in (scaled, hooked, replaced, torch.nn.GELU()):
        assert plain_activation(other) is other
        module.act_fn = other
        with torch.no_grad():
            expected = module(x, ids, torch.ones(2, 2))
            seen.clear()
            assert relative(experts_forward(module, x, ids, torch.ones(2, 2)), expected) < 1e-5
        assert bool(seen) == (other is hooked)
    assert not kernel_calls


def test_hidden_states_of_another_dtype_than_the_weights():
    """As transformers' own implementations accept them: autocast widens hidden states but not weights."""
    module, ids = experts(dtype=torch.bfloat16), torch.randint(0, 4, (40, 1))
    x, weights = torch.randn(40, 16).bfloat16().float(), torch.rand(40, 1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = experts_forward(module, x, ids, weights)
            assert out.dtype == torch.float32
            assert relative(out, experts_forward(module, x.bfloat16(), ids, weights).float()) < 2e-2


def test_the_implementation_can_be_chosen_on_loading(tmp_path):
    transformers.MixtralForCausalLM(MODELS["mixtral"]()).save_pretrained(tmp_path)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="olmoe")
    assert model.config._experts_implementation == "olmoe"
    ids = torch.randint(2, VOCAB_SIZE, (1, 5))
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.set_experts_implementation("eager")
    assert torch.equal(generated, model.generate(ids, max_new_tokens=4, do_sample=False))


def experts(count=4, width=16, dtype=torch.float32):
    torch.manual_seed(1)
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=width, num_local_experts=count)
    config._experts_implementation = "eager"
    module = MixtralExperts(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize(
    ("tokens", "k", "width", "reason"),
    [
        (9, 2, 16, "aligned rows"),
        (9, 2, 5, "rows that grouped kernels cannot align"),
        (1, 1, 16, "decode of one token"),
        (5, 4, 16, "every expert for every token"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_equal_eager(tokens, k, width, reason, dtype):
    module = experts(width=width, dtype=dtype)
    x = torch.randn(tokens, 16, dtype=dtype)
    weights, ids = torch.rand(tokens, 4).topk(k)
    with torch.no_grad():
        expected = module(x, ids, weights.to(dtype))
        # bf16: eager rounds after each product and each addition, ours at the end
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert relative(experts_forward(module, x, ids, weights.to(dtype)).float(), expected.float()) < tolerance


@pytest.mark.parametrize(
    ("absent", "reason"),
    [(3, "some rows are held elsewhere"), (12, "none is held here"), (0, "all are held here")],
)
def test_expert_parallel_sentinels_contribute_nothing(absent, reason):
    """A module that holds 4 experts and gets ids of 4 or above for those of other processes."""
    module = experts()
    module._is_expert_parallel = True
    ids = torch.randint(0, 4, (6, 2))
    ids.view(-1)[torch.randperm(12)[:absent]] = 4
    results = []
    for function in (type(module).forward, experts_forward):
        module.zero_grad()
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(6, 16, generator=generator, requires_grad=True)
        weights = torch.rand(6, 2, generator=generator, requires_grad=True)
        out = function(module, x, ids, weights)
        if out.requires_grad:
            out.square().sum().backward()
        zero = torch.zeros(())
        results.append(
            [out, *(zero.expand_as(t) if t.grad is None else t.grad for t in (x, weights, *module.parameters()))]
        )
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5), reason


@pytest.mark.parametrize("absent", [3, 12, 0])
def test_expert_parallel_inference_uses_the_kernels(absent, kernel_calls):
    module = experts()
    module._is_expert_parallel = True
    ids = torch.randint(0, 4, (6, 2))
    ids.view(-1)[torch.randperm(12)[:absent]] = 4
    x, weights = torch.randn(6, 16), torch.rand(6, 2)
    with torch.no_grad():
        assert torch.allclose(experts_forward(module, x, ids, weights), module(x, ids, weights), rtol=1e-5, atol=1e-6)
    assert kernel_calls == ["experts"] * (absent < 12)


@pytest.mark.parametrize("flag", LAYOUT)
def test_other_weight_layouts_are_refused(flag):
    @use_experts_implementation(**({} if flag == "has_gate" else {flag: not LAYOUT[flag][0]}))
    class OddExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate_up_proj = self.down_proj = torch.nn.Parameter(torch.zeros(2, 2, 2))
            self.act_fn = torch.nn.SiLU()

    module = OddExperts(SimpleNamespace(_experts_implementation="olmoe"))
    if flag == "has_gate":
        check_layout(module)
        module.has_gate = False
    ids = torch.zeros(1, 1, dtype=torch.long)
    message = refused(
        lambda: experts_forward(module, torch.zeros(1, 2), ids, torch.ones(1, 1)), BackendUnavailableError
    )
    assert "OddExperts" in message
    assert LAYOUT[flag][1] in message


def test_experts_with_custom_gating_or_unstacked_weights_are_refused():
    class Clamped(MixtralExperts):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[1]

    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    assert "Clamped" in refused(lambda: check_layout(Clamped(config)), BackendUnavailableError)
    assert "ModuleList" in refused(lambda: check_layout(torch.nn.ModuleList()), BackendUnavailableError)
