"""The host loses power at any moment: every sector of the LUN reads as what was flushed, or as written since.

What the kernel had written back by then is chosen at random, part by part (`tests.support.power`), so marks
without their data and data without its marks are found in every mixture.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcmu_replication.block import space, unflushed
from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending, attempt, settle
from tcmu_replication.block.replication import Split
from tcmu_replication.jobs import commit as commits
from tcmu_replication.jobs.commit import Commit
from tests.support.power import SECTOR, Disk, Power, Slow, stamped, values

BLOCK = 4096
PER_BLOCK = BLOCK // SECTOR
LENGTH = 5 * BLOCK + 3 * SECTOR
SECTORS = LENGTH // SECTOR
OTHERS = 0xEEEEEEEE
"""What a recycled data file is full of."""


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="tcmu-replication-power-"))
    yield path
    shutil.rmtree(path)


def place(dice: random.Random) -> tuple[int, int]:
    """The first sector of a request and the one behind it: a part of a block, blocks, or anything."""
    if dice.random() < 0.4:
        first = dice.randrange(0, SECTORS, PER_BLOCK)
        return first, min(SECTORS, first + dice.choice([1, 1, 2, 6]) * PER_BLOCK)
    first = dice.randrange(SECTORS)
    return first, min(SECTORS, first + dice.choice([1, 1, 2, 9, 30]))


class Host:
    """The secondary's chain on files of `folder`, and what its LUN may show."""

    def __init__(self, folder: Path, dice: random.Random, power: Power) -> None:
        self.folder, self.dice, self.power = folder, dice, power
        self.stamp = 1000
        # A filesystem that takes no space back: what was zeroed stays in the data file.
        self.keeps_space = dice.random() < 0.5
        disk = [dice.choice([0, 1 + block]) for block in range(SECTORS)]
        (folder / "disk").write_bytes(b"".join(stamped(value, SECTOR) for value in disk))
        for name in ("hidden", "active"):
            (folder / f"{name}.old").write_bytes(stamped(OTHERS, -(-LENGTH // BLOCK) * BLOCK))
        self.lun = Disk(disk)
        self.opening(lambda *args, **to: Overlay.create(*args, **to, recycled=folder / f"{args[0]}.old"))
        self.power.forget()

    def opening(self, make: Callable[..., Overlay] = Overlay) -> None:
        """What a process has when it begins."""
        self.slow = Slow(self.power)
        self.disk = File(str(self.folder / "disk"), offload=self.slow)
        self.hidden = make("hidden", self.folder / "hidden", self.disk, offload=self.slow)
        self.active = make("active", self.folder / "active", self.hidden, offload=self.slow)
        for overlay in (self.hidden, self.active):  # as the engine does before it shows them
            overlay.sync_map()
        self.slow.all()
        if self.keeps_space:
            self.active.data._unsupported.add(space.PUNCH_HOLE)  # type: ignore[attr-defined]
        self.filter = CopyBeforeWrite(self.disk, self.hidden, True)
        self.primary, self.top = Gate(self.filter), Gate(self.active)

    def dies(self) -> None:
        """The process, and all that it had under way."""
        for file in (
            self.active.map.file.node,
            self.active.data,
            self.hidden.map.file.node,
            self.hidden.data,
            self.disk,
        ):
            file._in_threads = 0  # type: ignore[attr-defined]
            file.close() if file is self.disk else None
        self.active.release()
        self.hidden.release()

    def shown(self) -> list[int]:
        """All sectors of the LUN."""
        return values(bytes(self.active.fetch(0, LENGTH)))

    # Steps.

    def own(self) -> None:
        """A request of the LUN."""
        first, last = place(self.dice)
        operation = self.dice.choice(["write", "write", "write", "write", "fua", "zero", "discard"])
        self.stamp += 1
        change(self.top, self.lun, operation, first, last, self.stamp)

    def forwarded(self) -> None:
        """A request of the primary."""
        first, last = place(self.dice)
        self.stamp += 1
        data = memoryview(stamped(self.stamp, (last - first) * SECTOR))
        attempt(self.primary.write, first * SECTOR, [data])
        if self.dice.random() < 0.7:
            self.primary.unplug()

    def flush(self) -> None:
        """The LUN asks for a flush, or the primary does."""
        if self.dice.random() < 0.4:
            attempt(self.primary.flush)
        else:
            follow(self.lun, self.top.flush)

    def sync_begins(self) -> None:
        if self.slow.waiting:
            self.slow.begin(self.dice.randrange(len(self.slow.waiting)))

    def sync_ends(self) -> None:
        if self.slow.under_way:
            self.slow.end(self.dice.randrange(len(self.slow.under_way)))

    def all_ends(self) -> None:
        self.primary.unplug()
        self.slow.all()

    def sync_fails(self) -> None:
        """Then nothing can be flushed any more, until the process begins anew."""
        if self.dice.random() < 0.2:
            self.power.fails = 1
            self.flush()
            self.all_ends()
            self.power.fails = 0

    def process_dies(self) -> None:
        if self.dice.random() < 0.4:
            self.dies()
            self.opening()

    def power_fails(self) -> None:
        if self.dice.random() < 0.4:
            next_boot = self.power.lose(self.dice)
            self.dies()
            next_boot()
            self.opening()
            self.lun.settle(self.shown())


def follow(lun: Disk, call: Callable[[], Pending | None]) -> Pending | None:
    """Make a call that flushes, and believe what it says."""
    asked = lun.asked_to_flush()
    error, pending = attempt(call)
    if pending is not None:
        pending.then(lambda ended: lun.flushed(asked) if ended.error is None else None)
    elif error is None:
        lun.flushed(asked)
    return pending


def change(node: Node, lun: Disk, operation: str, first: int, last: int, stamp: int) -> Pending | None:
    """A write, zeroing or discard of the LUN."""
    if operation == "discard":  # of whole blocks: what becomes of parts is not said
        first, last = first // PER_BLOCK * PER_BLOCK, min(SECTORS, -(-last // PER_BLOCK) * PER_BLOCK)
    offset, length = first * SECTOR, (last - first) * SECTOR
    if operation in ("write", "fua"):
        lun.write(first, last, stamp)
        buffers = [memoryview(stamped(stamp, length))]
        if operation == "write":
            return attempt(node.write, offset, buffers)[1]
        # Made durable is what it wrote and all before: an overlay's FUA is a flush.
        return follow(lun, lambda: node.write(offset, buffers, True))
    lun.write(first, last, 0)
    return attempt(node.zero if operation == "zero" else node.discard, offset, length)[1]


def check_many(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    dice = random.Random(seed)
    host = Host(folder, dice, Power(folder, monkeypatch))
    steps = {
        host.own: 8,
        host.forwarded: 3,
        host.flush: 2,
        host.sync_begins: 4,
        host.sync_ends: 4,
        host.all_ends: 1,
        host.sync_fails: 1,
        host.process_dies: 1,
        host.power_fails: 2,
    }
    for step in dice.choices(list(steps), list(steps.values()), k=60):
        step()
        host.power.look()
        assert host.shown() == host.lun.now()
    host.dies()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("step", [1, unflushed.STEP], ids=["in-steps", "at-once"])
def test_running_secondary_loses_nothing_that_was_flushed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int, step: int
) -> None:
    monkeypatch.setattr(unflushed, "STEP", step)
    check_many(folder, monkeypatch, seed)


class Failover:
    """The commit, and what the LUN writes meanwhile, until the power or the process fails or all is on the disk."""

    def __init__(self, host: Host) -> None:
        self.host, self.dice, self.slow = host, host.dice, host.slow
        self.gate = Gate(host.active)
        self.job = Commit("commit", host.active, host.hidden, host.disk, self.gate, self.slow)
        self.split = Split(host.active, host.hidden, host.disk, self.job.redo)
        hold = self.gate.hold()
        self.gate.swap(self.split)
        hold.release()
        self.flushes: list[Pending | None] = []

    async def requests(self) -> None:
        """One write at a time; flushes beside them."""
        while True:
            if self.dice.random() < 0.4:
                self.flushes.append(follow(self.host.lun, self.gate.flush))
            else:
                first, last = place(self.dice)
                operation = self.dice.choice(["write", "write", "write", "fua", "zero", "discard"])
                self.host.stamp += 1
                await settle(change(self.gate, self.host.lun, operation, first, last, self.host.stamp))
            for _ in range(self.dice.randrange(5)):
                await asyncio.sleep(0)

    async def run(self, turns: int) -> bool:
        """Whether the commit came to its end within so many turns of the loop."""
        commit = asyncio.create_task(self.job.run())
        requests = asyncio.create_task(self.requests())
        while not commit.done() and (turns := turns - 1):
            self.dice.choice([self.host.sync_begins, self.host.sync_ends])()
            await asyncio.sleep(0)
            self.host.power.look()
            assert self.gate.held or self.host.shown() == self.host.lun.now()
        ended = commit.done()

        next_boot = self.host.power.lose(self.dice) if self.dice.random() < 0.7 else None
        if ended:
            await commit
            requests.cancel()
            while self.slow.waiting or self.slow.under_way:
                self.slow.all()
                await asyncio.sleep(0)
        else:
            self.slow.die()
        requests.cancel()
        await asyncio.gather(commit, requests, return_exceptions=True)
        if not ended:
            self.host.dies()
            if next_boot is not None:
                next_boot()
            self.host.opening()
            if next_boot is None:
                assert self.host.shown() == self.host.lun.now()
            else:
                self.host.lun.settle(self.host.shown())
        return ended


@pytest.mark.parametrize("seed", range(40))
def test_commit_and_the_writes_beside_it_lose_nothing_that_was_flushed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name, value in (("PIECE", BLOCK), ("WINDOW", BLOCK), ("LAST", BLOCK)):
        monkeypatch.setattr(commits, name, value)
    dice = random.Random(seed)
    host = Host(folder, dice, Power(folder, monkeypatch))
    for step in dice.choices([host.own, host.forwarded, host.flush, host.all_ends], k=12):
        step()
        host.power.look()
    host.all_ends()
    while not asyncio.run(Failover(host).run(dice.choice([30, 60, 90, 150]))):
        pass
    assert values(bytes(host.disk.fetch(0, LENGTH))) == host.lun.now()
    host.dies()
