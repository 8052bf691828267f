"""Which marks of an overlay's map are not flushed yet, and what a flush makes of them.

The kernel writes pages back as it likes, so after a loss of power a mark may be
there whose data is not. Whoever cannot sync the data before it marks sets NEW
or OVER_ZERO, which a flush takes away once the data is on stable storage. While
the host runs they mean "here". In another boot they mean what was there before,
and are replaced by that at open. A boot's name never comes back, so it does not
matter what of this reaches the disk, nor in which order: at the next boot
whatever is still marked so is replaced again.

    begin           a flush names the marks of this moment
    data_flushed    their data is stable: they are for good, unless they have changed since
"""

from __future__ import annotations

from array import array
from collections import deque
from functools import partial

from tcmu_replication.block.map_file import MapFile
from tcmu_replication.block.map_format import NOWHERE, by_page, in_order
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error

STEP = 1 << 13
"""Marks that a flush looks at in one go: a millisecond or two, so that requests pass meanwhile."""

MANY = 1 << 20
"""So many marks (runs of blocks) that are not flushed are enough: each takes 16 bytes, and the next flush some time."""


class Unflushed:
    """Those of one map.

    `marks` are pairs: a block; its entry, and from bit 32 on how many blocks follow in the slots behind.
    `crowded` asks for a flush: there are MANY without one.
    """

    def __init__(self, file: MapFile, offload: Offload | None) -> None:
        """Of the map in `file`. With an Offload a long list is done in steps, and the loop's other work between."""
        self.marks = array("Q")
        self.crowded = False
        self._file = file
        self._entries = file.entries
        self._offload = offload
        self._batches: deque[array[int]] = deque()  # those that a flush was asked for
        self._ended_batches = 0

    def clear(self) -> None:
        """Forget what flushes were asked for: the map is closed."""
        self._batches.clear()

    def begin(self) -> int:
        """Name the marks that are not flushed yet; when their data is, `data_flushed` of the answer follows."""
        if self.marks:
            self._batches.append(self.marks)
            self.marks = array("Q")
            self.crowded = False
        return self._ended_batches + len(self._batches)

    def data_flushed(self, named: int) -> Pending | None:
        """The data of all marks that `begin` had `named` is on stable storage: they are for good.

        A mark that is not as it was is left alone, for it is of another flush. Long lists are done in steps.
        """
        if self._settle_some(named):
            return None
        settled = Pending()
        self._turn().then(partial(self._settle_more, named, settled))
        return settled

    def _turn(self) -> Pending:
        """There and back, behind what the loop has to do meanwhile."""
        assert self._offload is not None
        return self._offload(lambda: None, f"settle {self._file.path}")

    def _settle_more(self, named: int, settled: Pending, turn: Pending) -> None:
        """The next step. Not by recursion: there may be thousands."""
        error, pending = turn.error, None
        try:
            if error is None and not self._settle_some(named):
                pending = self._turn()
        except Error as met:
            error = met
        if pending is None:
            settled.complete(error)
        else:
            pending.then(partial(self._settle_more, named, settled))

    def _settle_some(self, named: int) -> bool:
        """One step, or without an Offload all of them. Whether all that was `named` is settled."""
        left = STEP
        if self._batches and self._batches[0]:
            self._file.touch(self._batches[0][-2])
        while self._batches and self._ended_batches < named:
            batch = self._batches[0]
            while batch and left > 0:
                run = batch.pop()
                left -= self._settle(batch.pop(), 1 + (run >> 32), run & 0xFFFFFFFF)
            if not batch:
                self._batches.popleft()
                self._ended_batches += 1
            elif self._offload is not None:
                return False
            else:
                left = STEP
        return True

    def _settle(self, first: int, count: int, entry: int) -> int:
        """These marks, unless they have changed, are for good. What it took, in marks looked at one by one."""
        if count == 1:
            if self._entries[first] == entry:
                self._entries[first] = entry & NOWHERE
            return 1
        for start, end in by_page(first, first + count):
            came = entry + start - first
            now = self._entries[start:end].tolist()
            if now == list(range(came, came + end - start)):
                self._entries[start:end] = in_order(came & NOWHERE, end - start)
            else:
                for block, found in enumerate(now, start):
                    if found == entry + block - first:
                        self._entries[block] = found & NOWHERE
        return 1 + count // 8
