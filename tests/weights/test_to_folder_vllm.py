"""An exported checkpoint has what vLLM's OLMoE loads: every weight it has, under the name it looks for, and no other.

vLLM itself is not installed here: `vllm_names` says what it reads.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from configurations import small_config
from gguf_files import tiny_config, write_tiny
from olmoe.io.hub import SHIPPED
from olmoe.model import CausalLM, initialize
from olmoe.weights import export
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.quantize import pack
from olmoe.weights.recipes import RECIPES
from olmoe.weights.to_folder import ignored_by_vllm, to_folder
from vllm_names import check_for_vllm

# A transposed or misplaced matrix of another shape shows; widths are thus all different.
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}


def random_changes(seed: int) -> dict:
    """A random architecture that vLLM computes as we do; every other one has grouped heads, every third is tied."""
    pick = random.Random(seed)
    heads = pick.choice((2, 4, 8))
    experts = pick.choice((4, 6, 16))
    return WIDTHS | {
        "num_hidden_layers": pick.choice((1, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if seed % 2 else heads,
        "num_experts": experts,
        "num_experts_per_tok": pick.randint(1, experts),
        "tie_word_embeddings": seed % 3 == 0,
        "max_position_embeddings": pick.choice((64, 4096)),
    }


def saved(folder: Path, seed: int, tokenizer_file: Path, **changes) -> Path:
    model = CausalLM(small_config(**changes))
    initialize(model, seed)
    export.save(model, folder, dtype=torch.bfloat16)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("recipe", [None, "int4", "int4-high", "int8", "q4_0"])
def test_any_checkpoint_is_exported_as_vllm_reads_it(tmp_path, tokenizer_file, seed, recipe):
    changes = random_changes(seed)
    folder = saved(tmp_path / "model", seed, tokenizer_file, **changes)
    if recipe is not None:
        pack(open_source(folder), tmp_path / "packed", RECIPES[recipe])
        folder = tmp_path / "packed"
    source = open_source(folder)
    limit = 100_000 if seed % 2 else 10**9
    to_folder(source, tmp_path / "out", max_shard_bytes=limit)
    tensors = check_for_vllm(tmp_path / "out")
    assert len(list(tmp_path.glob("out/*.safetensors"))) == 1 or limit == 100_000
    # Each tensor holds the values of the part that its name says, as vLLM's fused parameters are filled from them.
    for n in range(changes["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        for e in (0, changes["num_experts"] - 1):
            expert = f"{layer}mlp.experts.{e}."
            gate_up = torch.cat((tensors[f"{expert}gate_proj.weight"], tensors[f"{expert}up_proj.weight"]))
            assert torch.equal(gate_up, source.read(f"{layer}mlp.experts.gate_up_proj", e).bfloat16())
            down = source.read(f"{layer}mlp.experts.down_proj", e).bfloat16()
            assert torch.equal(tensors[f"{expert}down_proj.weight"], down)
        q_norm = source.read(f"{layer}self_attn.q_norm.weight").bfloat16()
        assert torch.equal(tensors[f"{layer}self_attn.q_norm.weight"], q_norm)
    if changes["tie_word_embeddings"]:
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert ignored_by_vllm(source.config) == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_exported_as_vllm_reads_it(tmp_path, tied):
    to_folder(GGUFSource(write_tiny(tmp_path / "x.gguf", tiny_config(tie_word_embeddings=tied))), tmp_path / "out")
    check_for_vllm(tmp_path / "out")


def test_a_saved_model_is_what_vllm_reads_too(tmp_path, tokenizer_file):
    """`checkpoint.save` (training, the library) writes the same layout; only tied embeddings need `olmoe convert`."""
    check_for_vllm(saved(tmp_path / "model", 1, tokenizer_file, **random_changes(1)))


def test_tied_embeddings_need_the_export(tmp_path, tokenizer_file):
    folder = saved(tmp_path / "model", 0, tokenizer_file, **random_changes(0))
    with pytest.raises(AssertionError):
        check_for_vllm(folder)


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="the shipped checkpoint is not there")
def test_the_shipped_checkpoint_is_exported_as_vllm_reads_it(tmp_path):
    to_folder(open_source(SHIPPED), tmp_path / "out")
    check_for_vllm(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (SHIPPED / name).read_bytes()
