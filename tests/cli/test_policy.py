"""`olmoe policy`: measurements go in, a policy file comes out; mistakes are one sentence and leave nothing."""

from __future__ import annotations

import json

import pytest

from olmoe.cli.main import main
from olmoe.runner.policy_file import NamedPolicy, read_policy

SHARES = {"code": [0.9, 0.5, 0.4, 0.2], "law": [0.9, 0.1, 0.4, 0.6]}


@pytest.fixture
def metrics(tmp_path):
    folder = tmp_path / "routing"
    folder.mkdir()
    found = {
        "schema": "olmoe-metrics-1", "layers_count": 1, "experts": 4, "top_k": 2, "layers": {"0": {"top_k": [0.5] * 4}},
        "domains": {name: {"layers": {"0": {"top_k": row}}} for name, row in SHARES.items()},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def policy(capsys, *arguments):
    capsys.readouterr()
    code = main(["policy", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_file_for_each_way(capsys, metrics, tmp_path):
    target = tmp_path / "policy.json"
    for options, expected in (
        ([], NamedPolicy(allow=((0, 0), (0, 1)))),
        (["--experts", 3], NamedPolicy(allow=((0, 0), (0, 1), (0, 2)))),
        (["--how", "boost", "--strength", 1.5, "--experts", 1], NamedPolicy(boost=((0, 0, 1.5),))),
        (["--how", "pin"], NamedPolicy(pin=((0, 0),))),
        (["--how", "pin", "--experts", 2, "--by", "contrast"], NamedPolicy(pin=((0, 0), (0, 1)))),
    ):
        done = policy(capsys, metrics, "--domain", "code", "-o", target, "--overwrite", *options)
        assert done == (0, "", "")
        assert read_policy(target) == expected


def test_without_a_file_it_is_printed(capsys, metrics):
    code, out, err = policy(capsys, metrics / "metrics.json", "--domain", "law", "--how", "pin")
    assert (code, err) == (0, "")
    assert out == '{\n  "pin": [\n    {"layer": 0, "expert": 0}\n  ]\n}\n'


def test_mistakes_leave_nothing(capsys, metrics, tmp_path):
    target = tmp_path / "policy.json"
    for arguments, sentence in (
        ([metrics, "--domain", "books"], "olmoe: There is no domain 'books'; the measurements have code, law.\n"),
        ([tmp_path / "none", "--domain", "code"], f"olmoe: The measurements {tmp_path / 'none'} cannot be read"),
        ([metrics, "--domain", "code", "--experts", 1], "olmoe: With how='only' there can be 2 to 4 experts"),
    ):
        code, out, err = policy(capsys, *arguments, "--output", target)
        assert (code, out) == (2, "")
        assert err.startswith(sentence)
        assert not target.exists()
    target.write_text("mine", encoding="utf-8")
    code, _, err = policy(capsys, metrics, "--domain", "code", "-o", target)
    assert (code, err) == (2, f"olmoe: {target} exists already; choose another name, or replace it with --overwrite.\n")
    assert target.read_text(encoding="utf-8") == "mine"
