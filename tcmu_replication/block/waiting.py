"""Requests of the copy-before-write that wait: for their old data, for earlier ones, for their batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error

Range = tuple[int, int]
"""Start and end of whole blocks, in bytes; the disk's end ends its last block."""


class Waiting:
    """A request that could not be carried out at once: its call, its end, and the blocks that it touches.

    `earlier` are those that came before, touch some of the same blocks, and
    waited when this was last looked at. `pieces` (offset, length) are what it
    saves now, `rest` what earlier ones see to. `under_way` counts its reads (and
    a turn to come), `stored` holds what has no mark yet: (offset, length, zero).
    `behind` are later requests to look at when this one is in a batch, or gone.
    """

    __slots__ = (
        "batch",
        "behind",
        "call",
        "earlier",
        "end",
        "error",
        "pieces",
        "promised",
        "rest",
        "start",
        "stored",
        "under_way",
    )

    def __init__(
        self, call: Callable[[], Pending | None], start: int, end: int, earlier: list[Waiting]
    ) -> None:
        self.call = call
        self.promised = Pending()
        self.start = start
        self.end = end
        self.earlier = earlier
        self.rest: list[Range] = [(start, end)]
        self.pieces: Iterator[tuple[int, int]] = iter(())
        self.under_way = 0
        self.stored: list[tuple[int, int, bool]] = []
        self.error: Error | None = None
        self.batch: Batch | None = None
        self.behind: list[Waiting] = []


class Batch:
    """Durable writes between two unplugs, and the pre-images that were stored for them."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, bool]] = []
        self.marked = False
        self.writes: list[Waiting] = []


def overlapping(waiting: Iterable[Waiting], start: int, end: int) -> list[Waiting]:
    """Those that touch a block of the range, in order."""
    return [other for other in waiting if other.start < end and start < other.end]


def split(ranges: list[Range], others: Iterable[Waiting]) -> tuple[list[Range], list[Range]]:
    """What of the ranges no other touches, and what some other does."""
    free: list[Range] = ranges
    taken: list[Range] = []
    for other in others:
        left: list[Range] = []
        for start, end in free:
            first, last = max(start, other.start), min(end, other.end)
            if first >= last:
                left.append((start, end))
                continue
            taken.append((first, last))
            left += [(at, to) for at, to in ((start, first), (last, end)) if at < to]
        free = left
    return free, taken
