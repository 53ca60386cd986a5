"""Which format a matrix has, and configurations that say nothing sensible."""

from __future__ import annotations

import pytest

from olmoe.errors import CheckpointError
from olmoe.quant import PackedLayout, make_block_format


def test_a_name_wins_over_patterns_and_the_longest_pattern_over_others():
    layout = PackedLayout(
        "q4_0",
        {
            "lm_head": "q8_0",
            "*_proj": "bf16",
            "model.layers.*.self_attn.*": "q8_0",
            "model.layers.1.self_attn.q_proj": "q4_0",
        },
    )
    assert layout.name_of("lm_head.weight") == "q8_0"
    assert layout.name_of("model.embed_tokens.weight") == "q4_0"
    assert layout.name_of("model.layers.0.mlp.experts.down_proj") == "bf16"
    assert layout.name_of("model.layers.0.self_attn.q_proj.weight") == "q8_0"
    assert layout.name_of("model.layers.1.self_attn.q_proj.weight") == "q4_0"
    assert layout.format_of("lm_head.weight", 4, 64).name == "q8_0"
    assert layout.format_of("lm_head.weight", 4, 40) is None  # no blocks of 32
    assert layout.format_of("model.layers.0.mlp.experts.down_proj", 32, 32) is None


def test_round_trip():
    layout = PackedLayout("q8_0", {"lm_head": "bf16"}, "int8")
    assert PackedLayout.from_dict(layout.to_dict()) == layout
    assert make_block_format("q4_0").name == "q4_0"


OURS = {"quant_method": "olmoe", "weight_format": "q4_0"}


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (None, "must be an object, not None"),
        ({}, "was quantized by None; load the unquantized one"),
        ({"quant_method": "gptq", "bits": 4}, "was quantized by 'gptq'; load the unquantized one"),
        (OURS | {"group_size": 128}, "'group_size', which this version of olmoe does not know"),
        (OURS | {"weight_format": "nf4"}, "saved in nf4 by save_pretrained; load it with"),
        (OURS | {"weight_format": "q9"}, "packed as 'q9'; only q8_0, q5_0, q4_0"),
        (OURS | {"weight_format": ["q4_0"]}, r"packed as \['q4_0'\]; only"),
        (OURS | {"weight_format": None}, "packed as None; only"),
        (OURS | {"overrides": ["lm_head"]}, "overrides of quantization_config must be an object"),
        (OURS | {"overrides": {str(i): "q8_0" for i in range(5000)}}, "at most 4096 names"),
        (OURS | {"overrides": {"lm_head": "int8"}}, "stores 'lm_head' as 'int8'; choose q8_0, q5_0, q4_0, bf16"),
        (OURS | {"overrides": {"lm_head": ["q8_0"]}}, r"stores 'lm_head' as \['q8_0'\]"),
        (OURS | {"overrides": {"*a*b*c*d*e*": "q8_0"}}, "which names no matrix"),
        (OURS | {"overrides": {"x" * 201: "q8_0"}}, "which names no matrix"),
        (OURS | {"recipe": 4}, "must be a text, not 4"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_known_is_refused(raw, sentence):
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        PackedLayout.from_dict(raw)
    assert "\n" not in str(refusal.value)
