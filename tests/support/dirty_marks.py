"""A dirty map in memory, with the interface of `block.bitmap.Bitmap`: the model of what one is."""

from __future__ import annotations

from collections.abc import Iterator

from tcmu_replication.units import BLOCK


class DirtyMarks:
    """The dirty blocks of a disk of `length` bytes, as a set. What is in it outlives the process of a test."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.blocks = -(-length // BLOCK)
        self.dirty: set[int] = set()

    @property
    def count(self) -> int:
        return len(self.dirty)

    @property
    def bytes(self) -> int:
        return sum(min(BLOCK, self.length - block * BLOCK) for block in self.dirty)

    def mark(self, first: int, last: int) -> None:
        assert 0 <= first <= last <= self.blocks
        self.dirty.update(range(first, last))

    def clear(self, first: int, last: int) -> None:
        assert 0 <= first <= last <= self.blocks
        self.dirty.difference_update(range(first, last))

    def test(self, block: int) -> bool:
        return block in self.dirty

    def runs(
        self, first: int = 0, last: int | None = None, *, longest: int | None = None
    ) -> Iterator[tuple[int, int]]:
        last = self.blocks if last is None else min(last, self.blocks)
        while first < last:
            if first not in self.dirty:
                first += 1
                continue
            end = first
            while end < last and end in self.dirty and (longest is None or end - first < longest):
                end += 1
            yield first, end
            first = end
