"""The resync job: what it sends and what not, what keeps it waiting, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from tcmu_replication.block.bitmap import Bitmap
from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.node import Extent
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.jobs.sender import PIECES, UNDER_WAY
from tcmu_replication.units import BLOCK, GiB, KiB, MiB
from tests.support.dirty_marks import DirtyMarks
from tests.support.slow_disk import LINK_LOST, SlowDisk
from tests.unit.block.conftest import make_image

TURNS = 1000
FAST = 1 << 50
"""A limit that never waits."""


class Site:
    """A primary's chain above two disks that differ in every block; `job` is not begun."""

    def __init__(self, length: int = 4 * MiB + 512, *, limit: int | None = FAST) -> None:
        self.length = length
        self.disk = SlowDisk(length, name="disk")
        self.disk.data[:] = b"\xaa" * length
        self.peer = SlowDisk(length, name="peer")
        self.marks = DirtyMarks(length)
        self.dirty = Dirty(self.marks, length)
        self.filter = Resyncing("replication", self.peer, self.missed, self.dirty)
        self.mirror = Mirror("mirror", self.disk, report=lambda _: None)
        self.mirror.attach(self.filter, self.peer)
        self.gate = Gate(self.mirror)
        self.limit = limit
        self.task: asyncio.Task[None] | None = None
        self.clock = partial(next, itertools.count(0.0, 0.001))
        self.job = self.another_job()

    def missed(self, offset: int, length: int, error: Error) -> bool:
        self.dirty.mark(offset, length)
        return True

    def another_job(self) -> Resync:
        return Resync("disk0", self.disk, self.gate, self.filter, limit=self.limit, clock=self.clock)

    def mark(self, *blocks: int) -> None:
        for block in blocks:
            self.dirty.mark(block * BLOCK, 1)
        self.job = self.another_job()

    def mark_all(self) -> None:
        self.dirty.mark(0, self.length)
        self.job = self.another_job()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Resync]:
        """The job runs; it is cancelled at the end if it still does."""
        self.task = asyncio.create_task(self.job.run())
        try:
            yield self.job
        finally:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Error):
                await self.task

    async def until(self, condition) -> None:
        for _ in range(TURNS):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("it does not come true")

    @property
    def writes(self) -> list[tuple[int, int]]:
        """What waits at the peer, but for flushes."""
        return [(call.offset, call.length) for call in self.peer.waiting if call.name != "flush"]

    def end_all(self, name: str) -> None:
        while found := [i for i, call in enumerate(self.peer.waiting) if call.name == name]:
            self.peer.end(found[0])


def test_everything_dirty_is_sent_and_the_job_concluded() -> None:
    async def story() -> None:
        site = Site()
        site.mark_all()
        await site.job.run()
        assert site.disk.data == site.peer.data
        assert site.marks.dirty == set()
        assert site.job.status is JobStatus.CONCLUDED
        assert site.job.offset == site.job.length == site.length
        assert site.job.left == 0
        assert site.peer.stable == bytes(site.peer.data), "what is clean was not flushed"

    asyncio.run(story())


