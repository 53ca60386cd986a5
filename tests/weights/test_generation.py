"""The ids that end a text, as a checkpoint folder says it."""

from __future__ import annotations

import json

import pytest

from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError
from olmoe.weights.generation import FILE_NAME, end_ids, generation_text

CONFIG = ModelConfig(eos_token_id=(5, 6), pad_token_id=1)


@pytest.mark.parametrize(
    ("value", "ids"), [(7, (7,)), ([7, 8], (7, 8)), (None, (5, 6)), ([], (5, 6)), (["a"], (5, 6)), ("a", (5, 6))]
)
def test_the_file_comes_before_the_model(tmp_path, value, ids):
    assert end_ids(tmp_path, CONFIG) == (5, 6)
    (tmp_path / FILE_NAME).write_text(json.dumps({"eos_token_id": value}))
    assert end_ids(tmp_path, CONFIG) == ids


def test_what_is_written_is_read_as_the_model_has_it(tmp_path):
    (tmp_path / FILE_NAME).write_text(generation_text(CONFIG))
    assert end_ids(tmp_path, CONFIG) == (5, 6)
    assert json.loads(generation_text(CONFIG)) == {
        "_from_model_config": True,
        "pad_token_id": 1,
        "eos_token_id": [5, 6],
    }


@pytest.mark.parametrize("text", ["[]", "{", "7"])
def test_a_broken_file_is_one_sentence(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config.json is not a JSON object \("):
        end_ids(tmp_path, CONFIG)
