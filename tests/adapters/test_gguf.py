"""A GGUF adapter: what is in the file, and what llama.cpp computes with it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

import llama_cpp_peer
from adapter_cases import random_adapter
from configurations import VOCAB_SIZE
from conftest import make_model
from gguf_files import save_folder
from olmoe import adapters
from olmoe.adapters.gguf import write_gguf_adapter
from olmoe.cli.main import main
from olmoe.model import causal_attend


def test_the_file_holds_both_factors_of_every_tensor(tmp_path):
    model = make_model()
    adapter = random_adapter(model.config)
    write_gguf_adapter(adapter, model.config, tmp_path / "a.gguf", "name")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 6.0
    tensors = {t.name: t.data for t in reader.tensors}
    a, b = adapter.factors["model.layers.1.mlp.experts.gate_up_proj"]
    for name, half in zip(("gate", "up"), b.chunk(2, dim=1), strict=True):
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{name}_exps.weight.lora_a"], a.numpy())
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{name}_exps.weight.lora_b"], half.numpy())
    assert len(tensors) == 2 * 2 * (4 + 3 + 1)


def test_ranks_that_differ_give_the_same_sum(tmp_path):
    """llama.cpp divides alpha by the rank of each pair of tensors, which an A each for gate and up doubles."""
    model = make_model()
    adapter = random_adapter(model.config, ("experts",))
    generator = torch.Generator().manual_seed(3)
    for name, (a, b) in adapter.factors.items():
        a, b = torch.cat((a, a), dim=1), torch.cat((b, torch.zeros_like(b).normal_(0, 0.3, generator=generator)), dim=2)
        adapter.factors[name] = adapters.Factors(a, b)
    write_gguf_adapter(adapter, model.config, tmp_path / "a.gguf", "name")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for parts, leaf in ((("gate", "up"), "gate_up"), (("down",), "down")):
        left, right = ([tensors[f"blk.0.ffn_{part}_exps.weight.lora_{f}"] for part in parts] for f in "ab")
        deltas = [b @ a * (adapter.alpha / b.shape[-1]) for a, b in zip(left, right, strict=True)]
        expected = adapter.delta(f"model.layers.0.mlp.experts.{leaf}_proj")
        torch.testing.assert_close(torch.cat(deltas, dim=1), expected)


@pytest.mark.skipif(not llama_cpp_peer.available(), reason="no binding of llama.cpp is installed")
def test_llama_cpp_applies_it(tmp_path, tokenizer_file):
    model = make_model(hidden_size=64, intermediate_size=32)
    base = save_folder(model, tmp_path / "base", tokenizer_file)
    adapter = random_adapter(model.config, ("attention", "experts"))
    (tmp_path / "adapter").mkdir()
    adapters.write_adapter(adapter, tmp_path / "adapter", str(base))
    assert main(["convert", str(base), str(tmp_path / "base.gguf"), "--type", "f32", "--quiet"]) == 0
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "a.gguf"), "--quiet"]) == 0
    ids = list(range(2, 14))

    def ours() -> np.ndarray:
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal_attend).hidden
        return model.logits(hidden[0, -1]).log_softmax(-1).detach().numpy()

    plain = ours()
    adapters.merge(model, adapter)
    theirs = llama_cpp_peer.open_model(tmp_path / "base.gguf", VOCAB_SIZE, tmp_path / "a.gguf").log_probs(ids)
    known = np.isfinite(theirs)
    assert known.sum() > VOCAB_SIZE // 2
    assert np.abs(plain - ours())[known].max() > 0.1
    np.testing.assert_allclose(theirs[known], ours()[known], atol=0.02)
