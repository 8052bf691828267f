"""Copy-before-write: old data is safe before the disk changes, at once and in durable batches."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from tcmu_replication.block.copy_before_write import PIECE, CopyBeforeWrite
from tcmu_replication.block.faults import Faults
from tcmu_replication.block.file import File
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import HeldOffload, make_image
from tests.unit.block.ledger import Ledger

BLOCK = 4096
LENGTH = 6 * BLOCK + 700
OLD = bytes(n * 37 % 251 + 1 for n in range(LENGTH))


class Pair:
    """A disk with old content, its hidden overlay, and the filter; `told` is what that says of failures."""

    def __init__(self, folder: Path, *, durable: bool = False, offload: HeldOffload | None = None) -> None:
        self.memory = Memory(LENGTH)
        self.memory.data[:] = OLD
        self.below = Faults(self.memory, name="below")
        self.disk = Faults(self.below, name="disk")
        self.hidden = Overlay.create("hidden", folder / "hidden", self.disk, offload=offload)
        self.data = self.hidden.data = Faults(self.hidden.data, name="hidden data")
        self.ledger = Ledger(self.hidden)
        self.told: list[Error] = []
        self.filter = CopyBeforeWrite(self.disk, self.hidden, durable, failed=self.told.append)

    def write(self, offset: int, data: bytes) -> list[bool]:
        """Write; returns a list that is filled with the end: True for success."""
        ended: list[bool] = []
        pending = self.filter.write(offset, [memoryview(data)])
        if pending is None:
            return [True]
        pending.then(lambda p: ended.append(p.error is None))
        return ended

    def checkpoint(self) -> bytes:
        return bytes(self.hidden.fetch(0, LENGTH))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def durable(tmp_path: Path) -> Pair:
    return Pair(tmp_path, durable=True)


def changed(*writes: tuple[int, bytes]) -> bytes:
    expected = bytearray(OLD)
    for offset, data in writes:
        expected[offset : offset + len(data)] = data
    return bytes(expected)


@pytest.mark.parametrize(
    ("offset", "length", "blocks"),
    [(0, 1, 1), (BLOCK - 1, 2, 2), (BLOCK, BLOCK, 1), (LENGTH - 1, 1, 1), (0, LENGTH, 7)],
)
def test_cbw_saves_every_block_that_a_write_touches(
    pair: Pair, offset: int, length: int, blocks: int
) -> None:
    new = b"n" * length
    assert pair.write(offset, new) == [True]
    assert pair.memory.data == changed((offset, new))
    assert pair.checkpoint() == OLD
    assert pair.hidden.allocated_bytes == blocks * BLOCK


@pytest.mark.parametrize("operation", ["zero", "discard"])
def test_cbw_saves_before_zero_and_discard(pair: Pair, operation: str) -> None:
    assert getattr(pair.filter, operation)(BLOCK + 1, 2 * BLOCK) is None
    assert pair.memory.data == changed((BLOCK + 1, bytes(2 * BLOCK)))
    assert pair.checkpoint() == OLD


def test_cbw_saves_a_block_once(pair: Pair) -> None:
    pair.write(0, b"1" * BLOCK)
    reads = pair.disk.fail("read")
    pair.write(10, b"2" * 100)
    pair.filter.zero(0, 4)
    assert reads.met == 0
    assert pair.checkpoint() == OLD


@pytest.mark.parametrize("operation", ["write", "read"])
def test_cbw_that_cannot_save_fails_the_write_and_recovers(pair: Pair, operation: str) -> None:
    place = pair.data if operation == "write" else pair.disk
    rule = place.fail(operation, Kind.NO_SPACE, count=1, torn_after=BLOCK + 5)
    with pytest.raises(Error) as caught:
        pair.write(BLOCK, b"n" * 3 * BLOCK)
    assert caught.value.kind is Kind.NO_SPACE
    assert rule.met == 1
    assert pair.memory.data == OLD
    assert not pair.hidden.allocated(0, LENGTH)
    assert pair.write(BLOCK, b"n" * 3 * BLOCK) == [True]
    assert pair.checkpoint() == OLD


def test_cbw_disk_error_after_saving_harms_nothing(pair: Pair) -> None:
    pair.disk.fail("write", count=1, torn_after=100)
    with pytest.raises(Error):
        pair.write(0, b"n" * BLOCK)
    assert pair.checkpoint() == OLD
    assert pair.memory.data == changed((0, b"n" * 100))


def test_cbw_of_a_large_hole_marks_zeroes_without_reading_it(tmp_path: Path) -> None:
    length = 40 << 20
    disk = Faults(File(make_image(tmp_path / "disk", length)))
    disk.write(5 << 20, [memoryview(b"x" * BLOCK)])
    hidden = Overlay.create("hidden", tmp_path / "hidden", disk)
    reads = disk.fail("read", offset=6 << 20)
    CopyBeforeWrite(disk, hidden).zero(0, length)
    assert reads.met == 0
    assert hidden.covers(0, length)
    assert hidden.stored_bytes == PIECE
    assert bytes(hidden.fetch(5 << 20, BLOCK + 1)) == b"x" * BLOCK + b"\0"
    hidden.close()


def test_cbw_retargets_to_the_next_overlay(pair: Pair, tmp_path: Path) -> None:
    pair.write(0, b"1" * BLOCK)
    following = Overlay.create("hidden", tmp_path / "following", pair.disk)
    pair.filter.retarget(following)
    assert pair.filter.into is following
    pair.write(0, b"2")
    assert bytes(following.fetch(0, LENGTH)) == changed((0, b"1" * BLOCK))
    assert pair.checkpoint() == OLD


# Durable: nothing on the disk before its pre-image is on stable storage.


def test_cbw_durable_disk_waits_for_the_batch(durable: Pair) -> None:
    first, second = durable.write(0, b"1" * 100), durable.write(50, b"2" * BLOCK)
    assert (first, second) == ([], [])
    assert durable.memory.data == OLD
    assert not durable.hidden.allocated(0, LENGTH), "no mark before the data is durable"
    assert durable.checkpoint() == OLD
    durable.filter.unplug()
    assert (first, second) == ([True], [True])
    assert durable.memory.data == changed((0, b"1" * 50 + b"2" * BLOCK))
    assert durable.checkpoint() == OLD
    assert durable.write(0, b"3") == [True], "saved blocks pass at once"


@pytest.mark.parametrize("operation", ["read", "flush"])
def test_cbw_durable_read_or_flush_starts_the_batch(durable: Pair, operation: str) -> None:
    ended = durable.write(0, b"1")
    into = bytearray(1)
    if operation == "read":
        durable.filter.read(0, [memoryview(into)])
        assert into == b"1"
    else:
        durable.filter.flush()
    assert ended == [True]


def test_cbw_durable_order_of_sync_mark_sync_write(tmp_path: Path) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    ended = pair.write(0, b"1" * BLOCK)
    assert not offload.calls
    pair.filter.unplug()
    assert [doing for _, doing, _ in offload.calls] == [f"flush {tmp_path}/hidden.data"]
    assert not pair.hidden.allocated(0, 1)
    offload.run_next()
    assert [doing for _, doing, _ in offload.calls] == [f"flush {tmp_path}/hidden.map"]
    assert pair.hidden.allocated(0, 1)
    assert pair.memory.data == OLD
    assert ended == []
    offload.run_next()
    assert ended == [True]
    assert pair.memory.data == changed((0, b"1" * BLOCK))


def test_cbw_durable_writes_of_a_block_keep_their_order_over_batches(tmp_path: Path) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    pair.write(5 * BLOCK, b"x")
    pair.filter.unplug()
    offload.run_next()
    offload.run_next()
    ends = [pair.write(0, b"1" * BLOCK), pair.write(5 * BLOCK - 1, b"12")]
    pair.filter.unplug()
    offload.run_next()  # the marks are made, and not yet durable
    ends += [pair.write(1, b"2"), pair.write(BLOCK, b"3"), pair.write(5 * BLOCK, b"4")]
    assert pair.write(5 * BLOCK + BLOCK, b"new block") == []
    pair.filter.unplug()
    assert ends == [[], [], [], [], []]
    offload.run_all()
    assert ends == [[True]] * 5
    assert pair.memory.data[: BLOCK + 1] == b"12" + b"1" * (BLOCK - 2) + b"3"
    assert pair.memory.data[5 * BLOCK - 1 : 5 * BLOCK + 1] == b"14"
    assert pair.checkpoint() == OLD


def test_cbw_durable_saved_blocks_pass_a_batch_that_does_not_touch_them(tmp_path: Path) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    pair.write(5 * BLOCK, b"x")
    pair.filter.unplug()
    offload.run_next()
    offload.run_next()
    pair.write(0, b"1")
    assert pair.write(5 * BLOCK, b"y") == [True]
    pair.filter.unplug()
    assert pair.write(5 * BLOCK, b"z") == [True]
    with pytest.raises(Error) as caught:
        pair.filter.retarget(pair.hidden)
    assert caught.value.kind is Kind.INVALID_STATE


@pytest.mark.parametrize("step", [0, 1], ids=["data", "map"])
def test_cbw_durable_failed_sync_fails_the_batch_and_leaves_disk_and_marks(
    durable: Pair, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    syncs = [durable.data, durable.hidden.map]
    fail = Error(Kind.IO, "sync fails on cue")

    def failing() -> None:
        raise fail

    ended = [durable.write(0, b"1" * BLOCK), durable.write(1, b"2")]
    with monkeypatch.context() as patch:
        patch.setattr(syncs[step], "flush", failing)
        durable.filter.unplug()
    assert ended == [[False], [False]]
    assert durable.memory.data == OLD
    assert not durable.hidden.allocated(0, LENGTH)
    assert not durable.ledger.outstanding
    assert bool(durable.ledger.abandoned) == (step == 0)
    again = durable.write(0, b"3")
    durable.filter.unplug()
    assert again == [True]
    assert durable.checkpoint() == OLD


def test_cbw_durable_failed_batch_keeps_the_marks_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    first = pair.write(0, b"1")
    pair.filter.unplug()
    second = pair.write(2, b"2" * BLOCK)  # its first block is the first batch's to mark
    offload.run_next()
    offload.run_next()
    assert first == [True]

    def fdatasync(fd: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}") == f"{pair.hidden.path}.map":
            raise OSError(errno.EIO, "sync fails on cue")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    offload.run_all()
    assert second == [False]
    assert pair.memory.data == changed((0, b"1"))
    assert pair.checkpoint() == OLD


def test_cbw_durable_write_behind_a_batch_that_fails_saves_for_itself(tmp_path: Path) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    first = pair.write(0, b"1")
    pair.filter.unplug()
    second = pair.write(2, b"2" * BLOCK)
    pair.filter.unplug()
    pair.ledger.map_fails = Error(Kind.IO, "sync fails on cue")
    offload.run_all()
    assert (first, second) == ([False], [True])
    assert pair.memory.data == changed((2, b"2" * BLOCK))
    assert pair.checkpoint() == OLD


def test_cbw_durable_write_that_cannot_be_stored_fails_alone(durable: Pair) -> None:
    good = durable.write(0, b"1")
    durable.data.fail("write", Kind.NO_SPACE, count=1)
    with pytest.raises(Error) as caught:
        durable.write(BLOCK, b"2")
    assert caught.value.kind is Kind.NO_SPACE
    durable.filter.close()
    assert good == [True]
    assert durable.memory.data == changed((0, b"1"))
    assert not durable.ledger.outstanding


def test_cbw_durable_write_that_cannot_be_stored_to_its_end_abandons_its_beginning(durable: Pair) -> None:
    durable.write(2 * BLOCK, b"1")
    durable.filter.unplug()
    durable.data.fail("write", Kind.NO_SPACE, skip=1)
    with pytest.raises(Error):
        durable.write(BLOCK, b"2" * 3 * BLOCK)
    assert durable.ledger.abandoned == [(BLOCK, BLOCK)]
    assert not durable.ledger.outstanding
    assert not durable.hidden.allocated(BLOCK, 1)
    assert durable.memory.data == changed((2 * BLOCK, b"1"))


def test_cbw_durable_unaligned_neighbours_are_one_batch(tmp_path: Path) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    ends = [pair.write(start, b"n" * BLOCK) for start in range(700, 5 * BLOCK, BLOCK)]
    pair.filter.unplug()
    offload.run_next()
    offload.run_next()
    assert ends == [[True]] * 5
    assert not offload.calls
    assert pair.checkpoint() == OLD


def test_cbw_durable_disk_errors_reach_their_own_write(durable: Pair) -> None:
    durable.disk.fail("write", Kind.NO_SPACE, offset=BLOCK, length=1)
    slow = durable.disk.delay("write", offset=2 * BLOCK, length=1)
    ends = [durable.write(n * BLOCK, b"n") for n in range(3)]
    durable.filter.unplug()
    assert ends == [[True], [False], []]
    slow.release()
    assert ends == [[True], [False], [True]]


def test_cbw_durable_write_made_by_whoever_is_told_of_an_end(durable: Pair) -> None:
    ends: list[list[bool]] = []
    pending = durable.filter.write(0, [memoryview(b"1" * BLOCK)])
    assert pending is not None
    pending.then(lambda _: ends.append(durable.write(0, b"2")))
    pending.then(lambda _: ends.append(durable.write(BLOCK, b"3")))
    durable.filter.unplug()
    assert ends == [[True], [True]]
    assert durable.memory.data == changed((0, b"2" + b"1" * (BLOCK - 1) + b"3"))
    assert durable.checkpoint() == OLD


def test_cbw_durable_with_real_threads(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def run() -> None:
        offload = Offload()
        disk = File(make_image(tmp_path / "disk", LENGTH), offload=offload)
        disk.write(0, [memoryview(OLD)])
        hidden = Overlay.create("hidden", tmp_path / "hidden", disk, offload=offload)
        filter_ = CopyBeforeWrite(disk, hidden, durable=True)
        expected, dice, writes = bytearray(OLD), random.Random(3), []
        for stamp in range(1, 200):
            offset = dice.randrange(LENGTH)
            data = bytes([stamp]) * min(LENGTH - offset, dice.choice([1, 512, BLOCK]))
            expected[offset : offset + len(data)] = data
            writes.append(filter_.write(offset, [memoryview(data)], stamp % 9 == 0))
            if stamp % 7 == 0:
                filter_.unplug()
                await asyncio.sleep(0)
        filter_.unplug()
        for write in writes:
            await settle(write)
        await settle(filter_.flush())
        assert bytes(disk.fetch(0, LENGTH)) == expected
        assert bytes(hidden.fetch(0, LENGTH)) == OLD
        hidden.close()
        offload.close()

    loop.run_until_complete(run())


# The loss of power.


class Stable:
    """What files held at their last fdatasync: all that is sure to be there after a loss of power."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.syncs = 0
        folder.mkdir()
        real = os.fdatasync

        def fdatasync(fd: int) -> None:
            real(fd)
            self.syncs += 1
            path = os.readlink(f"/proc/self/fd/{fd}")
            shutil.copyfile(path, folder / Path(path).name)

        monkeypatch.setattr(os, "fdatasync", fdatasync)

    def checkpoint(self, disk: Memory, marks: Path) -> bytes:
        """The last checkpoint, from stable data and the given marks over what the disk holds now."""
        with tempfile.TemporaryDirectory() as lost:
            shutil.copyfile(self.folder / "hidden.data", f"{lost}/hidden.data")
            shutil.copyfile(marks, f"{lost}/hidden.map")
            hidden = Overlay("hidden", f"{lost}/hidden", disk)
            content = bytes(hidden.fetch(0, LENGTH))
            hidden.release()
        return content


def test_cbw_durable_power_lost_at_any_write_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable = Stable(tmp_path / "stable", monkeypatch)
    pair = Pair(tmp_path, durable=True)
    pair.hidden.flush()
    looks = 0

    def look(offset: int, buffers: Buffers, fua: bool = False) -> None:
        """Power is lost before or after this write; marks may have been written back sooner than synced."""
        nonlocal looks
        for after in (False, True):
            if after:
                write(offset, buffers, fua)
            for marks in (tmp_path / "stable" / "hidden.map", tmp_path / "hidden.map"):
                assert stable.checkpoint(pair.memory, marks) == OLD
                looks += 1

    write = pair.memory.write
    monkeypatch.setattr(pair.memory, "write", look)
    dice = random.Random(7)
    for _ in range(8):
        for _ in range(3):
            offset = dice.randrange(LENGTH)
            pair.write(offset, b"n" * min(LENGTH - offset, dice.choice([1, 700, BLOCK, 2 * BLOCK])))
        pair.filter.unplug()
    assert looks == 4 * 24
    assert stable.syncs < 2 * 10, "a batch syncs twice, and one without new blocks not at all"