def test_resync_between_files_with_the_map_on_disk(tmp_path: Path) -> None:
    """What a host has: a sparse file, and a `Bitmap` that a later process opens again."""

    async def story() -> None:
        length = 24 * MiB
        disk = File(make_image(tmp_path / "disk", length))
        peer = File(make_image(tmp_path / "peer", length))
        disk.write(5 * MiB - 700, [memoryview(b"d" * 2 * MiB)])
        peer.write(20 * MiB, [memoryview(b"p" * 100)])
        with contextlib.closing(Bitmap.create(tmp_path / "dirty.map", length)) as marks:
            marks.mark(0, length // BLOCK)
        with contextlib.closing(Bitmap(tmp_path / "dirty.map", length)) as marks:
            dirty = Dirty(marks, length)
            forward = Resyncing("replication", peer, lambda *_: True, dirty)
            mirror = Mirror("mirror", disk, report=lambda _: None)
            mirror.attach(forward, peer)
            job = Resync("disk0", disk, Gate(mirror), forward)
            await job.run()
            assert marks.count == 0
        assert job.sent <= 2 * MiB + 64 * KiB
        assert job.sent + job.zeroed == length
        disk.close()
        peer.close()
        assert (tmp_path / "disk").read_bytes() == (tmp_path / "peer").read_bytes()

    asyncio.run(story())


def test_nothing_dirty_is_the_end_at_once() -> None:
    async def story() -> None:
        site = Site()
        site.peer.lost = LINK_LOST
        await site.job.run()
        assert site.job.status is JobStatus.CONCLUDED

    asyncio.run(story())


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(range(0, 1024, 2), id="checkerboard"),
        pytest.param(range(0, 1024, 97), id="far apart"),
        pytest.param([3, 4, 5, 600, 1024], id="runs, and the short last block"),
    ],
)
def test_only_what_is_dirty_is_sent(blocks) -> None:
    """Bytes sent / bytes that differ is 1, whatever the pattern."""

    async def story() -> None:
        site = Site()
        site.mark(*blocks)
        differs = site.dirty.bytes
        await site.job.run()
        assert site.peer.taken == site.job.sent == differs
        for block in range(1025):
            here = slice(block * BLOCK, (block + 1) * BLOCK)
            assert (site.peer.data[here] == site.disk.data[here]) == (block in blocks)

    asyncio.run(story())


def test_dense_map_goes_as_writes_of_a_mebibyte() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark_all()
        async with site.running():
            await site.until(lambda: len(site.writes) == 5)
            assert site.writes == [(n * MiB, MiB) for n in range(4)] + [(4 * MiB, 512)]

    asyncio.run(story())


def test_what_is_under_way_is_bounded_in_bytes() -> None:
    async def story() -> None:
        site = Site(32 * MiB)
        site.peer.slow = True
        site.mark_all()
        async with site.running():
            await site.until(lambda: sum(length for _, length in site.writes) == UNDER_WAY)
            for _ in range(50):
                await asyncio.sleep(0)
            assert sum(length for _, length in site.writes) == UNDER_WAY

    asyncio.run(story())


def test_what_is_under_way_is_bounded_in_pieces() -> None:
    async def story() -> None:
        site = Site(32 * MiB)
        site.peer.slow = True
        site.mark(*range(0, 8192, 64))
        async with site.running():
            await site.until(lambda: len(site.writes) == PIECES)
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(site.writes) == PIECES

    asyncio.run(story())


def test_what_arrived_waits_for_flushes_within_bounds() -> None:
    """A peer that answers writes and no flush: neither the marks nor the memory grow."""

    async def story() -> None:
        site = Site(64 * MiB)
        site.peer.slow = True
        site.mark(*range(0, 16384, 32))
        async with site.running() as job:
            before = -1
            for _ in range(100):
                site.end_all("write")
                before, sent = job.sent, before
                for _ in range(5):
                    await asyncio.sleep(0)
                if job.sent == before == sent:
                    break
            assert job.sent < 512 * BLOCK
            assert site.marks.count == 512

    asyncio.run(story())


def test_holes_and_zeroes_travel_as_zeroes() -> None:
    async def story() -> None:
        site = Site()
        site.peer.data[:] = b"\x55" * site.length
        site.disk.data[MiB : 3 * MiB] = bytes(2 * MiB)
        site.mark_all()
        await site.job.run()
        assert site.disk.data == site.peer.data
        assert site.peer.taken == site.job.sent == site.length - 2 * MiB
        assert site.peer.zeroed == site.job.zeroed == 2 * MiB

    asyncio.run(story())


def test_zeroes_that_the_disk_does_not_know_of_travel_as_zeroes() -> None:
    """A block device cannot say where it is zero."""

    async def story() -> None:
        site = Site()
        site.disk.data[:] = bytes(site.length)
        site.disk.extents = lambda offset, length: [Extent(length, True, False)]  # type: ignore[method-assign]
        site.peer.data[:] = b"\x55" * site.length
        site.mark_all()
        await site.job.run()
        assert site.disk.data == site.peer.data
        assert site.peer.taken == 0

    asyncio.run(story())


