"""Which blocks an overlay holds, and in which slots: looking it up, marking, and counting what is marked.

    map_format      what an entry means
    map_file        the file, mapped
    unflushed       marks that a loss of power takes back, until a flush

Everything costs what was marked, and not what the disk could hold.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence

from tcmu_replication.block import unflushed
from tcmu_replication.block.map_file import MapFile
from tcmu_replication.block.map_format import (
    ABSENT,
    ENTRY,
    HERE,
    NEW,
    NOWHERE,
    OVER_ZERO,
    PER_PAGE,
    RUNS,
    UNFLUSHED,
    ZERO,
    ZERO_FLAG,
    by_page,
    in_order,
    over,
    pages_of,
    refused,
    states_of,
)
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.reserve import Reserve
from tcmu_replication.block.unflushed import Unflushed
from tcmu_replication.errors import Error
from tcmu_replication.units import blocks_of

_ENTRY = struct.Struct("=I")
_SAFE = b"\1"


class AllocationMap:
    """The map of one overlay, open and locked. Blocks are numbered; ranges of them are half-open.

    `here` and `zero` count the blocks in these states. `slots` is what was in use when it was opened:
    slots from there on are nobody's. `unflushed` are the marks that are not flushed yet, `file` is where they lie.
    """

    def __init__(
        self, path: str, length: int, offload: Offload | None = None, reserve: Reserve | None = None
    ) -> None:
        """Open the map of a disk of `length` bytes. Raises `Error` BAD_CONFIG if it is not that.

        Marks that were not flushed in an earlier boot are undone. `reserve` is what it leaves of the filesystem.
        """
        self.path = path
        self.here = 0
        self.zero = 0
        self.slots = 0
        self.file = MapFile(path, length, offload, reserve)
        self._entries, self._safe = self.file.entries, self.file.safe
        self.unflushed = Unflushed(self.file, offload)
        try:
            self._count()
            if any(self.marked(blocks_of(length), len(self._entries))):
                raise refused(path, "marks blocks beyond the end of the disk")
            self.file.take_into_this_boot()
        except Error:
            self.close()
            raise

    def entry(self, block: int) -> int:
        """What the file says of a block; see the module."""
        return self._entries[block] if self._safe[block // PER_PAGE] else 0

    def entries(self, first: int, last: int) -> list[int]:
        """The entries of the range."""
        if first // PER_PAGE == (last - 1) // PER_PAGE:
            return (
                self._entries[first:last].tolist() if self._safe[first // PER_PAGE] else [0] * (last - first)
            )
        return [entry for start, end in by_page(first, last) for entry in self.entries(start, end)]

    def state(self, block: int) -> int:
        """ABSENT, HERE or ZERO."""
        entry = self.entry(block)
        return (HERE if entry < ZERO_FLAG else ZERO) if entry else ABSENT

    def states(self, first: int, last: int) -> bytes:
        """A byte per block of the range: its state."""
        if first // PER_PAGE != (last - 1) // PER_PAGE:
            return b"".join(self.states(start, end) for start, end in by_page(first, last))
        if not self._safe[first // PER_PAGE]:
            return bytes(last - first)
        return states_of(self.file.content(first, last))

    def any(self, first: int, last: int) -> bool:
        """Whether a block of the range is HERE or ZERO."""
        return next(self.marked(first, last), None) is not None

    def all(self, first: int, last: int) -> bool:
        """Whether every block of the range is HERE or ZERO."""
        return all(
            self._safe[start // PER_PAGE] and 0 not in self._entries[start:end].tolist()
            for start, end in by_page(first, last)
        )

    def runs(self, first: int, last: int) -> Sequence[tuple[int, int, int]]:
        """The range as (first, last, state) runs, none longer than a page of the map."""
        if first // PER_PAGE == (last - 1) // PER_PAGE:
            states = self.states(first, last)
            state = states[0]
            if states.count(state) == last - first:  # by far the most usual: all alike
                return ((first, last, state),)
        found = []
        for start, end in by_page(first, last):
            states = self.states(start, end)
            for run in RUNS.finditer(states):
                found.append((start + run.start(), start + run.end(), states[run.start()]))
        return found

    def marked(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """As `runs`, without the absent ones; what is marked or unmarked behind it does not disturb it."""
        while first < last:
            page = self._safe.find(_SAFE, first // PER_PAGE, pages_of(last))
            if page < 0:
                return
            first = max(first, page * PER_PAGE)
            end = min(last, (page + 1) * PER_PAGE)
            for run in self.runs(first, end):
                if run[2] != ABSENT:
                    yield run
            first = end

    def next_page(self, first: int) -> int:
        """The first page of the map, from block `first`'s on, where something may be marked; -1 if none."""
        return self._safe.find(_SAFE, first // PER_PAGE)

    def prepare(self, first: int, last: int) -> None:
        """Make sure that marks in the range find space. Raises `Error` (NO_SPACE)."""
        if last - first == 1 and self._safe[first // PER_PAGE]:
            return
        self.file.prepare(first, last)

    def assign(self, first: int, last: int, entry: int) -> None:
        """The range is here; the first block's entry is `entry`, and the others lie in the slots behind its.

        Raises `Error` (NO_SPACE); never after `prepare`.
        """
        if last - first == 1 and self._safe[first // PER_PAGE]:
            before = self._entries[first]
            self._entries[first] = entry
            if not before:
                self.here += 1
            elif before >= ZERO_FLAG:
                self.here += 1
                self.zero -= 1
        else:
            for start, end in by_page(first, last):
                self.prepare(start, end)
                self._uncount(start, end)
                self._entries[start:end] = in_order(entry + start - first, end - start)
                self.here += end - start
        if entry >= NEW:
            marks = self.unflushed.marks
            marks.append(first)
            marks.append(entry if last - first == 1 else entry + (last - first - 1 << 32))
            if len(marks) >= 2 * unflushed.MANY:
                self.unflushed.crowded = True

    def mark(self, first: int, last: int, state: int) -> None:
        """Set the range's state, HERE without a place. Raises `Error` (NO_SPACE); never after `prepare`."""
        if state == ZERO and last - first == 1 and self._safe[first // PER_PAGE]:
            entry = self._entries[first]
            self.file.write(first, _ENTRY.pack(entry | ZERO_FLAG))
            if entry < ZERO_FLAG:
                self.zero += 1
                self.here -= entry != 0
            return
        for start, end in by_page(first, last):
            if not self._safe[start // PER_PAGE]:
                if state == ABSENT:
                    continue
                self.prepare(start, end)
            count = end - start
            if state == ZERO:
                entries = [entry | ZERO_FLAG for entry in self._entries[start:end].tolist()]
            else:
                entries = [NOWHERE if state == HERE else 0] * count
            before = self.states(start, end)
            self.file.write(start, array("I", entries).tobytes())
            self.here += (count if state == HERE else 0) - before.count(HERE)
            self.zero += (count if state == ZERO else 0) - before.count(ZERO)

    def touch(self, block: int) -> None:
        """Wait here, if at all, for a file system that hangs, and not in the `assign` that follows."""
        self.file.touch(block)

    def flush(self) -> Pending | None:
        """As `Node.flush`: every mark made before the call. fdatasync covers stores through the mapping."""
        return self.file.node.flush()

    def tell_lost(self, told: Callable[[Error], None]) -> None:
        """Tell `told`, once, when a sync of the map has failed."""
        self.file.node.on_lost = told

    def close(self, *, empty: bool = False) -> None:
        """Unmap and unlock; `empty` the file first if it is about to be removed. Twice is fine."""
        self.unflushed.clear()
        self.file.close(empty=empty)

    def _uncount(self, first: int, last: int) -> None:
        """The range, in one page of the map, is about to get other states."""
        before = self.states(first, last)
        self.here -= before.count(HERE)
        self.zero -= before.count(ZERO)

    def _count(self) -> None:
        """Find the marked pages, and count."""
        for page, content in self.file.pages():
            if UNFLUSHED.search(content[ENTRY - 1 :: ENTRY]):
                content = self._take_up(page, content)
            states = states_of(content)
            here, zero = states.count(HERE), states.count(ZERO)
            if here or zero:
                self._safe[page] = 1
                self.here += here
                self.zero += zero
                places = {entry & NOWHERE for entry in memoryview(content).cast("I")} - {NOWHERE}
                self.slots = max((self.slots, *places))

    def _take_up(self, page: int, content: bytes) -> bytes:
        """A page with marks that were not flushed, as it is from now on: of this boot, or of another."""
        entries = memoryview(content).cast("I").tolist()
        found = [(at, entry) for at, entry in enumerate(entries) if NEW <= entry < ZERO_FLAG]
        if self.file.of_this_boot:
            for at, entry in found:
                if not entry & NOWHERE:
                    raise refused(self.path, "marks blocks without a slot")
                self.unflushed.marks.extend((page * PER_PAGE + at, entry))
            return content
        for at, entry in found:
            entries[at] = 0 if entry < OVER_ZERO else entry | ZERO_FLAG
        before = array("I", entries).tobytes()
        self.file.rewrite(page, before)
        return before


def merged(
    upper: AllocationMap, lower: AllocationMap, first: int, last: int
) -> Iterator[tuple[int, int, int]]:
    """As `AllocationMap.marked`, of two maps: a block that `upper` does not have is as in `lower`."""
    while first < last:
        found = [page for page in (upper.next_page(first), lower.next_page(first)) if page >= 0]
        first = max(first, min(found) * PER_PAGE) if found else last
        end = min(last, (first // PER_PAGE + 1) * PER_PAGE)
        if first < end:
            states = over(upper.states(first, end), lower.states(first, end))
            for run in RUNS.finditer(states):
                if states[run.start()] != ABSENT:
                    yield first + run.start(), first + run.end(), states[run.start()]
        first = end
