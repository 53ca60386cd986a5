"""The block pool: who holds which blocks, and which cached blocks can be found again."""

from __future__ import annotations

import pytest

from olmoe.engine.block_pool import BlockPool, next_hash

NAMES = [bytes([i]) * 32 for i in range(10)]


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4, 64)
    held = pool.allocate(3)
    assert pool.allocate(2) is None
    assert (pool.free, pool.used) == (1, 3)
    pool.release(held)
    assert (pool.free, pool.used) == (4, 0)
    pool.check()


def test_published_blocks_are_found_up_to_the_first_gap():
    pool = BlockPool(6, 64)
    held = pool.allocate(4)
    for block, name in zip((held[0], held[1], held[3]), (NAMES[0], NAMES[1], NAMES[3]), strict=True):
        pool.publish(block, name)
    assert pool.match(NAMES[:4]) == held[:2]
    assert pool.match(NAMES[1:]) == [held[1]]
    assert pool.match([]) == []
    pool.check()


def test_blocks_are_shared_until_the_last_holder_leaves():
    pool = BlockPool(3, 64)
    held = pool.allocate(2)
    pool.publish(held[0], NAMES[0])
    pool.take(held[:1])
    pool.release(held)
    assert pool.used == 1
    assert pool.match(NAMES) == held[:1]
    pool.release(held[:1])
    assert pool.used == 0
    assert pool.match(NAMES) == held[:1]  # cached until its memory is needed
    assert pool.available(held[:1]) == 2
    pool.take(held[:1])
    assert pool.free == 2
    pool.check()


def test_eviction_takes_unpublished_blocks_first_then_ends_before_beginnings():
    pool = BlockPool(4, 64)
    held = pool.allocate(3)
    for block, name in zip(held, NAMES, strict=False):
        pool.publish(block, name)
    pool.release(held)
    other = pool.allocate(2)
    assert other[1] == held[2]
    assert pool.match(NAMES) == held[:2]
    pool.release(other)
    assert pool.match(NAMES) == held[:2]
    assert set(pool.allocate(2)) == set(other)
    pool.check()


def test_blocks_published_twice_are_found_once():
    pool = BlockPool(4, 64)
    one, two = pool.allocate(2)
    pool.publish(one, NAMES[0])
    pool.publish(two, NAMES[0])
    pool.release([one, two])
    pool.check()
    assert pool.match(NAMES) == [one]
    pool.forget()
    assert pool.match(NAMES) == []
    pool.check()


def test_a_hash_covers_all_preceding_tokens():
    first, other = next_hash(b"", [1, 2]), next_hash(b"", [2, 1])
    assert first != other
    assert next_hash(first, [3, 4]) != next_hash(other, [3, 4])
    assert next_hash(b"salt", [1, 2]) != first
    assert next_hash(b"", [1, 2]) == first


def test_releasing_a_block_twice_is_an_error():
    pool = BlockPool(2, 64)
    held = pool.allocate(1)
    pool.release(held)
    with pytest.raises(AssertionError):
        pool.release(held)