def test_long_hole_goes_in_long_pieces() -> None:
    async def story() -> None:
        site = Site(64 * MiB)
        site.disk.data[:] = bytes(site.length)
        site.disk.extents = lambda offset, length: [Extent(length, False, True)]  # type: ignore[method-assign]
        site.peer.slow = True
        site.mark_all()
        calls = 0
        async with site.running() as job:
            while job.status is JobStatus.RUNNING:
                calls += len(site.writes)
                site.end_all("zero")
                site.end_all("flush")
                await asyncio.sleep(0)
        assert calls < 10

    asyncio.run(story())


def test_block_is_clean_only_when_the_peer_has_flushed_it() -> None:
    """Nothing else remembers that it was sent, should the peer lose power."""

    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark(1, 2)
        async with site.running():
            await site.until(lambda: site.writes)
            site.end_all("write")
            await site.until(lambda: site.peer.waiting)
            assert [call.name for call in site.peer.waiting] == ["flush"]
            assert site.marks.dirty == {1, 2}
            site.peer.end(0)
            assert site.marks.dirty == set()

    asyncio.run(story())


def test_write_during_the_local_read_waits_and_follows() -> None:
    async def story() -> None:
        site = Site()
        site.disk.slow = site.peer.slow = True
        site.mark(0)
        async with site.running():
            await site.until(lambda: site.disk.waiting)
            here = site.gate.write(0, [memoryview(b"n" * 512)])
            beside = site.gate.write(BLOCK, [memoryview(b"n" * 512)])
            assert [call.offset for call in site.disk.waiting] == [0, BLOCK], "only the first has to wait"
            site.disk.slow = False
            site.disk.end(0)
            assert site.writes == [(BLOCK, 512), (0, BLOCK), (0, 512)]
            site.disk.end(0)
            for name in ("write", "flush"):
                site.end_all(name)
                await asyncio.sleep(0)
            assert here is not None
            assert beside is not None
            assert here.done
            assert beside.done
            assert site.peer.data[:1024] == b"n" * 512 + b"\xaa" * 512

    asyncio.run(story())


def test_piece_is_not_read_while_a_write_to_it_is_under_way() -> None:
    async def story() -> None:
        site = Site()
        site.disk.slow = site.peer.slow = True
        site.gate.write(0, [memoryview(b"n" * 512)])
        site.mark(0)
        async with site.running():
            for _ in range(20):
                await asyncio.sleep(0)
            assert [call.name for call in site.disk.waiting] == ["write"]

    asyncio.run(story())


def test_checkpoint_need_not_wait_for_the_peer_to_take_what_is_resent() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark_all()
        async with site.running():
            await site.until(lambda: site.writes)
            hold = site.gate.hold()
            await site.until(lambda: site.gate.drained() is None)
            hold.release()

    asyncio.run(story())


def test_failed_local_read_ends_the_job_and_says_where() -> None:
    async def story() -> None:
        site = Site()
        site.mark(7, 700)

        def read(offset, buffers):
            if offset == 700 * BLOCK:
                raise Error(Kind.IO, "read disk: Input/output error", offset=offset, length=BLOCK)
            return SlowDisk.read(site.disk, offset, buffers)

        site.disk.read = read  # type: ignore[method-assign]
        with pytest.raises(Error):
            await site.job.run()
        assert site.job.status is JobStatus.FAILED
        assert site.job.failed_to == "read"
        assert site.job.error == f"read disk: Input/output error (at byte {700 * BLOCK}, 4096 bytes)"
        assert 700 in site.marks.dirty

    asyncio.run(story())


@pytest.mark.parametrize("kind", [Kind.IO, Kind.NO_SPACE])
def test_error_of_the_peer_ends_the_job_and_all_stays_dirty(kind: Kind) -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark(7)
        async with site.running() as job:
            await site.until(lambda: site.writes)
            site.peer.end(0, Error(kind, "the server says no", offset=7 * BLOCK, length=BLOCK), torn=100)
            assert site.task is not None
            with pytest.raises(Error, match="the server says no"):
                await site.task
            assert job.status is JobStatus.FAILED
            assert job.failed_to == "write"
            assert site.marks.dirty == {7}

    asyncio.run(story())


