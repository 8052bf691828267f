"""The commit: after a failover to the checkpoint, active and hidden are copied to the disk.

At every moment the chain (active over hidden over disk) reads the same: a block
is copied to the disk, the disk is synced, and only then the block is forgotten,
in hidden first and, when that is stable, in active after it. So a commit that
dies anywhere is simply done again from what is left.

It goes window by window. What a window will copy is decided in one go; a few
threads copy it, sharing its pieces; when the last piece is on the disk the disk
is synced, and then the window is forgotten. Several windows are under way, so
that the threads copy while the disk is synced. No block is in two of them:
a block that has been forgotten is written on the disk alone, and a late copy of
it would undo such a write. A window of which a piece failed, or was left out
because the commit ends, is never forgotten.

Requests go on meanwhile. Writes go where `block.replication.Split` sends them,
so the overlays only shrink; a write to a block of a window is reported through
`redo`, and that block stays. (So it does not matter what a thread has read of a
block that is written meanwhile.) The last few blocks are done while new
requests are held, and so is all that is left, a few blocks at a time, when the
LUN writes so fast that most has to be copied again: then the commit and the
LUN take turns, and both come to an end.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay, held_runs
from tcmu_replication.block.pending import Pending, after, gather, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.units import BLOCK, MiB

PIECE = 1 * MiB
"""Copied at once. Between pieces a thread needs the interpreter, which the loop needs too."""

WINDOW = 64 * MiB
"""Copied between two syncs of the disk, at most."""

RUNS = 2048
"""The most runs in a window: deciding on it and forgetting it must not keep requests waiting."""

AHEAD = 3
"""So many windows are under way: one is synced, one is copied, and one waits for a free thread."""

LAST = 4 * MiB
"""When so little is left, new requests are held until it is done. No more is copied while they are held."""

THREADS = 2
"""So many copy at a time, of an Offload of low priority: the loop serves the LUN meanwhile."""


class Run(NamedTuple):
    """A range of whole blocks that active or hidden holds; `zero` if it is known to be zero."""

    offset: int
    length: int
    zero: bool


def _end_of(run: Run) -> int:
    return run.offset + run.length


class Window:
    """Runs that are copied and synced together, and what has become of them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.left = deque(_pieces(runs))
        self.redo: set[int] = set()
        self.failed_to: Literal["read", "write"] = "write"
        self.copying: list[Pending] = []
        self.synced: Pending | None = None

    @property
    def end(self) -> int:
        """Where the last run ends."""
        return _end_of(self.runs[-1])

    def take(self) -> Run | None:
        """The next piece for the thread that asks; None when there is none left."""
        try:
            return self.left.popleft()
        except IndexError:
            return None

    def written(self, offset: int, length: int) -> None:
        """What it has of this range has to be copied again."""
        end = offset + length
        for at in range(bisect_right(self.runs, offset, key=_end_of), len(self.runs)):
            run = self.runs[at]
            if run.offset >= end:
                return
            first, last = max(offset, run.offset), min(end, _end_of(run))
            self.redo.update(range(first // BLOCK, (last - 1) // BLOCK + 1))

    def settled(self) -> Iterator[tuple[int, int]]:
        """The parts of its runs that were not written since: (offset, length)."""
        for offset, length, _ in self.runs:
            if not self.redo:
                yield offset, length
                continue
            start, end = offset, offset + length
            for block in range(offset // BLOCK, (end - 1) // BLOCK + 1):
                if block in self.redo:
                    if start < block * BLOCK:
                        yield start, block * BLOCK - start
                    start = min(end, (block + 1) * BLOCK)
            if start < end:
                yield start, end - start


class Commit(Job):
    """Copies what active and hidden hold to `disk`, in threads of `offload`. `gate` is the top of the LUN's chain."""

    def __init__(
        self, name: str, active: Overlay, hidden: Overlay, disk: Node, gate: Gate, offload: Offload
    ) -> None:
        super().__init__(name, "commit")
        self._active = active
        self._hidden = hidden
        self._disk = disk
        self._gate = gate
        self._offload = offload
        self._windows: deque[Window] = deque()

    def redo(self, offset: int, length: int) -> None:
        """Active is written at this range: what the windows have of it has to be copied again."""
        for window in self._windows:
            window.written(offset, length)

    async def run(self) -> None:
        """Commit everything. Raises `Error` as soon as a part fails; what is left stays in the overlays."""
        try:
            await self._run()
        except asyncio.CancelledError:
            self.end(JobStatus.CANCELLED, "cancelled")
            raise
        except Error as error:
            self.end(JobStatus.FAILED, str(error))
            raise
        self.length = self.offset
        self.end(JobStatus.CONCLUDED)

    async def _run(self) -> None:
        try:
            before, left = 0, self._left()
            while left > LAST and (not before or left <= before // 2):
                self.length = max(self.length, self.offset + left)
                await self._pass()
                before, left = left, self._left()
            self.length = max(self.length, self.offset + left)
            await self._held_pass()
        finally:
            await self._stop()

    def _left(self) -> int:
        """Bytes still to commit, or a little more: what both overlays hold counts once for each."""
        return self._active.allocated_bytes + self._hidden.allocated_bytes

    async def _pass(self) -> None:
        """Copy all that is there now, AHEAD windows at a time."""
        offset = 0
        while True:
            while len(self._windows) < AHEAD and (runs := self._next(offset, WINDOW)):
                offset = self._begin(runs).end
            if not self._windows:
                return
            await self._finish()

    async def _held_pass(self) -> None:
        """Copy all that is left, while new requests are held: nothing has to be copied again."""
        offset = 0
        while self._left():
            hold = self._gate.hold()
            try:
                await settle(self._gate.drained())
                offset = self._begin(self._next(offset, LAST)).end
                await self._finish()
            finally:
                hold.release()

    def _next(self, offset: int, limit: int) -> list[Run]:
        """The next runs from `offset` on: at most RUNS, and `limit` bytes."""
        runs: list[Run] = []
        for start, length, zero in held_runs(self._active, self._hidden, offset):
            runs.append(Run(start, min(length, limit), zero))
            limit -= runs[-1].length
            if not limit or len(runs) == RUNS:
                break
        return runs

    def _begin(self, runs: Sequence[Run]) -> Window:
        """Let the threads copy these runs, after the windows that were begun before, and then sync the disk."""
        window = Window(runs)
        self._windows.append(window)
        for _ in range(THREADS):
            window.copying.append(self._offload(partial(self._copy, window), f"commit to {self._disk.name}"))
        window.synced = after(gather(window.copying), self._disk.flush)
        return window

    async def _finish(self) -> None:
        """Wait until the disk holds the oldest window, then drop that from the overlays."""
        window = self._windows[0]
        try:
            await settle(window.synced)
        except Error:
            self.failed_to = window.failed_to
            raise
        for offset, length in window.settled():
            self._hidden.forget(offset, length)
        # Else a loss of power could bring back a block in hidden alone, which is older than active's.
        await settle(self._hidden.sync_map())
        for offset, length in window.settled():  # fewer, if they were written meanwhile
            self._active.forget(offset, length)
            self.offset += length
        self._windows.popleft()

    async def _stop(self) -> None:
        """Wait until no thread copies, whatever happens; the windows are not forgotten.

        A thread that outlived the files that it copies between would write into others.
        """
        for window in self._windows:
            window.left.clear()
        copying = [pending for window in self._windows for pending in window.copying]
        self._windows.clear()
        while running := [pending.wait() for pending in copying if not pending.done]:
            # The job is ending already, so to be told once more to end changes nothing.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*running, return_exceptions=True)

    def _copy(self, window: Window) -> None:
        """Copy pieces of this window until there are no more. What a thread calls."""
        try:
            while (piece := window.take()) is not None:
                self._copy_piece(window, *piece)
        except BaseException:
            window.left.clear()
            raise

    def _copy_piece(self, window: Window, offset: int, length: int, zero: bool) -> None:
        if zero:
            pending = self._disk.zero(offset, length)
        else:
            try:
                data = self._active.fetch(offset, length)
            except Error:
                window.failed_to = "read"
                raise
            pending = self._disk.write(offset, [data])
        if pending is not None:  # what is forgotten in the overlays next would not be on the disk yet
            raise Error(Kind.UNSUPPORTED, f"{self._disk.name} does not write at once")


def _pieces(runs: Sequence[Run]) -> Iterator[Run]:
    """The runs in pieces that one thread copies at a time; zeroes cost nothing and stay whole."""
    for run in runs:
        if run.zero:
            yield run
            continue
        end = run.offset + run.length
        for start in range(run.offset, end, PIECE):
            yield Run(start, min(PIECE, end - start), False)
