"""A resync under writes, failures and deaths: what differs is dirty or under way at every instant; nothing at the end.

The chain is that of a primary: gate, mirror, the local disk and the filter, with the peer behind it. Both disks
are slow where the machine says so, and answer in any order that a node may. The machine plays the engine: it
marks what was missed, closes the gap when the link is back, and begins anew after a death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.gate import Gate, Hold
from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.pending import Pending, attempt
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.units import BLOCK
from tests.support.dirty_marks import DirtyMarks
from tests.support.slow_disk import LINK_LOST, SlowDisk

BLOCKS = 7
LENGTH = (BLOCKS - 1) * BLOCK + 700
"""The last block is a part."""
TURNS = 200
"""So many turns of the loop are enough for a resync of so few blocks."""
FAST = 1 << 50
"""A limit that never waits: nothing here is to depend on the time."""

edges = st.sampled_from(
    [n * BLOCK + d for n in range(BLOCKS) for d in (-1, 0, 1, 512) if n or d >= 0] + [LENGTH - 1, LENGTH]
)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Offset and length: whole blocks, parts of them, or anything."""
    start, end = sorted((draw(edges | st.integers(0, LENGTH)), draw(edges | st.integers(0, LENGTH))))
    start = min(start, LENGTH - 1)
    return start, max(end, start + 1) - start


