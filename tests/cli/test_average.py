"""`olmoe average`: a folder from folders, and what a user is told."""

from __future__ import annotations

import torch

from conftest import make_model
from olmoe.cli.main import main
from olmoe.weights import checkpoint, export


def test_two_checkpoints_become_a_third(tmp_path, capsys):
    for seed in range(2):
        export.save(make_model(seed), tmp_path / str(seed))
    command = ["average", str(tmp_path / "0"), str(tmp_path / "1"), str(tmp_path / "mean"), "--quiet"]
    assert main([*command, "--type", "bf16"]) == 0
    assert checkpoint.load(tmp_path / "mean").lm_head.weight.dtype == torch.bfloat16
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    a, b, mean = (checkpoint.load(tmp_path / name).lm_head.weight for name in ("0", "1", "mean"))
    torch.testing.assert_close(mean, (a + b) / 2)


def test_nothing_is_left_of_an_average_that_fails(tmp_path, capsys):
    export.save(make_model(0), tmp_path / "a")
    export.save(make_model(1, num_experts=4), tmp_path / "b")
    assert main(["average", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "mean")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
