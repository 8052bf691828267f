"""A host loses power at any moment: where it differs from its peer then, its activity log says so.

The disk has a volatile cache of which any part may have been written back, block by block; the log is a real file
under `tests.support.power`; the peer takes each write sooner or later, or fails it. After every step it is checked for
all that a loss of power could find then: a block that may differ is in an extent that the log names whatever of it
was written back, or it is noted elsewhere (what the peer was known to miss, what was under way when a process died
alone). Now and then power is lost indeed. And both disks get overlapping writes in one order.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.block import activity_log
from tcmu_replication.block.activity_log import ActivityLog
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.hot_extents import EXTENT, PAGE, PER_SECTOR, SECTOR, extents_of
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.pending import Pending, attempt
from tcmu_replication.errors import Error, Kind
from tests.support.power import Power, Slow

BLOCK = 4096
PER_EXTENT = EXTENT // BLOCK
LENGTH = (2 * PER_SECTOR + 3) * EXTENT + BLOCK
BORDERS = [1, 2, PER_SECTOR, PER_SECTOR + 1, 2 * PER_SECTOR, 2 * PER_SECTOR + 3]
"""Extents around whose beginning writes are made: within a sector of the file, at its end, and the disk's last one."""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="tcmu-replication-log-"))
    yield path
    shutil.rmtree(path)


