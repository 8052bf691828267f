"""A comparison marks what differs, a resync sends it: with writes at all times the disks are equal in the end.

Nothing is known at first: the map is empty, and any block may differ.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error
from tcmu_replication.jobs.compare import Compare, Difference, digests
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.units import BLOCK, MiB
from tests.support.dirty_marks import DirtyMarks
from tests.support.slow_disk import SlowDisk

BLOCKS = 2 * MiB // BLOCK + 1
LENGTH = (BLOCKS - 1) * BLOCK + 700
"""The last block is a part."""
TURNS = 2000
FAST = 1 << 50


class Inline(Offload):
    """Does it at once."""

    def __init__(self) -> None:
        pass

    def __call__(self, call: Callable[[], Any], doing: str) -> Pending:
        pending = Pending()
        pending.complete(None, call())
        return pending


offsets = st.integers(0, LENGTH - 1) | st.sampled_from([0, 512, BLOCK, 255 * BLOCK + 512, LENGTH - 700])
lengths = st.sampled_from([1, 512, BLOCK, BLOCK + 1, 5 * BLOCK, 64 * BLOCK])
steps = st.tuples(offsets, lengths, st.booleans(), st.integers(0, 9))


@given(
    differ=st.sets(st.integers(0, BLOCKS - 1), max_size=30),
    writes=st.lists(steps, max_size=25),
    slow=st.booleans(),
)
def test_disks_are_equal_in_the_end_whatever_is_written_meanwhile(
    differ: set[int], writes: list[tuple[int, int, bool, int]], slow: bool
) -> None:
    async def story() -> None:
        disk, peer = SlowDisk(LENGTH, name="disk"), SlowDisk(LENGTH, name="peer")
        for block in differ:
            peer.data[block * BLOCK : min((block + 1) * BLOCK, LENGTH)] = b"\xee" * min(
                BLOCK, LENGTH - block * BLOCK
            )
        marks = DirtyMarks(LENGTH)
        dirty = Dirty(marks, LENGTH)

        def missed(offset: int, length: int, error: Error) -> bool:
            raise AssertionError("nothing fails here")

        def differs(found: Difference) -> None:
            dirty.mark(found.offset, found.length)

        async def theirs(offset: int, length: int, piece: int) -> list[str]:
            slow_before, peer.slow = peer.slow, False
            try:
                return await digests(peer, offset, length, piece, Inline())
            finally:
                peer.slow = slow_before

        forward = Resyncing("replication", peer, missed, dirty)
        mirror = Mirror("mirror", disk, report=lambda _: None)
        mirror.attach(forward, peer)
        gate = Gate(mirror)
        peer.slow = slow
        clock = partial(next, itertools.count(0.0, 0.01))

        async def heal() -> Resync:
            await Compare("compare", disk, theirs, differs, gate.quiet, Inline()).run()
            job = Resync("resync", disk, gate, forward, limit=FAST, clock=clock)
            await job.run()
            return job

        task = asyncio.create_task(heal())
        number = due = 0
        todo = list(writes)
        for turn in range(TURNS):
            if task.done() and not todo:
                break
            if todo and turn >= due + todo[0][3]:
                offset, length, zero, _ = todo.pop(0)
                due = turn
                length = min(length, LENGTH - offset)
                number += 1
                if zero:
                    gate.zero(offset, length)
                else:
                    gate.write(offset, [memoryview(bytes([number]) * length)])
            if peer.waiting and turn % 3 == 0:
                free = peer.free()
                peer.end(free[turn % len(free)])
            await asyncio.sleep(0)
        while peer.waiting:
            peer.end(peer.free()[0])
        job = await task
        assert job.status is JobStatus.CONCLUDED
        assert disk.data == peer.data
        assert not marks.dirty

    asyncio.run(story())