def test_failed_flush_of_the_peer_makes_nothing_clean() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark(7)
        async with site.running() as job:
            await site.until(lambda: site.writes)
            site.end_all("write")
            await site.until(lambda: site.peer.waiting)
            site.peer.end(0, Error(Kind.IO, "the server's disk is broken"))
            await site.until(lambda: job.waits)
            assert site.marks.dirty == {7}
            assert site.filter.gap is not None

    asyncio.run(story())


def test_lost_peer_is_waited_for_and_the_job_goes_on() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark_all()
        async with site.running() as job:
            await site.until(lambda: len(site.writes) == 5)
            site.peer.end(0)
            site.peer.cut(LINK_LOST, torn=BLOCK)
            await site.until(lambda: job.waits)
            assert job.waits == "waits for the peer: the link is lost"
            assert job.time_left_s is None
            assert site.marks.count == 1025, "what had arrived was not flushed"
            site.peer.lost, site.peer.slow = None, False
            job.peer_is_back()
            assert site.task is not None
            await site.task
            assert site.disk.data == site.peer.data
            assert job.status is JobStatus.CONCLUDED

    asyncio.run(story())


def test_peer_that_was_lost_is_tried_with_one_piece() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark_all()
        async with site.running() as job:
            await site.until(lambda: site.writes)
            site.peer.cut(LINK_LOST, torn=0)
            await site.until(lambda: job.waits)
            site.peer.lost = None
            job.peer_is_back()
            await site.until(lambda: site.writes)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(site.writes) == 1
            site.peer.end(0)
            await site.until(lambda: len(site.writes) > 1)

    asyncio.run(story())


def test_nothing_is_sent_in_a_gap() -> None:
    async def story() -> None:
        site = Site()
        site.filter.gap = Error(Kind.CONFLICT, "the peer misses writes")
        site.mark_all()
        async with site.running() as job:
            await site.until(lambda: job.waits)
            assert job.waits == "waits for the peer: the peer misses writes"
            job.peer_is_back()  # too early
            for _ in range(20):
                await asyncio.sleep(0)
            assert site.peer.taken == 0
            site.filter.gap = None
            job.peer_is_back()
            assert site.task is not None
            await site.task
            assert site.disk.data == site.peer.data

    asyncio.run(story())


def test_paused_job_sends_nothing_and_flushes_what_arrived() -> None:
    async def story() -> None:
        site = Site(32 * MiB)
        site.peer.slow = True
        site.mark_all()
        async with site.running() as job:
            await site.until(lambda: len(site.writes) == 8)
            job.pause()
            job.pause()
            site.end_all("write")
            await site.until(lambda: site.peer.waiting)
            assert [call.name for call in site.peer.waiting] == ["flush"]
            site.end_all("flush")
            await site.until(lambda: job.offset == 8 * MiB)
            assert job.waits == "paused"
            assert site.writes == []
            site.peer.slow = False
            job.resume()
            assert site.task is not None
            await site.task
            assert site.disk.data == site.peer.data
            assert job.waits is None

    asyncio.run(story())


def test_job_that_is_paused_before_it_begins_sends_nothing() -> None:
    async def story() -> None:
        site = Site()
        site.mark_all()
        site.job.pause()
        async with site.running() as job:
            await site.until(lambda: job.waits == "paused")
            assert site.peer.taken == 0

    asyncio.run(story())


def test_cancelled_job_holds_nothing_and_the_next_goes_on() -> None:
    async def story() -> None:
        site = Site()
        site.disk.slow = site.peer.slow = True
        site.mark_all()
        async with site.running() as job:
            await site.until(lambda: site.disk.waiting)
        assert job.status is JobStatus.CANCELLED
        site.disk.slow = False
        while site.disk.waiting:
            site.disk.end(0)
        assert site.gate.drained() is None
        assert site.writes == []
        site.peer.slow = False
        site.job = site.another_job()
        await site.job.run()
        assert site.disk.data == site.peer.data

    asyncio.run(story())