class Blocks(Node):
    """A disk as a number for each block that was written: only what its medium may hold counts."""

    def __init__(self, name: str) -> None:
        super().__init__(name, LENGTH)
        self.may: dict[int, list[int]] = {}

    def now(self, block: int) -> int:
        return self.may.get(block, [0])[-1]

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        self._store(offset, len(buffers[0]), int.from_bytes(buffers[0][:4], "little"))
        return None

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        self._store(offset, length, 0)
        return None

    def _store(self, offset: int, length: int, value: int) -> None:
        for block in range(offset // BLOCK, (offset + length) // BLOCK):
            self.may.setdefault(block, [0]).append(value)


class Disk(Blocks):
    """This host's disk: a flush covers what was written before it was asked for, and ends later."""

    def __init__(self) -> None:
        super().__init__("disk")
        self.flushes: list[tuple[dict[int, int], Pending]] = []

    def flush(self) -> Pending | None:
        self.flushes.append(({block: len(may) - 1 for block, may in self.may.items()}, Pending()))
        return self.flushes[-1][1]

    def end_flush(self, error: Error | None) -> None:
        covered, pending = self.flushes.pop(0)
        if error is None:
            for block, at in covered.items():
                # Whatever later flushes cover is counted from here on.
                kept = len(self.may[block]) - at
                del self.may[block][:at]
                for later, _ in self.flushes:
                    if block in later:
                        later[block] = max(0, later[block] - at)
                assert len(self.may[block]) == kept
        pending.complete(error)

    def lose_power(self, dice: random.Random) -> None:
        for block, may in self.may.items():
            self.may[block] = [dice.choice(may)]
        self.flushes.clear()


class Peer(Blocks):
    """The other host, which keeps its power: it takes writes in their order, and answers in any."""

    def __init__(self) -> None:
        super().__init__("peer")
        self.sent: list[tuple[int, int, int, Pending]] = []
        self.taken: list[Pending] = []

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        return self._send(offset, len(buffers[0]), int.from_bytes(buffers[0][:4], "little"))

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        return self._send(offset, length, 0)

    def flush(self) -> Pending | None:
        return None

    def _send(self, offset: int, length: int, value: int) -> Pending:
        self.sent.append((offset, length, value, Pending()))
        return self.sent[-1][3]

    def may_take(self, block: int) -> list[int]:
        """What it was sent, and may have taken."""
        return [value for at, length, value, _ in self.sent if at <= block * BLOCK < at + length]

    def take(self) -> None:
        offset, length, value, pending = self.sent.pop(0)
        self._store(offset, length, value)
        self.taken.append(pending)


def names(state: bytes, extent: int) -> bool:
    """Whether the file names the extent."""
    return bool(state[PAGE + extent // PER_SECTOR * SECTOR + extent % PER_SECTOR // 8] >> extent % 8 & 1)


class Host:
    """The primary, its peer, and what is noted elsewhere."""

    def __init__(self, folder: Path, dice: random.Random, power: Power) -> None:
        self.path, self.dice, self.power = folder / "activity-log", dice, power
        self.disk, self.peer = Disk(), Peer()
        self.noted: set[int] = set()
        self.under_way: list[tuple[range, Pending]] = []
        self.stamp = 0
        self.borders = BORDERS
        self.now_s = 0.0
        self.left = self.named = 0
        self.open()
        assert self.log.found is None
        self.clear()
        self.power.forget()

    def open(self) -> None:
        """What a process has when it begins."""
        self.slow = Slow(self.power)
        mirror = Mirror("mirror", self.disk, report=lambda failure: None)
        mirror.attach(self.peer, self.peer)
        self.log = ActivityLog(
            mirror,
            self.path,
            offload=self.slow,
            target=self.dice.choice([0, 2 * EXTENT]),
            clock=lambda: self.now_s,
        )
        self.top = Gate(self.log)
        self.power.synced(self.power.take_syncing())  # an open makes stable what it found

    def clear(self) -> None:
        cleared = self.log.clear()
        self.slow.all()
        assert cleared.error is None
        self.power.look()

    # Steps.

    def write(self) -> None:
        blocks = self.dice.choice(self.borders) * PER_EXTENT + self.dice.randrange(-2, 3)
        last = LENGTH // BLOCK
        first = min(max(blocks, 0), last - 1)
        count = min(self.dice.choice([1, 1, 2, 3]), last - first)
        self.stamp += 1
        offset, length = first * BLOCK, count * BLOCK
        if self.dice.random() < 0.8:
            data = self.stamp.to_bytes(4, "little") + bytes(length - 4)
            error, pending = attempt(self.top.write, offset, [memoryview(data)])
        else:
            error, pending = attempt(self.top.zero, offset, length)
        assert error is None
        if pending is not None:
            self.under_way.append((range(first, first + count), pending))
        if self.dice.random() < 0.7:
            self.top.unplug()

    def moves(self) -> None:
        """The load goes elsewhere."""
        self.borders = self.dice.sample(BORDERS, self.dice.choice([1, 1, 2, 6]))

    def unplug(self) -> None:
        self.top.unplug()

    def flush(self) -> None:
        self.now_s += self.dice.choice([0.0, activity_log.TURN_S, 100.0])
        before = self.log.hot_bytes
        attempt(self.top.flush)
        self.left += self.log.hot_bytes < before

    def flush_ends(self) -> None:
        if self.disk.flushes:
            before = self.log.hot_bytes
            self.disk.end_flush(Error(Kind.IO, "on cue") if self.dice.random() < 0.3 else None)
            self.left += self.log.hot_bytes < before

    def peer_takes(self) -> None:
        if self.peer.sent:
            self.peer.take()

    def peer_answers(self) -> None:
        if self.peer.taken:
            self.peer.taken.pop(self.dice.randrange(len(self.peer.taken))).complete()

    def peer_fails(self) -> None:
        """It does not take a write: that is noted before the write ends."""
        if self.peer.sent and self.dice.random() < 0.2:
            offset, length, _, pending = self.peer.sent.pop()
            self.noted |= set(range(offset // BLOCK, (offset + length) // BLOCK))
            pending.complete(Error(Kind.PEER_LOST, "on cue"))

    def store_begins(self) -> None:
        if self.slow.waiting:
            self.slow.begin()

    def store_ends(self) -> None:
        if self.slow.under_way:
            self.slow.end()

    def sync_fails(self) -> None:
        """Of the log; from then on only what is hot passes, until it is opened anew."""
        if self.dice.random() < 0.1:
            self.power.fails = 1
            self.slow.all()
            self.power.fails = 0

    def all_ends(self) -> None:
        self.top.unplug()
        while (
            self.slow.waiting or self.slow.under_way or self.peer.sent or self.peer.taken or self.disk.flushes
        ):
            self.slow.all()
            self.peer_takes()
            self.peer_answers()
            if self.disk.flushes:
                self.disk.end_flush(None)
        assert all(pending.done for _, pending in self.under_way)
        self.under_way.clear()
        self.same(self.noted)

    def process_dies(self) -> None:
        """Alone: what it had under way is known (`block.in_flight`), and noted. Its peer takes some of it."""
        if self.dice.random() < 0.3:
            self.dies()
            for blocks, pending in self.under_way:
                if not pending.done:
                    self.noted |= set(blocks)
            self.under_way.clear()
            self.open()
            self.log.go_on()

    def power_fails(self) -> None:
        if self.dice.random() < 0.4:
            next_boot = self.power.lose(self.dice)
            self.dies()
            next_boot()
            self.disk.lose_power(self.dice)
            self.open()
            found = self.log.found
            assert found is not None
            hot = {extent for at, length in found for extent in range(at // EXTENT, extents_of(at + length))}
            self.named += len(hot)
            differ = {block for block in self.blocks() if self.disk.now(block) != self.peer.now(block)}
            missed = {block for block in differ - self.noted if block // PER_EXTENT not in hot}
            assert not missed, f"blocks {sorted(missed)} differ; the log names {sorted(hot)}"
            self.resync()

    def check(self) -> None:
        """As if power were lost now."""
        self.power.look()
        states = self.power.states(self.path.name)
        for block in self.blocks() - self.noted:
            here, there = (
                set(self.disk.may.get(block, [0])),
                {self.peer.now(block), *self.peer.may_take(block)},
            )
            if len(here | there) > 1:
                extent = block // PER_EXTENT
                assert all(names(state, extent) for state in states), f"block {block} may differ unseen"

    def dies(self) -> None:
        """With all that it had under way."""
        for _ in range(self.dice.randrange(len(self.peer.sent) + 1)):
            self.peer.take()
        self.peer.sent.clear()
        self.peer.taken.clear()
        self.disk.flushes.clear()
        self.log.close()

    def resync(self) -> None:
        for block in self.blocks():
            self.disk.may[block] = [self.peer.now(block)]
            self.peer.may[block] = [self.peer.now(block)]
        self.noted.clear()
        self.under_way.clear()
        self.clear()

    def blocks(self) -> set[int]:
        return self.disk.may.keys() | self.peer.may.keys()

    def same(self, noted: set[int]) -> None:
        for block in self.blocks() - noted:
            assert self.disk.now(block) == self.peer.now(block), f"block {block} was written in another order"


def story(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> Host:
    dice = random.Random(seed)
    host = Host(folder, dice, Power(folder, monkeypatch))
    steps = {
        host.write: 10,
        host.moves: 1,
        host.unplug: 4,
        host.flush: 14,
        host.flush_ends: 16,
        host.peer_takes: 14,
        host.peer_answers: 18,
        host.peer_fails: 1,
        host.store_begins: 10,
        host.store_ends: 10,
        host.sync_fails: 1,
        host.all_ends: 1,
        host.process_dies: 1,
        host.power_fails: 2,
    }
    for step in dice.choices(list(steps), list(steps.values()), k=800):
        step()
        host.check()
    host.log.close()
    return host


@pytest.mark.parametrize("seed", range(60))
def test_where_hosts_differ_after_a_loss_of_power_is_in_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    story(folder, monkeypatch, seed)


def test_in_such_stories_extents_leave_and_others_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = []
    for seed in range(10):
        (tmp_path / str(seed)).mkdir()
        with monkeypatch.context() as patch:
            hosts.append(story(tmp_path / str(seed), patch, seed))
    assert sum(host.left for host in hosts) > 20
    assert sum(host.named for host in hosts) > 20
