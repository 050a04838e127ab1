"""Accounts for the blocks of the KV cache: who holds which, and which hold a prefix that others may share. No tensors.

A block is free, held by one or more sequences, or cached: nobody holds it, its content stays until its room is needed.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Tokens
from itertools import islice

import numpy as np


class BlockPool:
    """`blocks` blocks of `block_tokens` tokens each."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self._free = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._by_hash: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Blocks that nobody holds and whose content is known, the least recently used first."""
        self.evictions = 0
        """How often a cached content was given up for room."""

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def in_use(self) -> int:
        """Blocks that sequences hold."""
        return self.blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that may be found again."""
        return len(self._cached)

    def can_allocate(self, count: int) -> bool:
        return count <= self.available

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks of unknown content, held once; ask `can_allocate` before."""
        if not self.can_allocate(count):
            raise ValueError(f"{count} blocks wanted, {self.available} available")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_hash[self._hash_of.pop(block)]
            self.evictions += 1
        self._holders[block] = 1
        return block

    def match(self, hashes: Tokens[bytes]) -> list[int]:
        """Return the blocks that hold the longest known prefix of these; nobody holds them for it yet."""
        found = []
        for each in hashes:
            block = self._by_hash.get(each)
            if block is None:
                break
            found.append(block)
        return found

    def is_known(self, block_hash: bytes) -> bool:
        return block_hash in self._by_hash

    def hold(self, blocks: Tokens[int]) -> None:
        """Hold blocks that `match` found, once more each."""
        for block in blocks:
            self._holders[block] += 1
            self._cached.pop(block, None)

    def available_beside(self, blocks: Tokens[int]) -> int:
        """Return how many blocks could be allocated once these were held."""
        return self.available - sum(block in self._cached for block in blocks)

    def remember(self, block: int, block_hash: bytes) -> None:
        """Note what a held block contains; the first block with a content is the one that is found."""
        if block_hash not in self._by_hash and block not in self._hash_of:
            self._by_hash[block_hash] = block
            self._hash_of[block] = block_hash

    def release(self, blocks: Tokens[int]) -> None:
        """Give up one hold of each; the last blocks of a sequence are the first to lose their content."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hash_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def check_integrity(self, held: Tokens[Tokens[int]] = ()) -> None:
        """Raise AssertionError unless every block is free, cached or held as often as `held` (tables) says."""
        counts = [0] * self.blocks
        for table in held:
            for block in table:
                counts[block] += 1
        assert counts == self._holders, "holders do not add up"
        idle = set(self._free) | set(self._cached)
        assert len(idle) == len(self._free) + len(self._cached), "a block is idle twice"
        assert idle == {b for b, count in enumerate(counts) if count == 0}, "a block is lost or held while idle"
        assert {self._by_hash[h]: h for h in self._by_hash} == self._hash_of, "the index is wrong"


def block_hashes(tokens: Tokens[int], block_tokens: int, namespace: str, known: Tokens[bytes] = ()) -> list[bytes]:
    """Return a hash for every full block of `tokens`; equal hashes mean equal tokens from the start, and one namespace.

    `known` are those of the first blocks. SHA-256: a collision would show one user's prompt to another.
    """
    hashes = list(known)
    last = hashes[-1] if hashes else hashlib.sha256(namespace.encode()).digest()
    ids = iter(tokens)
    rest = np.fromiter(islice(ids, len(hashes) * block_tokens, None), np.int32)
    for start in range(0, len(rest) - block_tokens + 1, block_tokens):
        last = hashlib.sha256(last + rest[start : start + block_tokens].tobytes()).digest()
        hashes.append(last)
    return hashes
