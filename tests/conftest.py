"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import functools
import gzip
import importlib
import math
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import checkout  # noqa: F401  (first: it refuses the code of another checkout)
from configurations import VOCAB_SIZE, small_config
from olmoe.model import CausalLM, initialize
from olmoe.ops.cpu import extension
from olmoe.runtime import log_once
from olmoe.tokenizer import Tokenizer
from olmoe.train.vocabulary import train_vocabulary

TEXT = (
    "Once upon a time there was a little girl. She had a red ball and a big dog. The dog ran to the ball.\n"
    "One day the girl and the dog went to the park. They were very happy. The end.\n"
) * 8


def make_model(seed: int = 0, **changes) -> CausalLM:
    """A small random model in fp32; `changes` are those of `small_config`."""
    model = CausalLM(small_config(**changes))
    initialize(model, seed)
    return model.eval()


@pytest.fixture(autouse=True)
def gradients():
    """A test that leaves torch without gradients fails, rather than all those after it."""
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert not left_off, "this test left torch's gradients off"
    assert not torch.is_inference_mode_enabled(), "this test left torch in inference mode"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level `tokenizer.json` of VOCAB_SIZE ids with OLMoE's conventions."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_vocabulary([TEXT], VOCAB_SIZE, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file, eos_ids=(VOCAB_SIZE - 1,), pad_id=1)


@pytest.fixture(scope="session")
def olmoe_tokenizer_file(tmp_path_factory) -> Path:
    """The released OLMoE tokenizer (tests/data/README.md)."""
    packed = Path(__file__).parent / "data" / "olmoe-tokenizer.json.gz"
    path = tmp_path_factory.mktemp("olmoe") / "tokenizer.json"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


@pytest.fixture
def poisoned(monkeypatch):
    """`torch.empty` gives NaN, so that an output which a kernel does not write shows."""
    with torch.device("meta"):
        torch.empty(1)  # here torch remembers, for good, what makes tensors: let it not remember the one below
    empty = torch.empty

    def poison(*shape, **options):
        t = empty(*shape, **options)
        return t.fill_(math.nan) if t.is_floating_point() else t.fill_(77)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def absent(monkeypatch):
    """As on a machine where the kernels were not compiled."""
    monkeypatch.setattr(extension, "_load", functools.cache(extension._load.__wrapped__))
    monkeypatch.setitem(sys.modules, "olmoe.ops.cpu._kernels", None)
    monkeypatch.delattr(importlib.import_module("olmoe.ops.cpu"), "_kernels", raising=False)
    log_once.cache_clear()