def blocks(offset: int, length: int) -> range:
    """The blocks that a range touches."""
    return range(offset // BLOCK, -(-(offset + length) // BLOCK))


class ResyncMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.disk = SlowDisk(LENGTH, name="disk")
        self.peer = SlowDisk(LENGTH, name="peer")
        self.marks = DirtyMarks(LENGTH)
        self.number = 0
        self.clock = partial(next, itertools.count(0.0, 0.01))
        self.hot: set[int] = set()  # forwarded since the peer's last flush
        self.begin_life()

    @initialize(
        differ=st.sets(st.integers(0, BLOCKS - 1), max_size=BLOCKS),
        local=st.booleans(),
        peer=st.booleans(),
        begins=st.booleans(),
    )
    def after_an_outage(self, differ: set[int], local: bool, peer: bool, begins: bool) -> None:
        for block in differ:
            self.dirty.mark(block * BLOCK, 1)
            here = slice(block * BLOCK, min((block + 1) * BLOCK, LENGTH))
            self.disk.data[here] = b"\xff" * (here.stop - here.start)
        self.disk.slow, self.peer.slow = local, peer
        if begins:
            self.resync_begins()
            self.run(2)

    def begin_life(self) -> None:
        """As a process that opens what it finds."""
        self.dirty = Dirty(self.marks, LENGTH)
        self.mirror = Mirror("mirror", self.disk, report=self.failed)
        self.filter = Resyncing("replication", self.peer, self.missed, self.dirty)
        self.mirror.attach(self.filter, self.peer)
        self.gate = Gate(self.mirror)
        self.hold: Hold | None = None
        self.writes: list[tuple[range, Pending]] = []
        self.job: Resync | None = None
        self.task: asyncio.Task[None] | None = None

    # --- the engine's part

    def missed(self, offset: int, length: int, error: Error) -> bool:
        self.dirty.mark(offset, length)
        return True

    def failed(self, failure: Failure) -> None:
        if failure.final:
            self.dirty.mark(failure.offset, failure.length)

    # --- the foreground

    @rule(at=ranges(), kind=st.sampled_from(["write", "write", "write", "fua", "zero", "discard"]))
    def write(self, at: tuple[int, int], kind: str) -> None:
        offset, length = at
        self.number += 1
        data = memoryview(bytes([self.number % 250 + 1]) * length)
        calls = {
            "write": lambda: self.gate.write(offset, [data]),
            "fua": lambda: self.gate.write(offset, [data], True),
            "zero": lambda: self.gate.zero(offset, length),
            "discard": lambda: self.gate.discard(offset, length),
        }
        _, pending = attempt(calls[kind])
        self.gate.unplug()
        self.hot.update(blocks(offset, length))
        if pending is not None:
            self.writes.append((blocks(offset, length), pending))

    @rule(at=ranges())
    def local_disk_refuses_a_write(self, at: tuple[int, int]) -> None:
        self.disk.refuses = Error(Kind.IO, "the local disk is broken")
        self.write(at, "write")
        self.disk.refuses = None

    @rule(at=ranges())
    def something_is_marked(self, at: tuple[int, int]) -> None:
        """By a comparison, say."""
        self.dirty.mark(*at)

    @rule()
    def initiator_flushes(self) -> None:
        attempt(self.gate.flush)

    @rule(held=st.booleans())
    def requests_are_held_or_released(self, held: bool) -> None:
        if self.hold is not None:
            self.hold.release()
        self.hold = self.gate.hold() if held else None

    # --- the disks

    @rule(local=st.booleans(), slow=st.booleans())
    def disk_becomes_slow_or_fast(self, local: bool, slow: bool) -> None:
        (self.disk if local else self.peer).slow = slow

    @rule(local=st.booleans(), which=st.integers(0, 99), turns=st.integers(0, 3))
    def call_ends(self, local: bool, which: int, turns: int) -> None:
        disk = self.disk if local else self.peer
        if free := disk.free():
            disk.end(free[which % len(free)])
        self.run(turns)

    @rule(
        local=st.booleans(),
        which=st.integers(0, 99),
        kind=st.sampled_from([Kind.IO, Kind.NO_SPACE]),
        torn=st.sampled_from([0, 1, BLOCK, 3 * BLOCK]),
    )
    def call_fails(self, local: bool, which: int, kind: Kind, torn: int) -> None:
        disk = self.disk if local else self.peer
        if free := disk.free():
            disk.end(free[which % len(free)], Error(kind, "fails on cue"), torn)
        self.run(1)

    # --- the link

    @rule(torn=st.sampled_from([0, 1, BLOCK, 1 << 30]), turns=st.integers(0, 3))
    def link_is_lost(self, torn: int, turns: int) -> None:
        self.peer.cut(LINK_LOST, torn)
        self.run(turns)

    @rule()
    def link_is_back(self) -> None:
        self.peer.lost = None
        self.filter.gap = None
        if self.job is not None:
            self.job.peer_is_back()

    @precondition(lambda self: self.peer.lost is not None)
    @rule()
    def peer_loses_power_while_the_link_is_down(self) -> None:
        """The log of hot extents would say what was forwarded and not flushed; the machine does."""
        self.dirty.spoil_all()
        self.peer.lose_power()
        for block in self.hot:
            self.dirty.mark(block * BLOCK, 1)
        self.hot.clear()

    # --- the job

    @precondition(lambda self: self.task is None or self.task.done())
    @rule()
    def resync_begins(self) -> None:
        async def begin() -> None:
            self.job = Resync("disk0", self.disk, self.gate, self.filter, limit=FAST, clock=self.clock)
            self.task = asyncio.create_task(self.job.run())

        self.loop.run_until_complete(begin())

    @rule(turns=st.integers(1, 5))
    def loop_turns(self, turns: int) -> None:
        self.run(turns)

    @precondition(lambda self: self.job is not None)
    @rule(paused=st.booleans())
    def resync_is_paused_or_resumed(self, paused: bool) -> None:
        assert self.job is not None
        if paused:
            self.job.pause()
        else:
            self.job.resume()

    @precondition(lambda self: self.task is not None)
    @rule(turns=st.integers(0, 2))
    def resync_is_cancelled(self, turns: int) -> None:
        assert self.task is not None
        self.task.cancel()
        self.run(turns)

    @rule(torn=st.sampled_from([0, 1, BLOCK, 1 << 30]))
    def process_dies(self, torn: int) -> None:
        """What is in memory is gone; what was under way has happened, or a part of it, or nothing."""
        in_flight = self.in_flight()
        self.end_life()
        for disk in (self.disk, self.peer):
            disk.drop(torn)
            disk.waiting.clear()
            disk.slow = False
        self.peer.lost = None
        self.begin_life()
        for block in in_flight:  # from the log of writes in flight
            self.dirty.mark(block * BLOCK, 1)

    # --- what has to be

    @invariant()
    def what_differs_is_dirty_or_in_flight(self) -> None:
        known = self.marks.dirty | self.in_flight()
        for block in range(BLOCKS):
            here = slice(block * BLOCK, (block + 1) * BLOCK)
            assert block in known or self.disk.data[here] == self.peer.data[here], f"block {block} differs"

    @invariant()
    def progress_adds_up(self) -> None:
        if self.job is not None and self.job.status is JobStatus.RUNNING:
            assert 0 <= self.job.offset <= self.job.length

    def teardown(self) -> None:
        """Everything answers now: the resync ends, and the disks are equal."""
        self.disk.refuses = None
        self.requests_are_held_or_released(False)
        self.heal()
        for _ in range(TURNS):
            if (self.task is None or self.task.done()) and not self.marks.dirty and not self.writes:
                break
            if self.task is None or self.task.done():
                self.resync_begins()
            assert self.job is not None
            self.job.resume()
            self.run(1)
            self.heal()
            self.in_flight()
        assert not self.marks.dirty
        assert self.disk.data == self.peer.data
        assert self.job is None or self.job.status is not JobStatus.RUNNING
        self.end_life()
        self.loop.close()

    def heal(self) -> None:
        for disk in (self.disk, self.peer):
            disk.slow = False
            while free := disk.free():
                disk.end(free[0])
        if self.filter.gap is not None or self.peer.lost is not None:
            self.link_is_back()

    # --- steps

    def in_flight(self) -> set[int]:
        """The blocks of the foreground's writes that have not ended."""
        self.writes = [write for write in self.writes if not write[1].done]
        return {block for touched, _ in self.writes for block in touched}

    def run(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    def end_life(self) -> None:
        async def end() -> None:
            assert self.task is not None
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Error):
                await self.task

        if self.task is not None:
            self.loop.run_until_complete(end())
        self.task = self.job = None


TestResync = ResyncMachine.TestCase
