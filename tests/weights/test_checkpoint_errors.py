"""Damaged, foreign and hostile checkpoints: one sentence each, and nothing left half-loaded or half-saved."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configurations import small_config
from conftest import make_model
from olmoe.config import ModelConfig
from olmoe.errors import UserError
from olmoe.io.tensor_file import INDEX_NAME, SINGLE_NAME
from olmoe.weights import checkpoint, export, hf_folder
from olmoe.weights.names import parameter_shapes
from sentences import refused


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint in one file; each test damages its own."""
    export.save(make_model(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def sharded(tmp_path) -> Path:
    export.save(make_model(), tmp_path / "sharded", max_shard_bytes=50_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


# ---- what is wrong with a folder: one sentence each, found before anything is allocated ----


@pytest.fixture
def no_allocation(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("memory was allocated before the check")

    monkeypatch.setattr(hf_folder, "allocate", fail)


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / SINGLE_NAME)
    edit(tensors)
    save_file(tensors, folder / SINGLE_NAME)
    return folder


def config_with(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


GATE, DOWN = "model.layers.0.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.experts.0.down_proj.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no norm": (lambda t: t.pop("model.norm.weight"), "lacks 'model.norm.weight'"),
    "no head": (lambda t: t.pop("lm_head.weight"), "lacks 'lm_head.weight'"),
    "one expert part missing": (lambda t: t.pop(GATE), "lacks 'model.layers.0.mlp.experts.gate_up_proj'"),
    "all experts missing": (lambda t: [t.pop(k) for k in list(t) if "experts" in k], "and 1 more"),
    "nothing": (lambda t: t.clear(), "holds tensors of 0"),
    "one layer missing": (lambda t: [t.pop(k) for k in list(t) if "layers.1." in k], "2 layers"),
    "one layer more": (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}), "2 layers"),
    "another layer": (
        lambda t: t.update({k.replace("s.1.", "s.5."): t.pop(k) for k in list(t) if "layers.1." in k}),
        "layers.5.",
    ),
    "unexpected": (lambda t: t.update({"model.extra": torch.ones(1)}), "'model.extra'"),
    "unexpected bias": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "q_proj.bias"),
    "unexpected long name": (lambda t: t.update({"a" * 50_000: torch.ones(1)}), "aaa"),
    "unexpected name with a line break": (lambda t: t.update({"a\nb": torch.ones(1)}), r"a\\nb"),
    "expert beyond": (
        lambda t: t.update({GATE.replace("3", "8"): t[GATE].clone()}),
        "experts.8.gate_proj.weight', which OLMoE with this config",
    ),
    "expert far beyond": (lambda t: t.update({GATE.replace("3", "9" * 6000): t[GATE].clone()}), "experts.9999"),
    # Names that a lenient parser would take for expert 3, so that it is there twice and another is not at all
    "leading zero": (lambda t: t.update({GATE.replace("3", "03"): t.pop(GATE.replace("3", "4"))}), "experts.03"),
    "other digits": (lambda t: t.update({GATE.replace("3", "\u0663"): t.pop(GATE.replace("3", "4"))}), "experts."),
    "transposed": (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), r"\[12, 32\].*\[32, 12\]"),
    "too many rows": (lambda t: t.update({"lm_head.weight": torch.ones(321, 32)}), r"\[321, 32\].*\[320, 32\]"),
    "scalar": (lambda t: t.update({"model.norm.weight": torch.tensor(1.0)}), r"shape \[\]"),
    "empty": (lambda t: t.update({"model.norm.weight": torch.ones(0)}), r"shape \[0\]"),
    "int8": (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), "stored as I8"),
    "float64": (lambda t: t.update({GATE: t[GATE].double()}), "stored as F64"),
    "float8": (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
    "both layouts": (lambda t: t.update({FUSED: torch.ones(8, 24, 32)}), "two layouts"),
    "fused with one expert": (
        lambda t: (
            [t.pop(k) for k in list(t) if re.search(r"layers\.0.*(gate|up)_proj", k) and k != GATE],
            t.update({FUSED: torch.ones(8, 24, 32)}),
        ),
        "two layouts",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_contents(damage, folder, no_allocation):
    edit, pattern = DAMAGES[damage]
    edited(folder, edit)
    assert re.search(pattern, refused(lambda: checkpoint.load(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 1},
        {"num_experts": 10**9},
        {"num_experts": 7, "num_experts_per_tok": 3},
        {"vocab_size": 2**31 - 1},
        {"hidden_size": 2**30},
        {"attention_bias": True},
        {"num_key_value_heads": 2},
        {"hidden_act": "nonsense"},
        {"num_hidden_layers": float("nan")},
        {"model_type": "llama"},
    ],
    ids=str,
)
def test_configurations_that_do_not_fit(changes, folder, no_allocation):
    refused(lambda: checkpoint.load(config_with(folder, **changes)), UserError)


def test_sizes_whose_product_wraps_round_in_64_bits_are_not_taken_for_nothing():
    config = small_config(num_experts=2**30, intermediate_size=2**29)
    stored = {
        name: hf_folder.StoredTensor(Path("file"), shape, "F32")
        for name, shape in parameter_shapes(config).items()
        if "experts" not in name
    }
    assert "lacks" in refused(lambda: hf_folder.plan(config, stored))


def test_a_missing_configuration_and_missing_weights(folder, no_allocation):
    (folder / "config.json").rename(folder / "other.json")
    assert "config.json" in refused(lambda: checkpoint.load(folder), UserError)
    (folder / "other.json").rename(folder / "config.json")
    (folder / SINGLE_NAME).unlink()
    assert SINGLE_NAME in refused(lambda: checkpoint.load(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "convert" in refused(lambda: checkpoint.load(folder))


def test_a_file_cut_anywhere_is_refused(folder, no_allocation):
    whole = (folder / SINGLE_NAME).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, (header + len(whole)) // 2, len(whole) - 1):
        (folder / SINGLE_NAME).write_bytes(whole[:length])
        assert SINGLE_NAME in refused(lambda: checkpoint.load(folder))
    (folder / SINGLE_NAME).write_bytes(whole + b"\0")
    refused(lambda: checkpoint.load(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04PK\x03\x04" * 99,
        b"not safetensors at all, but text\n" * 9,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 66) + b'{"model.norm.weight":{"dtype":"F32","shape":[9],"data_offsets":[0]}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",  # a clone without git-lfs
    ],
    ids=lambda content: repr(content[:10]),
)
def test_files_that_are_no_safetensors(content, folder, no_allocation):
    (folder / SINGLE_NAME).write_bytes(content)
    assert "safetensors file" in refused(lambda: checkpoint.load(folder))


def test_a_cut_or_missing_shard(sharded, no_allocation):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    assert shard.name in refused(lambda: checkpoint.load(sharded))
    shard.unlink()
    assert re.search(f"{shard.name}.*missing", refused(lambda: checkpoint.load(sharded)))
    shard.mkdir()
    refused(lambda: checkpoint.load(sharded))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["b"]}}',
        "\udcff",
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_an_index_that_is_none(content, sharded, no_allocation):
    (sharded / INDEX_NAME).write_text(content, encoding="utf-8", errors="surrogateescape")
    assert INDEX_NAME in refused(lambda: checkpoint.load(sharded))


@pytest.mark.parametrize(
    "name", ["../{}", "{root}/{}", "sub/{}", "..", ".", "", "a\0b", "x" * 300, "..\\{}", "link/{}"]
)
def test_an_index_cannot_name_files_elsewhere(name, sharded, no_allocation):
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    (sharded / "sub").mkdir()
    (sharded / "link").symlink_to(sharded.parent)
    for place in (sharded.parent, sharded / "sub"):
        (place / first.name).write_bytes(first.read_bytes())
    index = json.loads((sharded / INDEX_NAME).read_text())
    bad = name.format(first.name, root=sharded.parent)
    index["weight_map"] = {k: bad if v == first.name else v for k, v in index["weight_map"].items()}
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    refused(lambda: checkpoint.load(sharded))


def test_an_index_and_shards_that_disagree(sharded, no_allocation):
    first, second = sorted(sharded.glob("model-*.safetensors"))[1:3]
    content = second.read_bytes()
    save_file(load_file(first) | dict(list(load_file(second).items())[:1]), first)
    assert re.search("is in both", refused(lambda: checkpoint.load(sharded)))
    save_file(dict(list(load_file(first).items())[:1]), first)
    second.write_bytes(content)
    assert re.search("index lists", refused(lambda: checkpoint.load(sharded)))


def test_memory_that_is_not_there_is_said(folder, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(hf_folder, "allocate", fail)
    assert "GB as bfloat16" in refused(lambda: checkpoint.load(folder, dtype=torch.bfloat16))


# ---- saves that fail leave nothing behind ----

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(("error", "kind"), [(NO_SPACE, UserError), (KeyboardInterrupt(), KeyboardInterrupt)], ids=str)
def test_a_failed_save_leaves_nothing_behind(error, kind, at, existing, tmp_path, monkeypatch):
    target = tmp_path / "out"
    if existing:
        export.save(make_model(seed=7), target, extra_files={"note.txt": "old"})
        before = files(target)
    calls = 0

    def failing(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        if calls == at:
            raise error
        calls += 1
        save_file(*arguments, **options)

    monkeypatch.setattr(export, "save_file", failing)
    with pytest.raises(kind) as caught:
        export.save(make_model(), target, max_shard_bytes=30_000)
    if kind is UserError:
        assert re.fullmatch(rf"The disk is full: {target} was not written[^.\n]*\.", str(caught.value))
    assert calls == at
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    if existing:
        assert files(target) == before


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What a full disk or a quota does to every write of this process, by the kernel itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_system_that_refuses_is_one_sentence(tmp_path):
    model = make_model()
    refusal = r"^\S+ cannot be written \(File too large\); choose another place\.$"
    with pytest.raises(UserError, match=refusal), file_size_limit(10_000):
        export.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "thesis" not in refused(lambda: export.save(make_model(), tmp_path))
    assert files(tmp_path) == {"thesis.txt": b"years of work"}
    refused(lambda: export.save(make_model(), tmp_path / "thesis.txt"), UserError)
    refused(lambda: export.save(make_model(), tmp_path / "thesis.txt" / "out"), UserError)
    assert files(tmp_path) == {"thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    export.save(make_model(), tmp_path / "empty")
    assert ModelConfig.from_file(tmp_path / "empty" / "config.json") == small_config()


def test_dtypes_that_could_not_be_loaded_are_not_saved(tmp_path):
    assert "float64" in refused(lambda: export.save(make_model().double(), tmp_path / "out"))
    assert "int8" in refused(lambda: export.save(make_model(), tmp_path / "out", dtype=torch.int8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [70_000.0, -1e30, float("nan")])
def test_weights_beyond_float16_do_not_become_infinite(value, folder, tmp_path):
    edited(folder, lambda tensors: tensors[GATE][3, 4].fill_(value))
    for dtype in (None, torch.float32, torch.bfloat16):
        model = checkpoint.load(folder, dtype=dtype)
    assert re.search("float16", refused(lambda: checkpoint.load(folder, dtype=torch.float16)))
    assert re.search("float16", refused(lambda: export.save(model, tmp_path / "out", dtype=torch.float16)))
    assert not (tmp_path / "out").exists()
