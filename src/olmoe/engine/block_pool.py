"""Blocks of the cache: which sequences hold them, and which can be shared because of their contents. No torch.

A full block can be published under a hash of all tokens up to its end. It then serves every sequence that starts with
these, even after its last reader has left, until its memory is needed. Blocks are never copied, and only full ones are
shared, so nobody writes into a block that another sequence reads.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def next_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a block that holds these tokens and follows the block hashed `previous` (or the chain's root)."""
    return hashlib.sha256(previous + array("i", token_ids).tobytes()).digest()


class BlockPool:
    """A fixed number of blocks of `size` positions, each free or held by one or more sequences."""

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        # Oldest first: the sequence that left last is the likeliest to come back.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._holders = [0] * blocks
        self._hash_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds, published ones among them."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.blocks - len(self._free)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks published under these hashes, up to the first hash that has none."""
        found = []
        for each in hashes:
            block = self._block_of.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, blocks: Sequence[int]) -> None:
        """Let one more sequence hold these published blocks."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._free[block]
            self._holders[block] += 1

    def available(self, matched: Sequence[int]) -> int:
        """How many blocks `allocate` would find after `take(matched)`."""
        return len(self._free) - sum(self._holders[block] == 0 for block in matched)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one sequence, or None if there are fewer; they are no longer published."""
        if count > len(self._free):
            return None
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
            self._withdraw(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence releases its blocks, given in order. The last are reused first: early ones are shared more."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, block
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:  # no sequence can find it again
                    self._free.move_to_end(block, last=False)

    def publish(self, block: int, name: bytes) -> None:
        """Let others find a held, full block under its hash, unless another block already has that hash."""
        assert self._holders[block] > 0, block
        if name not in self._block_of and self._hash_of[block] is None:
            self._block_of[name], self._hash_of[block] = block, name

    def forget(self) -> None:
        """Unpublish every block: the weights have changed."""
        self._block_of.clear()
        self._hash_of = [None] * self.blocks

    def check(self) -> None:
        """Assert that the books balance."""
        assert len(self._free) == self._holders.count(0)
        assert all(self._holders[block] == 0 for block in self._free)
        assert all(self._hash_of[block] == name for name, block in self._block_of.items())
        assert sum(name is not None for name in self._hash_of) == len(self._block_of)

    def _withdraw(self, block: int) -> None:
        name = self._hash_of[block]
        if name is not None:
            del self._block_of[name]
            self._hash_of[block] = None
