"""Copy-before-write where old data has to be read from the disk first: beside each other, in order, whole or not."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from tcmu_replication.block.copy_before_write import ALL_READS, LARGE, PIECE, READS, TURN, CopyBeforeWrite
from tcmu_replication.block.faults import Faults, Rule
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import HeldOffload, make_image
from tests.unit.block.test_copy_before_write import BLOCK, LENGTH, OLD, Pair, changed

DURABLE = pytest.mark.parametrize("is_durable", [False, True], ids=["plain", "durable"])


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def release(rule: Rule, number: int = 0) -> None:
    """End one of the reads that are held."""
    rule.held.pop(number).release()


@DURABLE
def test_cbw_reads_old_data_of_many_writes_beside_each_other(tmp_path: Path, is_durable: bool) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    reads = pair.disk.delay("read")
    ends = [pair.write(n * BLOCK + n, bytes([n + 1]) * 100) for n in range(6)]
    pair.filter.unplug()
    assert len(reads.held) == 6
    assert ends == [[]] * 6
    assert pair.memory.data == OLD
    for left in range(6, 0, -1):
        release(reads, left // 2)
        assert ends.count([True]) == 7 - left, "a write ends with its own read"
    assert pair.memory.data == changed(*((n * BLOCK + n, bytes([n + 1]) * 100) for n in range(6)))
    assert pair.checkpoint() == OLD
    assert not pair.ledger.outstanding


@DURABLE
@pytest.mark.parametrize("operation", ["write", "zero", "discard"])
def test_cbw_reads_the_pieces_of_one_request_beside_each_other(
    tmp_path: Path, operation: str, is_durable: bool
) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    pair.write(2 * BLOCK, b"x")
    pair.filter.unplug()
    reads = pair.disk.delay("read")
    at = (1, [memoryview(bytes(LENGTH - 1))]) if operation == "write" else (1, LENGTH - 1)
    pending = getattr(pair.filter, operation)(*at)
    pair.filter.unplug()
    assert len(reads.held) == 2, "what lies before the block that is here, and what lies behind it"
    release(reads, 1)
    assert not pending.done
    assert pair.memory.data == changed((2 * BLOCK, b"x"))
    release(reads)
    assert pending.done
    assert pending.error is None
    assert pair.memory.data == OLD[:1] + bytes(LENGTH - 1)
    assert pair.checkpoint() == OLD


@DURABLE
def test_cbw_writes_of_a_block_keep_their_order_while_it_is_read(tmp_path: Path, is_durable: bool) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    reads = pair.disk.delay("read")
    first, second = pair.write(0, b"1" * BLOCK), pair.write(10, b"22" * BLOCK)
    third, other = pair.write(BLOCK + 5, b"3"), pair.write(5 * BLOCK, b"4")
    assert len(reads.held) == 3, "each block is read once"
    release(reads, 2)
    pair.filter.unplug()
    assert (first, second, third, other) == ([], [], [], [True])
    release(reads, 1)
    assert (first, second, third) == ([], [], []), "the second has its own block, and waits for the first"
    release(reads)
    assert (first, second, third) == ([True], [True], [True])
    assert pair.memory.data == changed(
        (0, b"1" * BLOCK), (10, b"22" * BLOCK), (BLOCK + 5, b"3"), (5 * BLOCK, b"4")
    )
    assert pair.checkpoint() == OLD
    assert not pair.ledger.outstanding


def test_cbw_durable_neighbours_that_waited_for_each_other_are_one_batch(tmp_path: Path) -> None:
    offload = HeldOffload()
    pair = Pair(tmp_path, durable=True, offload=offload)
    reads = pair.disk.delay("read")
    ends = [pair.write(start, b"n" * BLOCK) for start in range(700, 4 * BLOCK, BLOCK)]
    pair.filter.unplug()
    while reads.held:
        release(reads, -1)
    assert ends == [[]] * 4
    offload.run_next()
    offload.run_next()
    assert ends == [[True]] * 4
    assert not offload.calls
    assert pair.checkpoint() == OLD


@DURABLE
def test_cbw_read_error_fails_the_write_that_needed_it_alone(tmp_path: Path, is_durable: bool) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    reads = pair.disk.delay("read")
    first, second, third = pair.write(0, b"11" * BLOCK), pair.write(BLOCK, b"2"), pair.write(10, b"3")
    assert len(reads.held) == 1
    pair.below.fail("read", Kind.IO, count=1)
    release(reads)
    pair.filter.unplug()
    assert (first, second, third) == ([False], [], [])
    assert [error.kind for error in pair.told] == [Kind.IO]
    assert len(reads.held) == 2, "those behind it read for themselves"
    assert pair.memory.data == OLD
    release(reads)
    release(reads)
    assert (second, third) == ([True], [True])
    assert pair.memory.data == changed((BLOCK, b"2"), (10, b"3"))
    assert pair.checkpoint() == OLD
    assert not pair.ledger.outstanding


@DURABLE
def test_cbw_error_of_one_piece_waits_for_the_other_reads(tmp_path: Path, is_durable: bool) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    pair.write(2 * BLOCK, b"x")
    pair.filter.unplug()
    reads = pair.disk.delay("read")
    ended = pair.write(BLOCK, b"n" * 3 * BLOCK)
    pair.below.fail("read", Kind.IO, count=1)
    release(reads)
    assert ended == []
    with pytest.raises(Error, match="drain"):
        pair.filter.retarget(pair.hidden)
    release(reads)
    assert ended == [False]
    assert not pair.ledger.outstanding
    assert pair.memory.data == changed((2 * BLOCK, b"x"))
    assert pair.checkpoint() == OLD
    pair.filter.retarget(pair.hidden)


@DURABLE
def test_cbw_after_an_error_nothing_more_is_read(tmp_path: Path, is_durable: bool) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    pair.write(2 * BLOCK, b"x")
    pair.filter.unplug()
    reads = pair.disk.fail("read")
    with pytest.raises(Error):
        pair.write(BLOCK, b"n" * 3 * BLOCK)
    assert reads.met == 1


def test_cbw_covered_block_passes_those_that_wait_and_others_do_not_stop(pair: Pair) -> None:
    pair.write(5 * BLOCK, b"x")
    reads = pair.disk.delay("read", count=1)
    waits = pair.write(0, b"1")
    assert pair.write(5 * BLOCK, b"y") == [True]
    assert pair.write(2 * BLOCK, b"z") == [True], "and so does a block that is cached"
    release(reads)
    assert waits == [True]
    assert pair.checkpoint() == OLD


def test_cbw_drain_waits_for_reads_under_way(pair: Pair) -> None:
    gate = Gate(pair.filter)
    reads = pair.disk.delay("read")
    gate.write(0, [memoryview(b"1")])
    gate.hold()
    assert gate.drained() is not None
    reads.release()
    assert gate.drained() is None


def test_cbw_closes_the_disk_when_nothing_waits(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(pair.disk, "close", lambda: closed.append(True))
    reads = pair.disk.delay("read")
    ended = pair.write(0, b"1")
    pair.filter.close()
    assert closed == []
    reads.release()
    assert (ended, closed) == ([True], [True])
    assert pair.memory.data == changed((0, b"1"))


@DURABLE
def test_cbw_many_writes_of_one_block_in_a_row(tmp_path: Path, is_durable: bool) -> None:
    pair = Pair(tmp_path, durable=is_durable)
    reads = pair.disk.delay("read")
    ends = [pair.write(0, n.to_bytes(2, "big")) for n in range(3000)]
    assert len(reads.held) == 1
    reads.release()
    pair.filter.unplug()
    assert ends == [[True]] * 3000
    assert pair.memory.data == changed((0, (2999).to_bytes(2, "big")))


def test_cbw_write_made_by_whoever_is_told_of_an_end_waits_its_turn(pair: Pair) -> None:
    reads = pair.disk.delay("read")
    first = pair.filter.write(0, [memoryview(b"11")])
    second = pair.write(1, b"22")
    third: list[list[bool]] = []
    assert first is not None
    first.then(lambda _: third.append(pair.write(2, b"33")))
    reads.release()
    assert second == [True]
    assert third == [[True]]
    assert pair.memory.data == changed((0, b"1233"))


def test_cbw_long_request_reads_a_bounded_part_of_its_range_at_once(tmp_path: Path) -> None:
    length = 3 * READS * PIECE
    disk = Faults(Memory(length))
    hidden = Overlay.create("hidden", tmp_path / "hidden", disk)
    reads = disk.delay("read")
    filter_ = CopyBeforeWrite(disk, hidden)
    pending = filter_.discard(0, length)
    assert pending is not None
    while reads.held:
        assert len(reads.held) <= READS
        release(reads, len(reads.held) // 2)
    assert pending.done
    assert hidden.covers(0, length)
    assert reads.met == length // PIECE
    hidden.close()


@DURABLE
def test_cbw_many_long_requests_read_a_bounded_part_together_and_all_end(
    tmp_path: Path, is_durable: bool
) -> None:
    number, length = 2 * ALL_READS, 3 * PIECE
    memory = Memory(number * length)
    memory.data[:] = b"\7" * len(memory.data)
    disk = Faults(memory)
    hidden = Overlay.create("hidden", tmp_path / "hidden", memory)
    cbw = CopyBeforeWrite(disk, hidden, is_durable)
    reads = disk.delay("read")
    data = memoryview(b"n" * length)
    pendings = [cbw.write(n * length, [data]) for n in range(number)]
    cbw.unplug()
    most = 0
    while reads.held:
        most = max(most, len(reads.held))
        release(reads, len(reads.held) // 2)
    assert most <= ALL_READS + number
    assert all(pending is not None and pending.done and pending.error is None for pending in pendings)
    assert memory.data == b"n" * len(memory.data)
    assert hidden.covers(0, len(memory.data))


def test_cbw_long_request_lets_others_have_their_turn(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    length = 5 * TURN
    disk = Memory(length)
    hidden = Overlay.create("hidden", tmp_path / "hidden", disk)
    filter_ = CopyBeforeWrite(disk, hidden)

    async def run() -> None:
        disk.data[:] = b"x" * length
        long = filter_.zero(0, length - BLOCK)
        assert long is not None
        seen = []
        for _ in range(3):
            assert not long.done
            seen.append(hidden.allocated_bytes)
            await asyncio.sleep(0)
        assert seen == [TURN, 2 * TURN, 3 * TURN]
        assert filter_.write(length - BLOCK, [memoryview(b"n" * BLOCK)]) is None
        behind = filter_.write(0, [memoryview(b"n" * BLOCK)])
        assert behind is not None
        await settle(long)
        await settle(behind)
        assert hidden.covers(0, length)
        assert disk.data == b"n" * BLOCK + bytes(length - 2 * BLOCK) + b"n" * BLOCK
        hidden.close()

    loop.run_until_complete(run())


def test_cbw_with_a_cold_file_and_real_threads(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    length = 2 * LARGE + 700
    old = bytes(n * 37 % 251 + 1 for n in range(length))

    async def run() -> None:
        offload = Offload()
        disk = File(make_image(tmp_path / "disk", length), offload=offload)
        disk.write(0, [memoryview(old)])
        await settle(disk.flush())
        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        hidden = Overlay.create("hidden", tmp_path / "hidden", disk, offload=offload)
        filter_ = CopyBeforeWrite(disk, hidden)
        expected, dice, writes = bytearray(old), random.Random(5), []
        for stamp in range(1, 200):
            offset = dice.randrange(length)
            data = bytes([stamp]) * min(length - offset, dice.choice([1, BLOCK, BLOCK, 3 * PIECE // 2]))
            expected[offset : offset + len(data)] = data
            writes.append(filter_.write(offset, [memoryview(data)]))
            if stamp % 20 == 0:
                await asyncio.sleep(0)
        assert any(writes), "nothing had to be read"
        for write in writes:
            await settle(write)
        assert bytes(disk.fetch(0, length)) == expected
        assert bytes(hidden.fetch(0, length)) == old
        hidden.close()
        offload.close()

    loop.run_until_complete(run())