def test_what_arrives_after_the_cancellation_stays_dirty() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark(3)
        async with site.running():
            await site.until(lambda: site.writes)
        site.end_all("write")
        assert site.marks.dirty == {3}

    asyncio.run(story())


def test_new_dirt_makes_the_length_grow_and_is_told() -> None:
    async def story() -> None:
        site = Site()
        site.peer.slow = True
        site.mark(0, 1)
        async with site.running() as job:
            await site.until(lambda: site.writes)
            site.dirty.mark(512 * BLOCK, 3 * BLOCK)
            site.dirty.mark(0, 1)  # sent already, and dirty anew
            site.peer.slow = False
            site.end_all("write")
            assert site.task is not None
            await site.task
        assert job.dirtied == 3 * BLOCK
        assert job.length == job.offset == 5 * BLOCK
        assert site.marks.dirty == set()
        assert job.sent == 6 * BLOCK

    asyncio.run(story())


def test_whole_blocks_written_meanwhile_need_not_be_sent_again() -> None:
    async def story() -> None:
        site = Site()
        site.mark_all()
        site.gate.write(2 * MiB, [memoryview(b"n" * MiB)])
        await site.job.run()
        assert site.job.sent == site.length - MiB
        assert site.job.offset == site.job.length == site.length
        assert site.disk.data == site.peer.data

    asyncio.run(story())


def test_limit_takes_effect_at_once() -> None:
    async def story() -> None:
        site = Site(limit=1)
        site.mark_all()
        async with site.running() as job:
            await site.until(lambda: job.sent)
            sent = job.sent
            assert sent == 64 * KiB
            for _ in range(50):
                await asyncio.sleep(0)
            assert job.sent == sent
            job.limit = FAST
            assert site.task is not None
            await site.task
            assert site.disk.data == site.peer.data
            assert job.limit == FAST

    asyncio.run(story())


def test_adaptive_limit_is_the_default_and_no_limit_while_nobody_writes() -> None:
    async def story() -> None:
        site = Site(limit=None)
        site.mark_all()
        await site.job.run()
        assert site.job.limit is None
        assert site.disk.data == site.peer.data
        assert site.filter.watcher is None

    asyncio.run(story())


def test_map_that_cannot_be_cleared_ends_the_job(monkeypatch) -> None:
    async def story() -> None:
        site = Site()
        site.mark(5)

        def full(first: int, last: int) -> None:
            raise Error(Kind.NO_SPACE, "no space for the map")

        monkeypatch.setattr(site.marks, "clear", full)
        with pytest.raises(Error, match="no space for the map"):
            await site.job.run()
        assert site.marks.dirty == {5}

    asyncio.run(story())


def test_huge_disk_with_little_that_is_dirty_takes_no_memory_for_the_rest() -> None:
    """Only what is dirty is looked at: a disk of which nobody could hold the content."""

    class Huge(SlowDisk):
        def __init__(self, name: str) -> None:
            super().__init__(0, name=name)
            self.length = 1 << 44

        def read(self, offset, buffers):
            buffers[0][:] = b"x" * len(buffers[0])

        def extents(self, offset, length):
            return [Extent(length, True, False)]

        def write(self, offset, buffers, fua=False):
            self.taken += len(buffers[0])

        def zero(self, offset, length, fua=False, unmap=True):
            raise AssertionError("nothing is zero")

    class Few(DirtyMarks):
        def runs(self, first=0, last=None, *, longest=None):
            return iter([(b, b + 1) for b in sorted(self.dirty) if first <= b < (last or self.blocks)])

    async def story() -> None:
        site = Site()
        disk, peer, marks = Huge("disk"), Huge("peer"), Few(1 << 44)
        dirty = Dirty(marks, 1 << 44)
        forward = Resyncing("replication", peer, site.missed, dirty)
        mirror = Mirror("mirror", disk, report=lambda _: None)
        mirror.attach(forward, peer)
        for n in range(100):
            dirty.mark(n * 160 * GiB, 1)
        job = Resync("huge", disk, Gate(mirror), forward, limit=FAST, clock=site.clock)
        await job.run()
        assert peer.taken == 100 * BLOCK

    asyncio.run(story())
