"""Alone = batched = chunked = from the prefix cache = preempted, bit for bit, for every weight format."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from olmoe.engine.engine import Engine
from olmoe.engine.sampling_params import SamplingParams
from olmoe.ops.cpu import extension
from olmoe.runner import CpuRunner, position_bytes
from olmoe.weights import checkpoint
from packed_folders import WHOLE, packed_folder

pytestmark = pytest.mark.skipif(extension.unavailable() is not None, reason="torch adds in another order in batches")

PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = [*PLAIN, "int8", "int4", "q4_0"]  # int4 has embeddings and head in q5_0
SHAPES = {
    **WHOLE,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
# Two of them share two blocks, one is within a block, one ends with a block.
PROMPTS = [[5 + j % 90 for j in range(n)] for n in (130, 150, 7, 128)] + [[9 + j % 50 for j in range(40)]]
PARAMS = [
    SamplingParams(max_new_tokens=50, temperature=0.9 * (i % 2), seed=i, logprobs=3, ignore_eos=True) for i in range(5)
]


@pytest.fixture(scope="module", params=[(format, None) for format in FORMATS] + [("int4", torch.int8)], ids=str)
def engine_with(request, tokenizer, tmp_path_factory):
    format, cache_dtype = request.param
    if format in PLAIN:
        model = make_model(**SHAPES).to(PLAIN[format])
    else:
        model = checkpoint.load(packed_folder(tmp_path_factory.mktemp("packed") / format, format, **SHAPES))
    runner = CpuRunner(model)
    size = 64 * position_bytes(runner.config, cache_dtype or runner.cache_dtype)

    def make(blocks: int = 40, **options) -> Engine:
        return Engine(
            runner, tokenizer, context_length=512, cache_bytes=blocks * size, cache_dtype=cache_dtype, **options
        )

    return make


def texts(engine: Engine, together: bool) -> list:
    requests = [engine.request(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    for group in [requests] if together else [[request] for request in requests]:
        for request in group:
            engine.add(request)
        while engine.has_work:
            engine.step()
    return [(request.token_ids, request.logprobs, request.text) for request in requests]


def test_results_are_bit_identical_in_every_schedule(engine_with):
    alone = texts(engine_with(prefix_cache=False), together=False)
    assert all(len(ids) == 50 for ids, _, _ in alone)
    for budget in (63, 64, 65, 512):
        assert texts(engine_with(token_budget=budget, prefix_cache=False), together=True) == alone, budget
    cached = engine_with()
    for _ in range(2):
        assert texts(cached, together=True) == alone
        assert texts(cached, together=False) == alone
    assert cached.statistics().prefix_hits > 500
    small = engine_with(blocks=7)
    assert texts(small, together=True) == alone
    assert small.statistics().preemptions > 0
