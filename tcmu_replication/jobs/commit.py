"""The commit: after a failover to the checkpoint, active and hidden are copied to the disk.

At every moment the chain (active over hidden over disk) reads the same: a block
is copied to the disk, the disk is synced, and only then the block is forgotten,
in hidden first and in active after it. So a commit that dies anywhere is simply
done again from what is left.

It goes window by window. What a window will copy is decided in one go, then it
is copied by a few threads (the commit is the machine's copying speed, and the
LUN answers meanwhile), then the disk is synced and the window forgotten.

While it runs, requests go on. Writes go where `block.replication.Split` sends
them, so the overlays only shrink; a write to a block of the window is reported
through `redo`, and that block stays. (So it does not matter what a thread has
read of a block that is written meanwhile.) The last few blocks are done while
new requests are held, so that a block that is written all the time cannot keep
the commit from ending.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay, held_runs
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.errors import Error
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.units import BLOCK, MiB

CHUNK = 1 * MiB
"""Copied at once. Between chunks a thread needs the interpreter, which the loop needs too."""

WINDOW = 64 * MiB
"""Copied between two syncs of the disk, at most."""

RUNS = 2048
"""The most runs in a window: deciding on it and forgetting it must not keep requests waiting."""

LAST = 4 * MiB
"""When so little is left, new requests are held until it is done."""

THREADS = 2
"""So many copy at a time, of an Offload of low priority: the loop serves the LUN meanwhile."""


class Run(NamedTuple):
    """A range of whole blocks that active or hidden holds; `zero` if it is known to be zero."""

    offset: int
    length: int
    zero: bool


class Commit(Job):
    """Copies what active and hidden hold to `disk`. `gate` is the top of the LUN's chain.

    With an `offload` its threads copy; without, the loop's own does, a window at a time.
    """

    def __init__(
        self,
        name: str,
        active: Overlay,
        hidden: Overlay,
        disk: Node,
        gate: Gate,
        offload: Offload | None = None,
    ) -> None:
        super().__init__(name, "commit")
        self._active = active
        self._hidden = hidden
        self._disk = disk
        self._gate = gate
        self._offload = offload
        self._window: list[Run] = []
        self._redo: set[int] = set()

    def redo(self, offset: int, length: int) -> None:
        """Active is written at this range: what the window has of it has to be copied again."""
        if self._window:
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
        """Bytes still to commit, or a little more: what both overlays hold counts once for each."""
        return self._active.allocated_bytes + self._hidden.allocated_bytes

    async def _pass(self) -> None:
        """Copy all that is there now, a window at a time."""
        offset = 0
        while window := _window(self._active, self._hidden, offset):
            self._window = window
            await self._copy_window()
            await self._forget()
            offset = window[-1].offset + window[-1].length

    async def _last_pass(self) -> None:
        self._gate.hold()
        try:
            await settle(self._gate.drained())
            self._window = [Run(*run) for run in held_runs(self._active, self._hidden)]
            self._copy(self._window)
            await self._forget()
        finally:
            self._gate.release()

    async def _copy_window(self) -> None:
        """Copy the window's runs, in threads if there are any. Their end is awaited, whatever happens."""
        if self._offload is None:
            self._copy(self._window)
            await asyncio.sleep(0)
            return
        shares = [self._window[start::THREADS] for start in range(THREADS)]
        copying = [
            self._offload(partial(self._copy, share), f"commit to {self._disk.name}")
            for share in shares
            if share
        ]
        cancelled = False
        while any(not pending.done for pending in copying):
            # A thread that outlived the files that it copies between would write into others.
            try:
                await _ended(copying)
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        for pending in copying:
            await pending.wait()

    def _copy(self, runs: Sequence[Run]) -> None:
        """Copy these runs. What a thread calls: it changes the disk, and says at most that it could not read."""
        for offset, length, zero in runs:
            if zero:
                pending = self._disk.zero(offset, length)
                assert pending is None, "the disk takes plain writes at once"
                continue
            for start in range(offset, offset + length, CHUNK):
                try:
                    data = self._active.fetch(start, min(CHUNK, offset + length - start))
                except Error:
                    self.failed_to = "read"
                    raise
                pending = self._disk.write(start, [data])
                assert pending is None, "the disk takes plain writes at once"

    async def _forget(self) -> None:
        """Sync the disk, then drop from the overlays what it holds now."""
        await settle(self._disk.flush())
        for offset, length, _ in self._window:
            for start, run in self._settled(offset, length):
                self._hidden.forget(start, run)
                self._active.forget(start, run)
                self.offset += run
        self._window = []
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


async def _ended(pendings: Sequence[Pending]) -> None:
    """Wait until each has ended, well or not."""
    for pending in pendings:
        if not pending.done:
            await asyncio.gather(pending.wait(), return_exceptions=True)


def _window(active: Overlay, hidden: Overlay, offset: int) -> list[Run]:
    """The next runs from `offset` on: at most RUNS, and WINDOW bytes."""
    window: list[Run] = []
    left = WINDOW
    for start, length, zero in held_runs(active, hidden, offset):
        window.append(Run(start, min(length, left), zero))
        left -= window[-1].length
        if not left or len(window) == RUNS:
            break
    return window
