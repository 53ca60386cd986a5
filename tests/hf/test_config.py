"""`OlmoeConfig` against transformers' own."""

from __future__ import annotations

import pytest
import transformers

from configurations import CASES, small_config
from olmoe import OlmoeConfig
from olmoe.errors import ConfigError


def test_defaults_are_the_documented_ones():
    assert OlmoeConfig().to_dict() == transformers.OlmoeConfig().to_dict()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_config_files_equal_transformers_byte_for_byte(case, tmp_path):
    values = small_config(**case.changes).to_dict()
    for name, cls in (("ours", OlmoeConfig), ("theirs", transformers.OlmoeConfig)):
        cls(**values).save_pretrained(tmp_path / name)
    ours, theirs = ((tmp_path / name / "config.json").read_bytes() for name in ("ours", "theirs"))
    assert ours == theirs
    assert OlmoeConfig.from_pretrained(tmp_path / "theirs").to_dict() == OlmoeConfig(**values).to_dict()


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": 30, "num_attention_heads": 4}, {"num_experts_per_tok": 65}, {"clip_qkv": -1.0}],
    ids=str,
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ConfigError, match=str(next(iter(values.values())))):
        OlmoeConfig(**values)
