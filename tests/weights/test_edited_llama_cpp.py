"""llama.cpp runs edited checkpoints that were written as GGUF, and gives our numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llama_cpp_peer
from edited_models import edited_folder
from olmoe.io import hub
from olmoe.model import causal_attend
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint
from olmoe.weights.blueprint import Blueprint
from olmoe.weights.checkpoint import open_source
from olmoe.weights.gguf.to_gguf import to_gguf

pytestmark = [
    pytest.mark.skipif(not llama_cpp_peer.available(), reason="no llama.cpp here: pip install xllamacpp"),
    pytest.mark.skipif(not hub.SHIPPED.is_dir(), reason="the shipped checkpoint is not there"),
]

LIMIT = 3e-5  # of the divergence in fp32, as for the models that were not edited


def edits(start: Blueprint) -> dict[str, Blueprint]:
    odd, backwards = [list(range(1, 64, 2))] * 4, [list(range(63, -1, -1))] * 4
    return {
        "pruned": start.without(odd),
        "merged": start.merged([[[0, 1, 2], [5, 9]]] * 4, [[1.0] * 64] * 4),
        "reordered": start.reordered(backwards),
        "duplicated": start.with_copies([1, 2]),
        "top_k": start.with_routing(3),
    }


@pytest.mark.parametrize("kind", ["pruned", "merged", "reordered", "duplicated", "top_k"])
def test_logits(kind, tmp_path):
    start = Blueprint.unchanged(open_source(hub.SHIPPED).config)
    out = edited_folder(hub.SHIPPED, tmp_path / "out", edits(start)[kind])
    to_gguf(out, tmp_path / "out.gguf", "f32")
    model = checkpoint.load(out, dtype=torch.float32)
    theirs = llama_cpp_peer.open_model(tmp_path / "out.gguf", model.config.vocab_size)
    ids = Tokenizer.from_folder(out).encode("Once upon a time there was a little girl")
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal_attend).hidden
        ours = model.logits(hidden)[0].log_softmax(-1).numpy()
    for length in (3, len(ids)):
        log_p, log_q = ours[length - 1], theirs.log_probs(ids[:length])
        assert float((np.exp(log_p) * (log_p - log_q)).sum()) < LIMIT
