"""A sequence's logits are the same bits alone, in any batch, for any split of its prompt, and any number of threads."""

from __future__ import annotations

import pytest
import torch

from conftest import make_model
from olmoe.runner import CpuRunner
from olmoe.weights import checkpoint
from packed_folders import WHOLE, packed_folder
from runner_calls import chunked, prompt, together

LENGTH = 130  # two blocks of keys and two positions of a third
SPLITS = [
    ([64, 66], "at the border of a block"),
    ([65, 65], "one query left in a block"),
    ([129, 1], "one query at the end"),
    ([1, 129], "one query at the start"),
    ([63, 64, 3], "across borders"),
    ([43, 43, 44], "inside blocks"),
    ([1] * LENGTH, "as decoding does"),
]
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# int4 has q5_0 ends.
FORMATS = (*PLAIN, "int8", "int4", "q4_0")
# What the runner holds its keys and values in, where that is not its own choice.
INT8_CACHE = ", int8 cache"
RUNNERS = (*FORMATS, *(f"{format}{INT8_CACHE}" for format in ("fp32", "bf16", "int4")))
# As wide as rows have to be for every kind of tile, with heads of whole vectors and a rest, and few KV heads.
SHAPES = {**WHOLE, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def model_in(format, folder):
    if format in PLAIN:
        return make_model(**SHAPES).to(PLAIN[format])
    return checkpoint.load(packed_folder(folder / format, format, **SHAPES))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {format: model_in(format, folder) for format in FORMATS}


def runner_of(models, name):
    runner = CpuRunner(models[name.removesuffix(INT8_CACHE)])
    if name.endswith(INT8_CACHE):
        runner.cache_dtype = torch.int8
    return runner


def poison(cache):
    """Fill all places, so that reading one that was never written shows."""
    for t in (*cache.keys, *cache.values):
        t.fill_(77 if t.dtype == torch.int8 else float("nan"))
    for t in (*cache.key_scales, *cache.value_scales):
        t.fill_(float("nan"))


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize(("sizes", "reason"), SPLITS, ids=[reason for _, reason in SPLITS])
def test_any_split_of_a_prompt(models, name, sizes, reason, isa, set_threads):
    runner, ids = runner_of(models, name), prompt(LENGTH)
    set_threads(1)
    whole = chunked(runner, ids, [LENGTH])
    set_threads(3)
    assert torch.equal(chunked(runner, ids, sizes), whole), reason


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("count", [2, 3, 5, 8, 9, 16, 17, 33, 64, 65])
def test_any_batch(models, name, count, isa, set_threads):
    runner, ids = runner_of(models, name), prompt(40)
    set_threads(1)
    alone = together(runner, [ids])
    set_threads(2)
    others = [prompt(20 + n % 7, seed=n) for n in range(1, count)]
    for ours, theirs in zip(together(runner, [*others, ids]), alone, strict=True):
        assert torch.equal(ours[-1], theirs[0])


@pytest.mark.parametrize("name", RUNNERS)
def test_prompts_and_steps_in_one_call(models, name, isa):
    """A chunk of one prompt beside a step of another sequence, as a scheduler mixes them."""
    from olmoe.runner import Batch, CacheView, Want
    from runner_calls import tables

    runner, first, second = runner_of(models, name), prompt(70), prompt(90, seed=1)
    cache = runner.new_cache(2, 96, block_size=64)
    view = CacheView(cache, tables(cache, 2))
    runner.forward(Batch([*first[:69], *second[:20]], [69, 20], [0, 0], [70, 90]), view, Want([]))
    mixed = runner.forward(Batch([first[69], *second[20:]], [1, 70], [69, 20]), view, Want([0, 70])).logits
    assert torch.equal(mixed[0], chunked(runner, first, [70]))
    assert torch.equal(mixed[1], chunked(runner, second, [90]))


@pytest.mark.parametrize("name", ["int4", f"int4{INT8_CACHE}"])
def test_free_blocks_are_never_read(models, name, isa):
    """What lies in blocks of nobody, and behind the last position of a sequence, may be anything."""
    from olmoe.runner import Batch, CacheView, Want

    runner, ids = runner_of(models, name), prompt(100)
    expected = chunked(runner, ids, [100])
    cache = runner.new_cache(4, 128, block_size=64)
    poison(cache)
    import numpy as np

    view = CacheView(cache, np.array([[5, 2]], dtype=np.int32))
    runner.forward(Batch(ids[:99], [99], [0], [100]), view, Want([]))
    assert torch.equal(runner.forward(Batch(ids[99:], [1], [99]), view, Want([0])).logits[0], expected)


@pytest.mark.parametrize("name", ["int4", f"int4{INT8_CACHE}"])
@pytest.mark.parametrize("block_size", [None, 128, 192])
def test_the_size_of_blocks_changes_no_bit(models, name, block_size, isa):
    import numpy as np

    from olmoe.runner import Batch, CacheView, Want

    runner, ids = runner_of(models, name), prompt(150)
    cache = runner.new_cache(1, 150, block_size=block_size)
    view = CacheView(cache, np.arange(cache.blocks, dtype=np.int32)[None])
    runner.forward(Batch(ids[:70], [70], [0], [150]), view, Want([]))
    last = runner.forward(Batch(ids[70:], [80], [70], [150]), view, Want([79])).logits[0]
    assert torch.equal(last, chunked(runner, ids, [150]))
