"""Fixtures shared by all tests. Nothing here reaches the network."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from configurations import VOCAB_SIZE, small_config
from olmoe.model import CausalLM, initialize
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
