"""`config.json` in every spelling, exact parameter counts, and what is refused instead of guessed."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import OlmoeConfig

from configurations import CASES, small_config
from olmoe.config import ModelConfig, RopeParameters
from olmoe.model import CausalLM
from sentences import refused

# allenai/OLMoE-1B-7B-0924, as on the hub.
RELEASED = json.loads("""
{"architectures":["OlmoeForCausalLM"],"attention_bias":false,"attention_dropout":0.0,"clip_qkv":null,
"eos_token_id":50279,"hidden_act":"silu","hidden_size":2048,"initializer_range":0.02,"intermediate_size":1024,
"max_position_embeddings":4096,"model_type":"olmoe","norm_topk_prob":false,"num_attention_heads":16,
"num_experts":64,"num_experts_per_tok":8,"num_hidden_layers":16,"num_key_value_heads":16,
"output_router_logits":false,"pad_token_id":1,"rms_norm_eps":1e-05,"rope_scaling":null,"rope_theta":10000.0,
"router_aux_loss_coef":0.01,"tie_word_embeddings":false,"torch_dtype":"bfloat16","use_cache":true,"vocab_size":50304}
""")


def changed(**changes: Any) -> dict[str, Any]:
    return RELEASED | changes


# ---- reading ----


def test_the_released_configuration_is_the_default_and_counts_exactly():
    config = ModelConfig.from_dict(RELEASED)
    assert config == ModelConfig()
    assert config.num_parameters == 6_919_161_856
    assert config.num_active_parameters == 1_282_017_280
    assert config.parameter_counts() == {
        "embeddings": 2 * 103_022_592,
        "attention": 16 * 16_777_216,
        "norms": 16 * (4_096 + 4_096) + 2_048,
        "routers": 2_097_152,
        "experts": 6_442_450_944,
    }
    assert config.head_dim == 128
    assert config.eos_token_ids == (50279,)


LINEAR = RopeParameters(rope_type="linear", factor=2.0)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({"rope_theta": 500.0, "rope_scaling": None}, RopeParameters(rope_theta=500.0)),
        ({"rope_theta": 500}, RopeParameters(rope_theta=500.0)),
        ({}, RopeParameters()),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, LINEAR),
        ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2}}, LINEAR),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}, LINEAR),
        ({"rope_scaling": {"rope_theta": 7.0, "type": "default"}}, RopeParameters(rope_theta=7.0)),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, RopeParameters(rope_theta=7.0)),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, LINEAR),
        # transformers 5 writes both names of the type if it read a version 4 file
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "type": "linear", "factor": 2.0}}, LINEAR),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 4096}},
            RopeParameters(rope_type="dynamic", factor=4.0),
        ),
        (  # both spellings, agreeing, as we write them
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None},
            LINEAR,
        ),
    ],
)
def test_both_spellings_of_rope(spelling, expected):
    raw = {key: value for key, value in RELEASED.items() if not key.startswith("rope")} | spelling
    assert ModelConfig.from_dict(raw).rope == expected


def test_spellings_of_dtype_and_optional_keys_do_not_matter():
    assert ModelConfig.from_dict(changed(torch_dtype="float32")) == ModelConfig()
    assert ModelConfig.from_dict(changed(dtype="float16", transformers_version="5.23.0")) == ModelConfig()
    optional = {"rms_norm_eps", "torch_dtype", "num_key_value_heads", "architectures", "use_cache"}
    assert ModelConfig.from_dict({k: v for k, v in RELEASED.items() if k not in optional}) == ModelConfig()
    # transformers' other name for the number of experts
    renamed = {k: v for k, v in changed(num_local_experts=32).items() if k != "num_experts"}
    assert ModelConfig.from_dict(renamed).num_experts == 32
    assert ModelConfig.from_dict(changed(num_local_experts=64, head_dim=128)) == ModelConfig()


def test_several_end_tokens():
    config = ModelConfig.from_dict(changed(eos_token_id=[50279, 0]))
    assert config.eos_token_ids == (50279, 0)
    assert config == ModelConfig(eos_token_id=[50279, 0])  # a list is accepted, and the config stays hashable
    assert hash(config) == hash(ModelConfig(eos_token_id=(50279, 0)))
    assert ModelConfig(eos_token_id=None).eos_token_ids == ()


# ---- counts ----

COUNTED = [case.changes for case in CASES] + [
    {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 3},
    {"num_key_value_heads": 2, "attention_bias": True, "vocab_size": 77, "num_experts": 5},
]


@pytest.mark.parametrize("changes", COUNTED, ids=str)
def test_counts_agree_with_the_built_network(changes):
    config = small_config(**changes)
    with torch.device("meta"):
        model = CausalLM(config)
    counts = dict.fromkeys(config.parameter_counts(), 0)
    active = 0
    for name, parameter in model.named_parameters():
        part = next(
            part
            for part, pattern in {
                "embeddings": "embed_tokens|lm_head",
                "norms": "norm",
                "attention": "self_attn",
                "routers": "gate.weight",
                "experts": "experts",
            }.items()
            if re.search(pattern, name)
        )
        counts[part] += parameter.numel()
        active += parameter[: config.num_experts_per_tok].numel() if part == "experts" else parameter.numel()
    assert config.parameter_counts() == counts
    assert config.num_parameters == sum(counts.values())
    assert config.num_active_parameters == active


# ---- round trips ----


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_we_write_reads_back_equal_here_and_in_transformers(case, tmp_path):
    config = small_config(**case.changes, eos_token_id=(319, 3), pad_token_id=None)
    (tmp_path / "config.json").write_text(config.to_json("bfloat16"))
    assert ModelConfig.from_file(tmp_path / "config.json") == config
    assert ModelConfig.from_dict(config.to_dict()) == config

    theirs = OlmoeConfig.from_pretrained(tmp_path)
    for name, value in vars(config).items():
        if name == "rope":
            expected = {"rope_theta": value.rope_theta, "rope_type": value.rope_type}
            if value.rope_type != "default":
                expected["factor"] = value.factor
            assert {key: theirs.rope_parameters.get(key) for key in expected} == expected
        else:
            assert getattr(theirs, name) == (list(value) if isinstance(value, tuple) else value), name
    assert theirs.dtype == torch.bfloat16
    assert theirs.architectures == ["OlmoeForCausalLM"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_transformers_writes_is_read_to_the_same_values(case, tmp_path):
    config = small_config(**case.changes)
    OlmoeConfig(**config.to_dict("float16")).save_pretrained(tmp_path)
    assert ModelConfig.from_file(tmp_path / "config.json") == config


def test_transformers_own_arguments_in_version_4_spelling(tmp_path):
    OlmoeConfig(
        intermediate_size=1024, rope_theta=123.0, rope_scaling={"type": "dynamic", "factor": 3.0}, dtype="bfloat16"
    ).save_pretrained(tmp_path)
    expected = ModelConfig(rope=RopeParameters(rope_theta=123.0, rope_type="dynamic", factor=3.0))
    assert ModelConfig.from_file(tmp_path / "config.json") == expected


# ---- what is refused ----

NO_SIZES = [0, -1, True, 1.5, 8.0, "8", [8], {}, 2**31, 10**400, float("nan"), float("inf"), -float("inf"), "x" * 999]
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings num_experts num_experts_per_tok"
).split()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_must_be_positive_integers(name):
    for value in NO_SIZES:
        assert name in refused(lambda value=value: ModelConfig.from_dict(changed(**{name: value})))
    if name != "num_key_value_heads":
        refused(lambda: ModelConfig.from_dict(changed(**{name: None})))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rms_norm_eps", [-1e-5, float("nan"), float("inf"), "1e-5", None, True, 10**400]),
        ("initializer_range", [-1, float("nan"), "0.02", None]),
        ("attention_dropout", [-0.1, float("inf"), [], None]),
        ("router_aux_loss_coef", [-0.1, float("nan"), {}, None]),
        ("clip_qkv", [0, -1.0, float("nan"), float("inf"), "8", True]),
        ("tie_word_embeddings", [0, 1, "true", None]),
        ("attention_bias", [0, 1, "false", None]),
        ("norm_topk_prob", [0, 1, "no", None]),
        ("hidden_act", [None, 1, ["silu"]]),
        ("pad_token_id", [True, 1.0, "1", [1], 2**31]),
        ("eos_token_id", [-1, True, 1.0, "50279", [50279, "0"], [[1]], {}, [True], 2**31]),
        ("rope_theta", [0, -1, float("nan"), float("inf"), "10000", True, 10**400, [1]]),
        ("head_dim", [64, 0, "128", [128]]),
        ("num_local_experts", [8, "64", 0]),
        ("model_type", ["llama", "olmo", "", None, 3, ["olmoe"], "x" * 5000]),
        ("rope_scaling", [[], "linear", 2, True, False]),
        ("rope_parameters", [[1], "default", 0, ""]),
    ],
)
def test_wrong_values_are_refused_by_name(name, values):
    for value in values:
        message = refused(lambda value=value: ModelConfig.from_dict(changed(**{name: value})))
        assert name.replace("_", " ") in message.replace("_", " "), message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2050},  # not divisible by the heads
        {"num_attention_heads": 2048},  # head dimension 1 is odd
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 32},
        {"num_experts_per_tok": 65},
        {"rope_scaling": {"type": "linear"}},  # no factor
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": "2"}},
        {"rope_scaling": {"type": "linear", "factor": float("nan")}},
        {"rope_scaling": {"type": "dynamic", "factor": 10**400}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"type": "longrope"}},
        {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
        {"rope_scaling": {"factor": 2.0}},  # a factor without a type would have no effect
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_theta": 5.0, "type": "default"}},  # against rope_theta 10000
        {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048}},
        {  # the dynamic base is raised to head_dim / (head_dim - 2)
            "hidden_size": 32,
            "num_attention_heads": 16,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
    ],
    ids=str,
)
def test_contradictions_are_refused(changes):
    refused(lambda: ModelConfig.from_dict(changed(**changes)))


def test_a_scaling_factor_without_a_type_is_refused_in_python_too():
    assert "factor" in refused(lambda: RopeParameters(factor=4.0))


def test_the_expert_width_is_never_guessed():
    raw = {key: value for key, value in RELEASED.items() if key != "intermediate_size"}
    assert "intermediate_size" in refused(lambda: ModelConfig.from_dict(raw))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 1024),
        ("quantization_config", {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["gate"] * 500}),
        ("shared_expert_intermediate_size", 512),
        ("num_hiden_layers", 3),  # a typing error must not silently keep the default
        ("logit_scale", 0.5),
        ("first_k_dense_replace", "1"),
        ("x" * 10_000, float("nan")),
        ("two\nlines", "a\nb"),
    ],
)
def test_unknown_keys_that_say_something_are_refused(key, value):
    message = refused(lambda: ModelConfig.from_dict(changed(**{key: value})))
    assert repr(key)[1:20] in message
    for nothing in (None, False, 0, 0.0, "", [], {}):
        assert ModelConfig.from_dict(changed(**{key: nothing})) == ModelConfig()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b"\xff\xfe{}",
        b"\x00" * 64,
        b"[" * 100_000,  # deeper than Python's recursion limit
        b'{"vocab_size": ' + b"9" * 5_000 + b"}",  # more digits than Python converts
        b"[]",
        b"null",
        b'"olmoe"',
    ],
    ids=lambda content: repr(content[:12]),
)
def test_files_that_are_no_json_object(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert "config.json" in refused(lambda: ModelConfig.from_file(path))


def test_files_that_cannot_be_read(tmp_path):
    assert "config.json" in refused(lambda: ModelConfig.from_file(tmp_path / "config.json"))
    assert str(tmp_path) in refused(lambda: ModelConfig.from_file(tmp_path))  # a folder
    (tmp_path / "file").write_text("{}")
    refused(lambda: ModelConfig.from_file(tmp_path / "file" / "config.json"))
    refused(lambda: ModelConfig.from_file(tmp_path / ("x" * 300)))


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 400):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(RELEASED).replace('"rope_theta": 10000.0', f'"rope_theta": {number}'))
        assert "rope_theta" in refused(lambda path=path: ModelConfig.from_file(path))
