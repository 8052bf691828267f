"""The resync: what is dirty is read here and written to the peer, over the link that forwards writes.

The dirty map is all the state: a resync that ends in any way is begun again with what is left in it. A pass
goes through the disk from its beginning to its end, in pieces: runs of dirty blocks with small gaps are read
together, and only what is dirty is sent (`jobs.sender`). What is marked behind the pass is for the next one.
When nothing is dirty the job has ended.

A peer that is lost, or to which nothing is forwarded (the filter's gap), is waited for. A failed read of
this disk, or an error that the peer answers, ends the job; what was not sent stays dirty.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.jobs.pace import Adaptive, Clock, Fixed
from tcmu_replication.jobs.sender import FLUSH_S, Sender
from tcmu_replication.units import BLOCK, KiB, MiB

log = logging.getLogger(__name__)

GAP = 32 * KiB // BLOCK
"""Blocks between two dirty ones that are read with them: to read so much is cheaper than to read once more."""
LONG = 16 * MiB
"""The longest piece where nothing but zeroes is expected."""
TURN = 16
"""Pieces in a turn of the loop; or 1 MiB."""
RETRY_S = 1.0
"""The pause before a peer that was lost is tried again."""
RATE_S = 5.0
"""The rate that is shown is that of so many seconds."""


class Resync(Job):
    """Sends what `forward.dirty` says from `disk` to the peer; `gate` is the top of the LUN's chain.

    `offset` are the bytes that have become clean, `length` those and what is left. `length` only grows, by
    `dirtied`: what was marked since the beginning. `waits` says what for, while nothing is sent. `limit`
    (bytes per second; None: adaptive) may be set at any time.
    """

    def __init__(
        self,
        name: str,
        disk: Node,
        gate: Gate,
        forward: Resyncing,
        *,
        limit: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(name, "resync")
        self.waits: str | None = None
        self._disk = disk
        self._forward = forward
        self._dirty = forward.dirty
        self._clock = clock
        self._wake = asyncio.Event()
        self._sender = Sender(disk, gate, forward, self._wake.set, clock)
        self._cleaned_before = self._dirty.cleaned
        self._initial = self._dirty.bytes
        self._running = False
        self._paused = False
        self._history: deque[tuple[float, int]] = deque([(clock(), 0)], maxlen=64)
        self._count()
        self.limit = limit

    # --- what is shown, and commands

    @property
    def limit(self) -> int | None:
        """Bytes per second at most; None if that follows the foreground's latency."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._limit = limit
        self._pace: Fixed | Adaptive
        if limit is None:
            self._pace = Adaptive(lambda: bool(self._sender.pieces), self._clock)
        else:
            self._pace = Fixed(limit, self._clock)
        if self._running:
            self._forward.watcher = self._pace.watcher
        self._wake.set()

    @property
    def sent(self) -> int:
        """Bytes of data that were sent."""
        return self._sender.sent

    @property
    def zeroed(self) -> int:
        """Bytes that travelled as zeroes."""
        return self._sender.zeroed

    @property
    def left(self) -> int:
        """Bytes that are dirty."""
        return self.length - self.offset

    @property
    def dirtied(self) -> int:
        """Bytes that were marked since the beginning: by so much `length` has grown."""
        return self.length - self._initial

    @property
    def rate(self) -> float:
        """Bytes that became clean per second, of late."""
        then, offset = self._history[0]
        spent = self._clock() - then
        return (self.offset - offset) / spent if spent > 0 else 0.0

    @property
    def time_left_s(self) -> float | None:
        """Seconds until the end at that rate; None if nothing moves."""
        rate = self.rate
        return self.left / rate if rate and self.waits is None else None

    @property
    def paused(self) -> bool:
        """Whether `pause` was called."""
        return self._paused

    def pause(self) -> None:
        """Send nothing more until `resume`; what is under way ends. Twice is fine."""
        self._paused = True
        self._wake.set()

    def resume(self) -> None:
        """Go on. Twice is fine."""
        self._paused = False
        self._wake.set()

    def peer_is_back(self) -> None:
        """The peer that was waited for is there again, and the gap is closed: go on at once."""
        self._wake.set()

    # --- the job

    async def run(self) -> None:
        """Send all that is dirty. Raises `Error` when this disk cannot be read, or the peer answers with an error."""
        self._running = True
        self._forward.watcher = self._pace.watcher
        try:
            await self._run()
        except asyncio.CancelledError:
            self.end(JobStatus.CANCELLED, "cancelled")
            raise
        except Error as error:
            self.failed_to = self._sender.failed_to
            self.end(JobStatus.FAILED, str(error))
            raise
        finally:
            self._running = False
            self._forward.watcher = None
            self._sender.stop()
            self.waits = None
        self.end(JobStatus.CONCLUDED)

    async def _run(self) -> None:
        while True:
            self._count()
            if self._sender.lost is not None:
                await self._peer()
            if not self.left:
                return
            await self._pass()
            await self._settle()

    async def _pass(self) -> None:
        """Send what is dirty from the disk's beginning to its end."""
        sender = self._sender
        await self._may_go()
        at = turn = turn_bytes = 0
        while sender.lost is None and (runs := self._next(at)):
            first, at = runs[0][0], runs[-1][1]
            dirty = sum(end - start for start, end in runs)
            sender.begin(runs)
            pace = self._pace
            pace.sent(dirty * BLOCK)
            turn += 1
            turn_bytes += (at - first) * BLOCK
            if turn == TURN or turn_bytes >= MiB or sender.full or pace.delay():
                await self._may_go()
                turn = turn_bytes = 0

    def _next(self, at: int) -> list[tuple[int, int]]:
        """The next runs of dirty blocks from block `at` on, with small gaps; none if there are no more."""
        if self._sender.zeroes and (zeroes := self._next_zeroes(at)):
            return zeroes
        longest = self._pace.size // BLOCK
        runs: list[tuple[int, int]] = []
        until = at
        for run in self._dirty.marks.runs(at, longest=longest):
            first, last = run
            if not runs:
                until = first + longest
            elif first - runs[-1][1] > GAP or last > until:
                break
            runs.append(run)
            if last == until:
                break
        return runs

    def _next_zeroes(self, at: int) -> list[tuple[int, int]]:
        """The same after a piece of zeroes: a run that may be longer, if it is all zero."""
        for first, last in self._dirty.marks.runs(at, longest=LONG // BLOCK):
            length = min(last * BLOCK, self._disk.length) - first * BLOCK
            try:
                extents = self._disk.extents(first * BLOCK, length)
            except Error:
                break  # whoever reads it meets that again
            return [(first, last)] if all(extent.zero for extent in extents) else []
        return []

    # --- waiting

    async def _may_go(self) -> None:
        """Wait until the next piece may be sent. Raises the `Error` that ends the job."""
        sender = self._sender
        sender.hand_over()
        await asyncio.sleep(0)  # the LUN's requests have their turn
        while sender.failure is None and sender.lost is None:
            sender.flush(now=self._paused or (sender.full and not sender.pieces))
            self._count()
            self.waits = "paused" if self._paused else None
            if self._paused:
                await self._woken(None)
            elif sender.full:
                await self._woken(FLUSH_S)
            elif (delay := self._pace.delay()) > 0:
                await self._woken(delay)
            else:
                break
        if sender.failure is not None:
            raise sender.failure

    async def _settle(self) -> None:
        """Wait until nothing is under way, and what has arrived is flushed."""
        sender = self._sender
        sender.hand_over()
        while sender.failure is None:
            if sender.lost is not None:
                sender.give_up()
            elif not sender.pieces:
                sender.flush(now=True)
            if sender.quiet:
                break
            await self._woken(None)
        if sender.failure is not None:
            raise sender.failure

    async def _peer(self) -> None:
        """The peer was lost: try again after a while, and if nothing is forwarded to it wait until that changes."""
        sender = self._sender
        if not sender.probing:
            log.info("%s: waits for the peer: %s", self.name, sender.lost)
        while True:
            self.waits = f"waits for the peer: {self._forward.gap or sender.lost}"
            await self._woken(RETRY_S)
            if self._forward.gap is None:
                break
        self.waits = None
        sender.lost = None
        sender.probing = True

    async def _woken(self, timeout_s: float | None) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def _count(self) -> None:
        """Take the progress from the map."""
        self.offset = self._dirty.cleaned - self._cleaned_before
        self.length = self.offset + self._dirty.bytes
        now = self._clock()
        if now - self._history[-1][0] >= RATE_S / 16:
            self._history.append((now, self.offset))
        while len(self._history) > 1 and now - self._history[1][0] >= RATE_S:
            self._history.popleft()
