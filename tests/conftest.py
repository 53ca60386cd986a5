"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import functools
import gc
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
from olmoe.runtime import log, log_once
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
def state_of_the_process():
    """What a test changes in the process for good: commands set threads and log levels, which are set back.

    One that leaves what others need in another state fails, rather than all those after it.
    """
    threads, level = torch.get_num_threads(), log.level
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    log.setLevel(level)
    left = {
        "gradients off": not torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "garbage collection off": not gc.isenabled(),
        f"{torch.get_default_dtype()} as default": torch.get_default_dtype() != torch.float32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    gc.enable()
    assert not any(left.values()), f"this test left {[name for name, wrong in left.items() if wrong]}"


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
