"""Checkpoints to and from transformers bit for bit, peak memory, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from configurations import small_config
from conftest import make_model
from olmoe.cli.main import main
from olmoe.errors import CheckpointError
from olmoe.io.tensor_file import INDEX_NAME, SINGLE_NAME
from olmoe.model import CausalLM
from olmoe.weights import checkpoint, export, hf_folder, packed_file
from olmoe.weights.checkpoint import open_source
from olmoe.weights.names import parameter_shapes
from packed_folders import WHOLE, packed_folder, plain_folder
from sentences import refused

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Structures that change which tensors exist, or their shapes.
STRUCTURES: dict[str, dict[str, Any]] = {
    "released": {},
    "gqa": {"num_key_value_heads": 2},
    "bias": {"attention_bias": True, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd width": {"intermediate_size": 5, "num_experts": 3, "num_hidden_layers": 1},
    "eleven layers": {"num_hidden_layers": 11, "num_experts": 12},  # where "10" sorts before "2"
}


def random_model(**changes: Any) -> CausalLM:
    """Random in every parameter, norms and biases included."""
    model = make_model(**changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def theirs(**changes: Any) -> OlmoeForCausalLM:
    """transformers' model with the same random weights."""
    model = OlmoeForCausalLM(OlmoeConfig(**small_config(**changes).to_dict()))
    model.load_state_dict(random_model(**changes).state_dict())
    return model


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(state[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint in one file; each test damages its own."""
    export.save(random_model(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def sharded(tmp_path) -> Path:
    export.save(random_model(), tmp_path / "sharded", max_shard_bytes=50_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


# ---- what we save, transformers loads ----


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000, 1])
@pytest.mark.parametrize("name", STRUCTURES)
def test_transformers_loads_what_we_save(name, shard_bytes, tmp_path):
    model = random_model(**STRUCTURES[name])
    export.save(model, tmp_path / "out", max_shard_bytes=shard_bytes)
    loaded, info = OlmoeForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert_same(checkpoint.load(tmp_path / "out").state_dict(), model.state_dict())
    assert loaded.generation_config.eos_token_id == model.config.eos_token_id
    assert loaded.generation_config.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_converts_and_records_the_dtype(dtype, tmp_path):
    model = random_model()
    export.save(model, tmp_path / "out", dtype=dtype)
    loaded = OlmoeForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same(dict(loaded.named_parameters()), {n: p.to(dtype) for n, p in model.named_parameters()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert next(model.parameters()).dtype == torch.float32  # the model itself is left as it was


def test_the_files_hold_the_names_of_the_hub(tmp_path):
    model = random_model()
    export.save(model, tmp_path / "out")
    config = model.config
    with safe_open(tmp_path / "out" / SINGLE_NAME, framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    per_layer = 2 + 4 + 2 + 1 + 3 * config.num_experts
    assert len(names) == 3 + config.num_hidden_layers * per_layer
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)


def test_shards_respect_their_size_and_are_listed(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    tensors: dict[str, Tensor] = {}
    for path in sorted(sharded.glob("model-*-of-*.safetensors")):
        part = load_file(path)
        assert sum(value.nbytes for value in part.values()) <= 50_000
        assert {index["weight_map"][name] for name in part} == {path.name}
        tensors |= part
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert not (sharded / SINGLE_NAME).exists()


def test_extra_files_and_views_that_are_not_contiguous(tmp_path):
    model = random_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach().T.contiguous().T)
    export.save(model, tmp_path / "a" / "b" / "out", extra_files={"tokenizer.json": "{}é"})
    assert (tmp_path / "a" / "b" / "out" / "tokenizer.json").read_text(encoding="utf-8") == "{}é"
    assert_same(checkpoint.load(tmp_path / "a" / "b" / "out").state_dict(), expected)


def test_an_existing_checkpoint_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    export.save(make_model(seed=7), target, max_shard_bytes=30_000, extra_files={"note.txt": "old"})
    model = random_model(num_hidden_layers=1)
    export.save(model, target)
    assert {path.name for path in target.iterdir()} == {SINGLE_NAME, "config.json", "generation_config.json"}
    assert_same(checkpoint.load(target).state_dict(), model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- what transformers saves, we load ----


@pytest.mark.parametrize("layout", ["per-expert", "fused", "state dict"])
@pytest.mark.parametrize("size", ["10GB", "30KB"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_we_load_what_transformers_saves(name, size, layout, tmp_path):
    model = theirs(**STRUCTURES[name])
    if layout == "state dict":
        model.config.save_pretrained(tmp_path)
        shared = {"lm_head.weight"} if STRUCTURES[name].get("tie_word_embeddings") else set()
        save_file({k: v for k, v in model.state_dict().items() if k not in shared}, tmp_path / SINGLE_NAME)
    else:
        model.save_pretrained(tmp_path, max_shard_size=size, save_original_format=layout == "per-expert")
        if name != "odd width":
            assert (tmp_path / INDEX_NAME).exists() == (size == "30KB")
    loaded = checkpoint.load(tmp_path)
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert loaded.config == small_config(**STRUCTURES[name])
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    if STRUCTURES[name].get("tie_word_embeddings"):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("memory", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("disk", DTYPES, ids=str)
def test_every_dtype_on_disk_to_every_dtype_in_memory(disk, memory, tmp_path):
    model = theirs().to(disk)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded = checkpoint.load(tmp_path, dtype=memory)
    assert_same(
        dict(loaded.named_parameters()), {name: value.to(memory or disk) for name, value in model.named_parameters()}
    )


def test_the_dtype_of_most_values_is_kept(folder):
    # Norms in fp32 among bf16 weights, and a buffer that old transformers versions stored.
    tensors = {k: v if "norm" in k else v.bfloat16() for k, v in load_file(folder / SINGLE_NAME).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(10**6, dtype=torch.int64)
    save_file(tensors, folder / SINGLE_NAME)
    loaded = checkpoint.load(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.norm.weight, tensors["model.norm.weight"].bfloat16())


def test_a_tied_checkpoint_may_repeat_the_head_if_it_is_the_same(tmp_path):
    model = random_model(tie_word_embeddings=True)
    export.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / SINGLE_NAME)
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "out" / SINGLE_NAME)
    for dtype in DTYPES:
        loaded = checkpoint.load(tmp_path / "out", dtype=dtype)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, embedding.to(dtype))
    for other in (embedding + 1, embedding[1:].clone()):
        # transformers would untie these with a warning, and another network would come out
        save_file(tensors | {"lm_head.weight": other}, tmp_path / "out" / SINGLE_NAME)
        assert "tie_word_embeddings" in refused(lambda: checkpoint.load(tmp_path / "out"))


def test_one_file_wins_over_an_index_as_in_transformers(folder):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "stale.safetensors"}}))
    expected = OlmoeForCausalLM.from_pretrained(folder)
    assert_same(dict(checkpoint.load(folder).named_parameters()), dict(expected.named_parameters()))


def test_shards_may_be_symbolic_links_as_in_the_hub_cache(sharded):
    expected = checkpoint.load(sharded).state_dict()
    for shard in list(sharded.glob("model-*.safetensors")):
        shard.rename(sharded.parent / f"blob-{shard.name}")
        shard.symlink_to(sharded.parent / f"blob-{shard.name}")
    assert_same(checkpoint.load(sharded).state_dict(), expected)


def test_progress_counts_every_tensor_once(sharded):
    seen: list[tuple[int, int]] = []
    checkpoint.load(sharded, progress=lambda done, total: seen.append((done, total)))
    total = len(json.loads((sharded / INDEX_NAME).read_text())["weight_map"])
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_shapes_are_those_of_the_network():
    for changes in STRUCTURES.values():
        config = small_config(**changes)
        with torch.device("meta"):
            model = CausalLM(config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert parameter_shapes(config) == shapes


# ---- peak memory ----

# In processes of their own, because a peak cannot be reset. The model is 121 MB in fp32.
MEMORY = """
import sys
import torch
from olmoe.weights import checkpoint, export
from olmoe.config import ModelConfig
from olmoe.errors import CheckpointError
from olmoe.model import CausalLM
from olmoe.runtime import peak_memory_bytes

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

config = ModelConfig(vocab_size=1024, hidden_size=512, intermediate_size=512, num_hidden_layers=4,
                     num_attention_heads=8, num_experts=8, num_experts_per_tok=2)
action, folder = sys.argv[1:]
checkpoint.load(folder + "/small")  # whatever is imported on first use
if action == "save":
    with torch.device("meta"):
        model = CausalLM(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    before = resident()
    export.save(model, folder + "/big", max_shard_bytes=30_000_000)
else:
    before = resident()
    model = checkpoint.load(folder + "/big", dtype=torch.bfloat16)
print(4 * config.num_parameters, peak_memory_bytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident sizes from /proc")
def test_peak_memory_of_loading_is_the_model_and_one_shard_and_of_saving_one_shard(tmp_path):
    export.save(random_model(), tmp_path / "small")

    def peak(action: str) -> tuple[int, int]:
        command = [sys.executable, "-c", MEMORY, action, str(tmp_path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        fp32, growth = map(int, output.split())
        return fp32, growth

    slack = 14e6
    fp32, growth = peak("save")
    assert 110e6 < fp32 < 130e6
    assert growth < 30e6 + slack
    shards = [path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")]
    assert len(shards) > 3
    fp32, growth = peak("load")
    assert fp32 / 2 < growth < fp32 / 2 + max(shards) + slack


def test_saved_files_follow_the_umask(tmp_path):
    previous = os.umask(0o022)
    try:
        export.save(make_model(), tmp_path / "model")
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "model").iterdir()} == {0o644}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o755


def test_loading_leaves_the_compilers_algebra_alone():
    """sympy takes a second to import, and torch's own way from meta tensors to memory needs it."""
    command = (
        "import sys; from olmoe.io.hub import SHIPPED; from olmoe.weights import checkpoint;"
        "checkpoint.load(SHIPPED); print('sympy' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert output == "False\n"


def test_only_files_of_a_save_are_replaced_unasked(tmp_path):
    target = tmp_path / "out"
    export.save(random_model(), target)
    (target / "notes.txt").write_text("mine")
    message = refused(lambda: export.save(random_model(num_hidden_layers=1), target))
    assert "notes.txt" in message
    assert "overwrite=True" in message
    model = random_model(num_hidden_layers=1)
    export.save(model, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    assert_same(checkpoint.load(target).state_dict(), model.state_dict())


@pytest.mark.parametrize("shards", [10**9, 30_000])
def test_a_tied_checkpoint_may_hold_the_head_alone(tmp_path, shards, capsys):
    """As some savers drop the embedding in place of the head."""
    model = random_model(tie_word_embeddings=True)
    export.save(model, tmp_path / "out", max_shard_bytes=shards)
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, file)
    index = tmp_path / "out" / INDEX_NAME
    if index.exists():
        index.write_text(index.read_text().replace("model.embed_tokens.weight", "lm_head.weight"))
    loaded = checkpoint.load(tmp_path / "out")
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    source = open_source(tmp_path / "out")
    assert torch.equal(source.read("model.embed_tokens.weight"), model.model.embed_tokens.weight)
    assert main(["info", str(tmp_path / "out"), "--json"]) == 0
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "m"), "--format", "int8", "--quiet"]) == 0
    weight = checkpoint.load(tmp_path / "m").model.embed_tokens.decode("weight", torch.float32)
    assert (weight - model.model.embed_tokens.weight).abs().max() < 0.05
    theirs_model = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(theirs_model.get_input_embeddings().weight, model.model.embed_tokens.weight)


def test_the_head_alone_is_not_enough_where_it_is_not_tied(tmp_path):
    export.save(random_model(), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / SINGLE_NAME)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "out" / SINGLE_NAME)
        message = refused(lambda: checkpoint.load(tmp_path / "out"))
        assert name in message
        assert ("tie_word_embeddings" in message) == (name == "lm_head.weight")


def test_a_tied_head_that_differs_is_refused_by_every_reader(tmp_path):
    export.save(random_model(tie_word_embeddings=True), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / SINGLE_NAME)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "out" / SINGLE_NAME)
    for read in (checkpoint.load, open_source):
        assert "tie_word_embeddings" in refused(lambda read=read: read(tmp_path / "out"))


# ---- a checkpoint that is open ----


def test_an_open_checkpoint_knows_its_headers_and_loads_what_load_does(tmp_path):
    for name, folder in (("plain", plain_folder(tmp_path / "p", **WHOLE)), ("packed", packed_folder(tmp_path / "q"))):
        opened, model = checkpoint.Checkpoint.open(folder), checkpoint.load(folder)
        assert (opened.folder, opened.config) == (folder, model.config)
        assert (opened.layout is not None) == (name == "packed")
        assert opened.num_bytes == (folder / "model.safetensors").stat().st_size
        loaded = dict(opened.load().named_parameters())
        assert loaded.keys() == dict(model.named_parameters()).keys()
        for parameter, value in model.named_parameters():
            assert torch.equal(loaded[parameter], value), parameter


@pytest.mark.parametrize("kind", [plain_folder, packed_folder])
def test_config_and_headers_are_read_once(tmp_path, monkeypatch, kind):
    folder = kind(tmp_path / "m", **WHOLE)
    opened = checkpoint.Checkpoint.open(folder)
    (folder / "config.json").unlink()
    for module, name in ((hf_folder, "read_headers"), (packed_file, "open_tensors")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the headers were read again"))
    assert opened.load().config == opened.config


def test_opening_says_what_is_wrong_with_headers(tmp_path):
    for kind in (plain_folder, packed_folder):
        folder = kind(tmp_path / kind.__name__, **WHOLE)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(CheckpointError):
            checkpoint.Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="There is no folder"):
        checkpoint.Checkpoint.open(tmp_path / "nowhere")
