"""Slots: where the blocks of an overlay lie in its data file, one behind the other in the order in which they came.

A block keeps its slot for as long as the overlay lives. Slots are only ever taken
at the end, or again where one was taken and never named by a mark.
"""

from __future__ import annotations

from tcmu_replication.block.map_format import MAX_SLOTS, NOWHERE, ZERO_FLAG
from tcmu_replication.block.reserve import Reserve
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, blocks_of, format_size

Run = tuple[int, int, int]
"""(offset, length, entry of its first block): all absent, all zero, or here in adjacent slots."""


class Slots:
    """Those of one data file. From `tail` on they are free.

    A range that was stored and is not marked yet is kept by `keep` until `claim`; `unmarked` counts its blocks.
    """

    def __init__(self, overlay: str, tail: int, reserve: Reserve | None) -> None:
        """`overlay` is what errors call it, `reserve` what it leaves of the filesystem."""
        self.tail = tail
        self.unmarked = 0
        self._overlay = overlay
        self._reserve = reserve
        self._free: set[int] = set()  # below the tail, and no mark has ever named them
        self._stored: dict[tuple[int, int], list[int]] = {}

    def take(self, count: int) -> int:
        """So many adjacent slots: the first. Raises `Error` NO_SPACE."""
        if count == 1 and self._free:
            return self._free.pop()
        slot = self.tail
        if slot + count > MAX_SLOTS:
            raise Error(
                Kind.NO_SPACE,
                f"{self._overlay} holds the {format_size(MAX_SLOTS * BLOCK)} "
                "that an overlay can hold; make a checkpoint",
            )
        if self._reserve is not None:
            self._reserve.take(count * BLOCK)
        self.tail += count
        return slot

    def give_back(self, slot: int, count: int) -> None:
        """Slots that were taken and that no mark has ever named."""
        self._free.update(range(slot, slot + count))
        while self.tail - 1 in self._free:  # in whatever order they come back: others may want several
            self.tail -= 1
            self._free.remove(self.tail)

    def keep(self, offset: int, length: int, slot: int) -> None:
        """The range was stored from `slot` on."""
        self._stored.setdefault((offset, length), []).append(slot)
        self.unmarked += blocks_of(length)

    def keeps(self, offset: int, length: int) -> bool:
        """Whether the range was stored, and nobody has claimed it."""
        return (offset, length) in self._stored

    def claim(self, offset: int, length: int) -> int:
        """Where a range was stored; it is not counted as stored any more."""
        slots = self._stored[offset, length]
        slot = slots.pop()
        if not slots:
            del self._stored[offset, length]
        self.unmarked -= blocks_of(length)
        return slot


def runs_of(offset: int, length: int, entries: list[int]) -> list[Run]:
    """The range, whose blocks have these entries, as runs that are read in one piece."""
    end = offset + length
    first = offset // BLOCK
    found = []
    at = 0
    while at < len(entries):
        entry, behind = entries[at], at + 1
        if 0 < entry < ZERO_FLAG:
            while behind < len(entries) and entries[behind] == entry + behind - at:
                behind += 1
        else:
            zero = entry != 0
            while behind < len(entries) and (entries[behind] >= ZERO_FLAG if zero else not entries[behind]):
                behind += 1
        start = max(offset, (first + at) * BLOCK)
        found.append((start, min(end, (first + behind) * BLOCK) - start, entry))
        at = behind
    return found


def slot_of_all(entries: list[int]) -> int | None:
    """The slot of the first, if all are here in adjacent slots."""
    first, count = entries[0], len(entries)
    if 0 < first < ZERO_FLAG and entries[-1] == first + count - 1:
        return (first & NOWHERE) - 1 if entries == list(range(first, first + count)) else None
    return None


def adjacent(slots: list[int]) -> list[tuple[int, int]]:
    """The list's stretches of ascending neighbours: (at, behind)."""
    found = []
    at = 0
    for behind in range(1, len(slots) + 1):
        if behind == len(slots) or slots[behind] != slots[behind - 1] + 1:
            found.append((at, behind))
            at = behind
    return found


def position(offset: int, entry: int) -> int:
    """Where in the data file a block's byte at `offset` of the disk lies."""
    return ((entry & NOWHERE) - 1) * BLOCK + offset % BLOCK
