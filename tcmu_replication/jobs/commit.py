"""The commit: after a failover to the checkpoint, active and hidden are copied to the disk.

At every moment the chain (active over hidden over disk) reads the same: a block
is copied to the disk, the disk is synced, and only then the block is forgotten,
in hidden first and in active after it. So a commit that dies anywhere is simply
done again from what is left.

While it runs, requests go on. Writes go where `block.replication.Split` sends
them, so the overlays only shrink; a write to a block that was copied but not
yet forgotten is reported through `redo`, and that block stays. The last few
blocks are done while new requests are held, so that a block that is written all
the time cannot keep the commit from ending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.units import BLOCK, MiB

CHUNK = 1 * MiB
"""Copied between two turns of the event loop."""

WINDOW = 64 * MiB
"""Copied between two syncs of the disk."""

LAST = 4 * MiB
"""When so little is left, new requests are held until it is done."""


class Commit(Job):
    """Copies what active and hidden hold to `disk`. `gate` is the top of the LUN's chain."""

    def __init__(self, name: str, active: Overlay, hidden: Overlay, disk: Node, gate: Gate) -> None:
        super().__init__(name, "commit")
        self._active = active
        self._hidden = hidden
        self._disk = disk
        self._gate = gate
        self._copied: list[tuple[int, int]] = []
        self._redo: set[int] = set()

    def redo(self, offset: int, length: int) -> None:
        """Active was written at this range: what was copied of it has to be copied again."""
        if self._copied:
            self._redo.update(range(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    async def run(self) -> None:
        """Commit everything. Raises `Error` as soon as a part fails; what is left stays in the overlays."""
        try:
            while (left := self._left()) > LAST:
                self.length = max(self.length, self.offset + left)
                await self._pass()
            self.length = max(self.length, self.offset + left)
            await self._last_pass()
        except asyncio.CancelledError:
            self.end(JobStatus.CANCELLED, "cancelled")
            raise
        except Error as error:
            self.end(JobStatus.FAILED, str(error))
            raise
        self.length = self.offset
        self.end(JobStatus.CONCLUDED)

    def _left(self) -> int:
        """Bytes still to commit."""
        return sum(length for _, length, _ in _union(self._active, self._hidden))

    async def _pass(self) -> None:
        """Copy all that is there now, a window at a time."""
        window = turn = 0
        for offset, length, zero in _union(self._active, self._hidden):
            self._copy(offset, length, zero)
            window += length
            turn += length
            if window >= WINDOW:
                await self._forget()
                window = turn = 0
            elif turn >= CHUNK:
                await asyncio.sleep(0)
                turn = 0
        await self._forget()

    async def _last_pass(self) -> None:
        self._gate.hold()
        try:
            await settle(self._gate.drained())
            for offset, length, zero in _union(self._active, self._hidden):
                self._copy(offset, length, zero)
            await self._forget()
        finally:
            self._gate.release()

    def _copy(self, offset: int, length: int, zero: bool) -> None:
        """Copy one run, at once: no request comes between its read and its write."""
        self._copied.append((offset, length))
        if zero:
            pending = self._disk.zero(offset, length)
        else:
            pending = self._disk.write(offset, [self._active.fetch(offset, length)])
        assert pending is None, "the disk takes plain writes at once"

    async def _forget(self) -> None:
        """Sync the disk, then drop from the overlays what it holds now."""
        await settle(self._disk.flush())
        for offset, length in self._copied:
            for start, run in self._settled(offset, length):
                self._hidden.forget(start, run)
                self._active.forget(start, run)
                self.offset += run
        self._copied.clear()
        self._redo.clear()

    def _settled(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a copied run that were not written since."""
        end = offset + length
        if not self._redo:
            yield offset, length
            return
        start = offset
        for block in range(offset // BLOCK, (end - 1) // BLOCK + 1):
            if block in self._redo:
                if start < block * BLOCK:
                    yield start, block * BLOCK - start
                start = min(end, (block + 1) * BLOCK)
        if start < end:
            yield start, end - start


def _union(active: Overlay, hidden: Overlay) -> Iterator[tuple[int, int, bool]]:
    """Runs of blocks that active or hidden holds, at most CHUNK long: (offset, length, known zero).

    In order of offset. Each overlay is asked anew for each piece, so blocks that are forgotten or
    allocated behind the iterator do not disturb it.
    """
    offset = 0
    while offset < active.length:  # which may lie inside the last block
        upper = next(active.allocated_runs(offset), None)
        lower = next(hidden.allocated_runs(offset), None)
        if upper is None and lower is None:
            return
        if lower is None or (upper is not None and upper[0] <= lower[0]):
            assert upper is not None
            start, length, zero = upper
        else:
            start, length, zero = lower
            if upper is not None:
                length = min(length, upper[0] - start)
        length = min(length, CHUNK)
        yield start, length, zero
        offset = start + length
