"""Averages of checkpoints: what is averaged, what is refused, and that every reader of checkpoints can be averaged."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from conftest import make_model
from olmoe.errors import CheckpointError
from olmoe.weights import checkpoint, export
from olmoe.weights.average import Average, open_average
from olmoe.weights.to_folder import to_folder
from packed_folders import packed_folder
from sentences import refused


def saved(folder, seed, dtype=None, **changes):
    export.save(make_model(seed, **changes), folder, dtype=dtype, extra_files={"chat_template.jinja": f"{seed}"})
    return str(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_each_weight_is_the_mean_rounded_once(tmp_path, tied):
    names = [saved(tmp_path / str(seed), seed, tie_word_embeddings=tied) for seed in range(3)]
    average, dtype = open_average(names)
    to_folder(average, tmp_path / "mean", dtype)
    models = [checkpoint.load(name) for name in names]
    mean = checkpoint.load(tmp_path / "mean")
    for name, value in mean.named_parameters():
        parts = [dict(model.named_parameters())[name].double() for model in models]
        assert torch.equal(value, (sum(parts) / 3).float()), name
    assert (tmp_path / "mean" / "chat_template.jinja").read_text() == "0"  # the first one's
    assert AutoConfig.from_pretrained(tmp_path / "mean").model_type == "olmoe"


def test_means_are_stored_as_the_checkpoints_are_unless_these_differ(tmp_path):
    a = saved(tmp_path / "a", 0, torch.bfloat16)
    b = saved(tmp_path / "b", 1, torch.bfloat16)
    c = saved(tmp_path / "c", 2)
    assert open_average([a, b])[1] == torch.bfloat16
    assert open_average([a, c])[1] == torch.float32


def test_other_architectures_packed_ones_and_a_single_one_are_refused(tmp_path):
    a, b = saved(tmp_path / "a", 0), saved(tmp_path / "b", 0, num_experts_per_tok=2)
    assert "has num_experts_per_tok 3, but" in refused(lambda: open_average([a, b]), CheckpointError)
    assert "at least two" in refused(lambda: open_average([a]), CheckpointError)
    packed = str(packed_folder(tmp_path / "packed", "int8"))
    assert "is packed" in refused(lambda: open_average([a, packed]), CheckpointError)


def test_a_checkpoint_averaged_with_itself_stays_what_it_is(tmp_path):
    a = saved(tmp_path / "a", 0)
    source = checkpoint.open_source(a)
    to_folder(Average([source, source]), tmp_path / "same", torch.float32)
    before, after = checkpoint.load(a), checkpoint.load(tmp_path / "same")
    assert all(torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))
