"""llama.cpp runs our files and gives our numbers; we read the blocks that its quantizers make.

Distances are Kullback-Leibler divergences of the next-token distribution, ours against llama.cpp's, on the very same
weights (those of the file, decoded). What is left is how llama.cpp rounds activations: not at all for fp32 matrices
(but its attention works in fp16 where it can), to fp16 or bf16 for theirs, and to int8 for quantized ones, which now
and then changes the choice of an expert.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import llama_cpp_peer
from configurations import CASES, VOCAB_SIZE, small_config
from conftest import make_model
from gguf_files import save_folder
from olmoe.engine.llm import LLM
from olmoe.engine.sampling_params import SamplingParams
from olmoe.io import hub
from olmoe.model import CausalLM, causal_attend
from olmoe.tokenizer import Tokenizer
from olmoe.weights import checkpoint
from olmoe.weights.gguf import metadata as keys
from olmoe.weights.gguf.block_types import BY_NAME
from olmoe.weights.gguf.encode import encode
from olmoe.weights.gguf.names import tensor_shapes
from olmoe.weights.gguf.source import GGUFSource
from olmoe.weights.gguf.to_gguf import to_gguf
from olmoe.weights.gguf.tokenizer import to_metadata
from olmoe.weights.gguf.writer import PlannedTensor, write
from olmoe.weights.to_folder import to_folder

pytestmark = [
    pytest.mark.skipif(not llama_cpp_peer.available(), reason="no llama.cpp here: pip install xllamacpp"),
    pytest.mark.skipif(not hub.SHIPPED.is_dir(), reason="the shipped checkpoint is not there"),
]

PROMPTS = ["Once upon a time", "The dog said", "“Well,” replied the old man, café"]
# Largest divergence over all positions, several times what was measured (2e-6, 4e-6, 6e-5, 8e-3, 1.1e-2).
LIMITS = {"f32": 3e-5, "f16": 3e-5, "bf16": 4e-4, "q8_0": 4e-2, "q4_0": 4e-2}
EXACT = ("f32", "f16", "bf16")
NEW_TOKENS = 16


@torch.inference_mode()
def our_log_probs(model: CausalLM, ids: list[int]) -> np.ndarray:
    """(T, V) of a sequence."""
    hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal_attend).hidden
    return model.logits(hidden)[0].log_softmax(-1).numpy()


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert not np.isnan(theirs).any()
    return float((np.exp(ours) * (ours - theirs)).sum())


def model_of(path: Path, folder: Path) -> CausalLM:
    """The weights of a GGUF file in fp32."""
    to_folder(GGUFSource(path), folder, torch.float32)
    return checkpoint.load(folder)


@pytest.fixture(scope="module", params=LIMITS)
def exported(request, tmp_path_factory):
    """Type, file, llama.cpp's model of it and ours."""
    folder = tmp_path_factory.mktemp(request.param)
    to_gguf(hub.SHIPPED, folder / "tiny.gguf", request.param)
    ours = model_of(folder / "tiny.gguf", folder / "model")
    theirs = llama_cpp_peer.open_model(folder / "tiny.gguf", ours.config.vocab_size)
    return request.param, folder, theirs, ours


def test_logits(exported):
    name, folder, theirs, ours = exported
    tokenizer = Tokenizer.from_folder(folder / "model", eos_ids=ours.config.eos_token_ids)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        for _ in range(NEW_TOKENS // 2):
            log_probs = our_log_probs(ours, ids)[-1]
            assert divergence(log_probs, theirs.log_probs(ids)) < LIMITS[name]
            ids.append(int(log_probs.argmax()))


def test_greedy_text(exported):
    name, folder, theirs, _ = exported
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    same = 0
    for prompt in PROMPTS:
        # The checkpoint itself: its bf16 weights are exact in these three types.
        llm = LLM(hub.SHIPPED if name in EXACT else folder / "model", dtype="float32", device="cpu")
        text = llm.generate(prompt, params)[0].text
        same += text == theirs.generate(llm.tokenizer.encode(prompt), NEW_TOKENS)
    # int8 activations may turn a near tie, after which texts part.
    assert same >= (len(PROMPTS) if name in EXACT else 1)


def test_token_ids(tmp_path):
    to_gguf(hub.SHIPPED, tmp_path / "tiny.gguf", "q4_0")
    theirs = llama_cpp_peer.open_model(tmp_path / "tiny.gguf", 4096)
    tokenizer = Tokenizer.from_folder(hub.SHIPPED)
    texts = [
        *PROMPTS,
        "I didn't know; we'd 12345 things, 3.14 of them!\n\n  \tindented        far",
        "<|endoftext|>x<|padding|> |||IP_ADDRESS||| a|||EMAIL_ADDRESS|||",
        "日本語 한국어 العربية 😀👩‍👩‍👧 naïve",
        "".join(" " * n + "x\n" for n in range(30)),
        "\r\n \u00a0 \u2028 trailing   ",
    ]
    assert [theirs.tokenize(text) for text in texts] == [tokenizer.encode(text) for text in texts]


SWITCHES = ("released", "tied", "linear_rope", "top_1", "top_all", "odd_expert_width", "theta")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in SWITCHES], ids=lambda c: c.name)
def test_every_switch_that_can_be_written_means_the_same(case, tmp_path, tokenizer_file):
    model = make_model(**case.changes)
    folder = save_folder(model, tmp_path / "model", tokenizer_file)
    to_gguf(folder, tmp_path / "x.gguf", "f32")
    theirs = llama_cpp_peer.open_model(tmp_path / "x.gguf", VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    for length in (1, 7, 60):
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        # Logits of these wide random weights reach 10; the worst difference was 0.015.
        np.testing.assert_allclose(our_log_probs(model, ids)[-1], theirs.log_probs(ids), atol=0.05)


FOREIGN = ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


@pytest.mark.skipif(not llama_cpp_peer.has_ggml(), reason="no llama.cpp whose ggml can be called: install xllamacpp")
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_with_blocks_of_ggmls_quantizers(kind, tmp_path, tokenizer_file):
    """llama.cpp computes on the blocks, we on the values that we decode from them."""
    config = small_config(hidden_size=256, intermediate_size=256, num_experts=4, initializer_range=0.02)
    generator = torch.Generator().manual_seed(0)
    planned, data = [], []
    for name, shape in tensor_shapes(config).items():
        weights = torch.randn(shape, generator=generator) * 0.06
        if len(shape) == 1:
            weights = 1 + weights
        plain = len(shape) == 1 or "ffn_gate_inp" in name
        planned.append(PlannedTensor(name, shape, BY_NAME["F32" if plain else kind]))
        if plain:
            data.append(encode(name, weights, BY_NAME["F32"]))
        else:
            data.append(llama_cpp_peer.ggml_quantize(kind, weights.reshape(-1, shape[-1]).numpy()))
    vocabulary = to_metadata(tokenizer_file.read_text(encoding="utf-8"), VOCAB_SIZE)
    metadata = {"general.architecture": "olmoe", **keys.to_metadata(config), **vocabulary}
    write(tmp_path / "x.gguf", metadata, planned, data)
    ours = model_of(tmp_path / "x.gguf", tmp_path / "model")
    theirs = llama_cpp_peer.open_model(tmp_path / "x.gguf", VOCAB_SIZE)
    for length in (1, 7, 60):
        ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
        log_probs = our_log_probs(ours, ids)[-1]
        assert log_probs.std() > 0.5  # or any two distributions would be close
        assert divergence(log_probs, theirs.log_probs(ids)) < 2e-2
