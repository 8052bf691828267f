"""The commit job: the chain reads the same at every moment, and what is written meanwhile is right at its end."""

import asyncio
import random
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.block.replication import Split
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs import commit as commits
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.units import BLOCK, MiB, round_down
from tests.support.tools import PATIENCE_S

LENGTH = 8 * MiB + 512
"""The last block is a part."""


def after_turns(turns, call):
    """Make a call some turns of the loop later."""
    asyncio.get_running_loop().call_soon(*((after_turns, turns - 1, call) if turns else (call,)))


class SlowSync(Memory):
    """A disk whose sync takes a few turns of the loop, so that requests come in between.

    `stable` is what a loss of power would leave.
    """

    def __init__(self, length):
        super().__init__(length)
        self.stable = bytes(length)

    def flush(self):
        pending = Pending()
        after_turns(2, partial(self._synced, pending, bytes(self.data)))
        return pending

    def _synced(self, pending, stable):
        self.stable = stable
        pending.complete()


class HeldSync(Memory):
    """A disk whose syncs end when the test says so."""

    def __init__(self, length):
        super().__init__(length)
        self.syncs = []

    def flush(self):
        self.syncs.append(Pending())
        return self.syncs[-1]


class Broken(Memory):
    """A disk that takes no writes at `bad`, and says where it took them."""

    def __init__(self, length, bad):
        super().__init__(length)
        self.bad = bad
        self.written = set()

    def write(self, offset, buffers, fua=False):
        if offset <= self.bad < offset + len(buffers[0]):
            raise Error(Kind.IO, "the medium is broken")
        self.written.add(offset)
        return super().write(offset, buffers, fua)


class Switch:
    """The LUN as the secondary's engine has it during a commit."""

    def __init__(self, directory, disk):
        self.disk = disk
        self.hidden = Overlay.create("hidden", directory / "hidden", disk)
        self.active = Overlay.create("active", directory / "active", self.hidden)

    def holds(self, offset):
        """Whether this block still counts in one of the overlays."""
        return self.active.allocated(offset, 1) or self.hidden.allocated(offset, 1)

    @contextmanager
    def commit(self):
        """The job, where the LUN's writes go, and the gate above."""
        gate = Gate(self.active)
        offload = Offload(threads=commits.THREADS)
        job = Commit("commit", self.active, self.hidden, self.disk, gate, offload)
        split = Split(self.active, self.hidden, self.disk, job.redo)
        hold = gate.hold()
        gate.swap(split)
        hold.release()
        try:
            yield job, split, gate
        finally:
            offload.close()


async def until(condition):
    """Let the loop turn until it is so."""
    while not condition():
        await asyncio.sleep(0)


def fill(node, rng, model, count):
    """Random writes and zeroes through `node` and into the model."""
    for _ in range(count):
        offset = rng.randrange(LENGTH // 512) * 512
        length = min(rng.choice([512, 4096, 8192, 100 * 1024]), LENGTH - offset)
        if rng.random() < 0.2:
            node.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            node.write(offset, [memoryview(data)])
            model[offset : offset + length] = data


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(commits, "PIECE", 64 * 1024)
    monkeypatch.setattr(commits, "WINDOW", 256 * 1024)
    monkeypatch.setattr(commits, "LAST", 128 * 1024)


@pytest.mark.parametrize("seed", range(12))
def test_commit_under_writes_ends_with_the_disk_as_the_lun(tmp_path, seed):
    rng = random.Random(seed)
    disk = SlowSync(LENGTH)
    disk.data[:] = rng.randbytes(LENGTH)
    chain = Switch(tmp_path, disk)
    model = bytearray(disk.data)
    fill(chain.active, rng, model, 40)
    for _ in range(40):
        # What hidden holds is the checkpoint; the disk below holds what the primary wrote since.
        offset = rng.randrange(LENGTH // BLOCK) * BLOCK
        for start, length in chain.hidden.missing(offset, BLOCK):
            chain.hidden.save(start, disk.fetch(start, length))
            disk.write(start, [memoryview(rng.randbytes(length))])

    async def story():
        with chain.commit() as (job, split, gate):
            running = asyncio.create_task(job.run())
            checked = 0
            while not running.done():
                if not gate.held:
                    fill(split, rng, model, 1)
                    offset = rng.randrange(LENGTH - BLOCK)
                    assert bytes(chain.active.fetch(offset, BLOCK)) == bytes(model[offset : offset + BLOCK])
                    checked += 1
                await asyncio.sleep(0)
            await running
            assert checked > 3
            return job

    job = asyncio.run(story())
    assert job.status is JobStatus.CONCLUDED
    assert job.offset == job.length > 0
    assert chain.active.allocated_bytes == chain.hidden.allocated_bytes == 0
    assert disk.data == model


@pytest.mark.parametrize("seed", range(6))
def test_what_is_forgotten_survives_a_loss_of_power(tmp_path, seed):
    rng = random.Random(seed)
    chain = Switch(tmp_path, SlowSync(LENGTH))
    model = bytearray(LENGTH)
    fill(chain.active, rng, model, 60)
    blocks = [offset for offset in range(0, LENGTH, BLOCK) if chain.holds(offset)]

    async def story():
        with chain.commit() as (job, split, gate):
            running = asyncio.create_task(job.run())
            while not running.done():
                # Writes of the LUN go to held blocks alone: those to the disk are the client's to flush.
                offset = rng.choice(blocks)
                if not gate.held and chain.holds(offset):
                    data = rng.randbytes(min(BLOCK, LENGTH - offset))
                    split.write(offset, [memoryview(data)])
                    model[offset : offset + BLOCK] = data
                for offset in blocks:
                    if not chain.holds(offset):
                        assert chain.disk.stable[offset : offset + BLOCK] == model[offset : offset + BLOCK]
                time.sleep(0)  # lets the threads have the interpreter
                await asyncio.sleep(0)
            await running

    asyncio.run(story())
    assert chain.disk.stable == model


def test_commit_of_nothing_concludes(tmp_path):
    async def story():
        with Switch(tmp_path, Memory(LENGTH)).commit() as (job, _, gate):
            await job.run()
            assert job.status is JobStatus.CONCLUDED
            assert not gate.held

    asyncio.run(story())


def test_windows_are_copied_while_one_is_synced_but_not_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "THREADS", 1)  # so that the syncs come in the order of the windows

    async def story():
        chain = Switch(tmp_path, HeldSync(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * 4 * MiB)])
        with chain.commit() as (job, _, _):
            running = asyncio.create_task(job.run())
            ahead = commits.AHEAD * commits.WINDOW
            await until(lambda: len(chain.disk.syncs) == commits.AHEAD)
            assert chain.disk.data[:ahead] == b"\5" * ahead
            assert not any(chain.disk.data[ahead:])
            assert chain.active.allocated_bytes == 4 * MiB
            chain.disk.syncs[1].complete()  # a later window never goes before an earlier one
            for _ in range(10):
                await asyncio.sleep(0)
            assert chain.active.allocated_bytes == 4 * MiB
            chain.disk.syncs[0].complete()
            await until(lambda: chain.active.allocated_bytes == 4 * MiB - 2 * commits.WINDOW)
            assert not chain.holds(0)
            await finished(running, chain.disk)
            assert chain.disk.data[: 4 * MiB] == b"\5" * 4 * MiB

    asyncio.run(story())


async def finished(running, disk):
    """Let every sync end until the commit has."""
    while not running.done():
        for pending in disk.syncs:
            if not pending.done:
                pending.complete()
        await asyncio.sleep(0)
    await running


def test_write_to_a_window_that_is_being_synced_is_copied_again(tmp_path, monkeypatch):
    monkeypatch.setattr(commits, "THREADS", 1)  # so that the syncs come in the order of the windows

    async def story():
        chain = Switch(tmp_path, HeldSync(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * 4 * MiB)])
        with chain.commit() as (job, split, _):
            running = asyncio.create_task(job.run())
            await until(lambda: len(chain.disk.syncs) == commits.AHEAD)
            written = [BLOCK, commits.WINDOW - 512, commits.WINDOW + 3 * BLOCK]
            for offset in written:  # the second is of two windows
                split.write(offset, [memoryview(b"\6" * 1024)])
            kept = {BLOCK, commits.WINDOW - BLOCK, commits.WINDOW, commits.WINDOW + 3 * BLOCK}
            for pending in chain.disk.syncs[:2]:
                pending.complete()
            await until(lambda: not chain.holds(0) and not chain.holds(2 * commits.WINDOW - BLOCK))
            held = {offset for offset in range(0, 2 * commits.WINDOW, BLOCK) if chain.holds(offset)}
            assert held == kept
            await finished(running, chain.disk)
            expected = bytearray(b"\5" * 4 * MiB)
            for offset in written:
                expected[offset : offset + 1024] = b"\6" * 1024
            assert chain.disk.data[: 4 * MiB] == expected

    asyncio.run(story())


def test_write_to_what_is_forgotten_is_not_undone_by_a_later_pass(tmp_path):
    async def story():
        chain = Switch(tmp_path, HeldSync(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * MiB)])
        with chain.commit() as (job, split, _):
            running = asyncio.create_task(job.run())
            await until(lambda: len(chain.disk.syncs) == commits.AHEAD)
            split.write(0, [memoryview(b"\6" * MiB)])  # all of it has to be copied again
            for pending in chain.disk.syncs:
                pending.complete()
            late = set()
            while not running.done():
                for offset in range(0, MiB, BLOCK):
                    if not chain.holds(offset) and offset not in late:
                        split.write(offset, [memoryview(b"\7" * BLOCK)])
                        late.add(offset)
                for pending in chain.disk.syncs:
                    if not pending.done:
                        pending.complete()
                time.sleep(0)  # lets the threads have the interpreter
                await asyncio.sleep(0)
            await running
            assert late
            assert all(
                chain.disk.data[offset] == (7 if offset in late else 6) for offset in range(0, MiB, BLOCK)
            )

    asyncio.run(story())


@pytest.mark.parametrize("bad", [0, 640 * 1024, MiB, 2 * MiB - 1])
def test_commit_fails_with_the_disk_and_loses_nothing(tmp_path, bad):
    rng = random.Random(bad)
    data = rng.randbytes(2 * MiB)

    async def story():
        chain = Switch(tmp_path, Broken(LENGTH, bad))
        chain.active.write(0, [memoryview(data)])
        with chain.commit() as (job, _, gate):
            with pytest.raises(Error, match="the medium is broken"):
                await job.run()
            assert job.status is JobStatus.FAILED
            assert "the medium is broken" in job.error
            assert job.failed_to == "write"
            assert not gate.held
        assert chain.active.fetch(0, 2 * MiB) == data
        chain.disk.bad = -1
        with chain.commit() as (job, _, _):
            await job.run()
        assert chain.disk.data[: 2 * MiB] == data

    asyncio.run(story())


class Late(Memory):
    """A disk that answers a write before it has made it: no disk of ours does."""

    def write(self, offset, buffers, fua=False):
        return Pending()

    def zero(self, offset, length, fua=False, unmap=True):
        return Pending()


@pytest.mark.parametrize("data", [b"x" * MiB, None], ids=["data", "zeroes"])
def test_commit_to_a_disk_that_has_not_written_yet_fails_and_forgets_nothing(tmp_path, data):
    """N: it was an assert, which python -O leaves out."""

    async def story():
        chain = Switch(tmp_path, Late(LENGTH))
        chain.active.zero(0, MiB) if data is None else chain.active.write(0, [memoryview(data)])
        with chain.commit() as (job, _, _), pytest.raises(Error, match="does not write at once"):
            await job.run()
        assert chain.active.fetch(0, MiB) == (data or bytes(MiB))
        assert chain.holds(0)

    asyncio.run(story())


def test_commit_fails_with_the_sync_and_forgets_nothing(tmp_path):
    async def story():
        chain = Switch(tmp_path, HeldSync(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * 2 * MiB)])
        with chain.commit() as (job, _, _):
            running = asyncio.create_task(job.run())
            await until(lambda: len(chain.disk.syncs) == commits.AHEAD)  # in whatever order
            for sync in chain.disk.syncs:
                sync.complete(Error(Kind.IO, "the medium is broken"))
            with pytest.raises(Error, match="the medium is broken"):
                await running
        assert chain.active.allocated_bytes == 2 * MiB

    asyncio.run(story())


def test_commit_that_cannot_read_says_so(tmp_path, monkeypatch):
    def broken(offset, length):
        raise Error(Kind.IO, "the medium is broken")

    async def story():
        chain = Switch(tmp_path, Memory(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * BLOCK)])
        monkeypatch.setattr(chain.active, "fetch", broken)
        with chain.commit() as (job, _, _):
            with pytest.raises(Error, match="the medium is broken"):
                await job.run()
            assert job.failed_to == "read"

    asyncio.run(story())


class Stuck(Memory):
    """A disk whose writes at `stuck` wait for the test and at `bad` fail; the others pass."""

    def __init__(self, length, stuck, bad=-1):
        super().__init__(length)
        self.go = threading.Event()
        self.stuck = stuck
        self.bad = bad
        self.failed = False
        self.begun = []
        self.ended = []

    def write(self, offset, buffers, fua=False):
        if offset == self.bad:
            self.failed = True
            raise Error(Kind.IO, "the medium is broken")
        self.begun.append(offset)
        if offset in self.stuck:
            assert self.go.wait(PATIENCE_S)
        super().write(offset, buffers, fua)
        self.ended.append(offset)


def test_commit_that_fails_in_a_thread_waits_for_the_other(tmp_path):
    async def story():
        chain = Switch(tmp_path, Stuck(LENGTH, {0}, bad=commits.PIECE))
        chain.active.write(0, [memoryview(b"\5" * MiB)])
        with chain.commit() as (job, _, _):
            running = asyncio.create_task(job.run())
            await until(lambda: chain.disk.failed and chain.disk.begun)
            for _ in range(10):
                await asyncio.sleep(0)
            assert not running.done()
            chain.disk.go.set()
            with pytest.raises(Error, match="the medium is broken"):
                await running
            assert set(range(0, commits.WINDOW, commits.PIECE)).isdisjoint({*chain.disk.ended} - {0})
            assert sorted(chain.disk.begun) == sorted(chain.disk.ended)
        assert chain.active.allocated_bytes == MiB

    asyncio.run(story())


def test_window_is_finished_though_the_next_has_failed_already(tmp_path):
    async def story():
        chain = Switch(tmp_path, Stuck(LENGTH, {commits.WINDOW - commits.PIECE}, bad=commits.WINDOW))
        chain.active.write(0, [memoryview(b"\5" * MiB)])
        with chain.commit() as (job, _, _):
            running = asyncio.create_task(job.run())
            await until(lambda: chain.disk.failed)
            assert not running.done()
            assert chain.active.allocated_bytes == MiB
            chain.disk.go.set()
            with pytest.raises(Error, match="the medium is broken"):
                await running
        assert chain.active.allocated_bytes == MiB - commits.WINDOW
        assert chain.active.fetch(0, MiB) == b"\5" * MiB

    asyncio.run(story())


def test_commit_cancelled_waits_for_its_threads(tmp_path):
    async def story():
        chain = Switch(tmp_path, Stuck(LENGTH, range(LENGTH)))
        chain.active.write(0, [memoryview(b"\5" * MiB)])
        with chain.commit() as (job, _, _):
            running = asyncio.create_task(job.run())
            await until(lambda: len(chain.disk.begun) == commits.THREADS)
            for _ in range(3):
                running.cancel()
                await asyncio.sleep(0)
            assert not running.done()
            chain.disk.go.set()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert job.status is JobStatus.CANCELLED
            assert len(chain.disk.ended) == commits.THREADS  # no piece was begun after that
        assert len(chain.disk.begun) == commits.THREADS
        assert chain.active.allocated_bytes == MiB

    asyncio.run(story())


def test_block_written_all_the_time_does_not_keep_the_commit_from_ending(tmp_path):
    async def story():
        chain = Switch(tmp_path, SlowSync(LENGTH))
        chain.active.write(0, [memoryview(b"\1" * MiB)])
        with chain.commit() as (job, split, gate):
            running = asyncio.create_task(job.run())
            for count in range(10_000):
                if running.done():
                    break
                if not gate.held:
                    split.write(0, [memoryview(bytes([count % 256]) * BLOCK)])
                    last = count % 256
                await asyncio.sleep(0)
            await running
            assert set(chain.disk.data[:BLOCK]) == {last}

    asyncio.run(story())


def test_lun_written_faster_than_it_is_copied_takes_turns_with_the_commit(tmp_path):
    class Turns(Gate):
        """Counts how often requests were held."""

        holds = 0

        def hold(self, limit_s=None):
            self.holds += 1
            return super().hold(limit_s)

    async def story():
        chain = Switch(tmp_path, SlowSync(LENGTH))
        chain.active.write(0, [memoryview(b"\1" * MiB)])
        with chain.commit() as (job, split, _):
            gate = Turns(split)
            job._gate = gate
            running = asyncio.create_task(job.run())
            answers = []
            waited = set()
            step = None
            while not running.done():
                before, step = step, ([*job._windows], gate.holds)
                if step != before:  # at each step of the commit all is written anew
                    byte = len(answers) % 255 + 1
                    answers.append((byte, gate.write(0, [memoryview(bytes([byte]) * MiB)])))
                    if gate.waiting:
                        waited.add(gate.holds)
                await asyncio.sleep(0)
            await running
            assert gate.holds == len(waited) == MiB // commits.LAST
            assert all(answer is None or answer.done for _, answer in answers)
            assert set(chain.disk.data[:MiB]) == {answers[-1][0]}

    asyncio.run(story())


def test_what_is_in_flight_ends_before_the_last_blocks_are_copied(tmp_path):
    async def story():
        chain = Switch(tmp_path, HeldSync(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * BLOCK)])
        with chain.commit() as (job, _, gate):
            gate.flush()
            running = asyncio.create_task(job.run())
            await until(lambda: gate.held)
            assert not any(chain.disk.data)
            await finished(running, chain.disk)
            assert chain.disk.data[:BLOCK] == b"\5" * BLOCK

    asyncio.run(story())


@pytest.mark.parametrize("dying", ["hidden", "active"])
def test_death_between_forgetting_in_one_overlay_and_the_other_shows_the_newest(tmp_path, monkeypatch, dying):
    class DeathError(Exception):
        """Not an `Error`: nothing in the product handles it."""

    def die(offset, length):
        raise DeathError

    async def story():
        chain = Switch(tmp_path, Memory(LENGTH))
        chain.hidden.save(0, memoryview(b"\1" * BLOCK))
        chain.active.write(0, [memoryview(b"\2" * BLOCK)])
        monkeypatch.setattr(getattr(chain, dying), "forget", die)
        with chain.commit() as (job, _, _), pytest.raises(DeathError):
            await job.run()
        assert chain.active.fetch(0, BLOCK) == b"\2" * BLOCK

    asyncio.run(story())


def test_commit_of_the_last_block_that_the_disk_ends_inside(tmp_path):
    async def story():
        disk = Memory(LENGTH)
        chain = Switch(tmp_path, disk)
        chain.active.write(LENGTH - 512, [memoryview(b"\7" * 512)])
        with chain.commit() as (job, _, _):
            await job.run()
        assert bytes(disk.data[-513:]) == b"\0" + b"\7" * 512

    asyncio.run(story())


def test_last_block_that_the_disk_ends_inside_is_copied_once(tmp_path):
    """A second copy would come after the block is forgotten, and undo what the LUN writes on the disk then."""

    async def story():
        last = round_down(LENGTH, BLOCK)
        chain = Switch(tmp_path, Stuck(LENGTH, set()))
        chain.active.write(0, [memoryview(b"\5" * MiB)])
        chain.active.write(LENGTH - 1, [memoryview(b"\5")])
        with chain.commit() as (job, _, _):
            await job.run()
        assert chain.disk.begun.count(last) == 1

    asyncio.run(story())


class PowerLoss:
    """What a loss of power leaves of `chain` at the worst: hidden's marks as last synced, all else as it is now."""

    def __init__(self, chain, directory):
        self.chain = chain
        self.directory = directory
        self.synced = self._marks()
        chain.hidden.sync_map = self._sync

    def _marks(self):
        return Path(f"{self.chain.hidden.path}.map").read_bytes()

    def _sync(self):
        pending = Pending()
        after_turns(11, partial(self._synced, pending, self._marks()))
        return pending

    def _synced(self, pending, marks):
        self.synced = marks
        pending.complete()

    def content(self):
        """All that the LUN reads then."""
        for overlay in (self.chain.hidden, self.chain.active):
            for kind in ("data", "map"):
                shutil.copyfile(f"{overlay.path}.{kind}", self.directory / f"{overlay.name}.{kind}")
        (self.directory / "hidden.map").write_bytes(self.synced)
        disk = Memory(LENGTH)
        disk.data[:] = self.chain.disk.stable
        active = Overlay(
            "active", self.directory / "active", Overlay("hidden", self.directory / "hidden", disk)
        )
        content = bytes(active.fetch(0, LENGTH))
        active.close()
        return content


@pytest.mark.parametrize("fua", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_the_lun_has_flushed_survives_a_loss_of_power(tmp_path, seed, fua):
    rng = random.Random(seed)
    chain = Switch(tmp_path, SlowSync(LENGTH))
    for offset in range(0, MiB, BLOCK):
        if rng.random() < 0.7:
            chain.hidden.save(offset, memoryview(rng.randbytes(BLOCK)))
    for offset in range(0, MiB, BLOCK):
        if rng.random() < 0.7:
            chain.active.write(offset, [memoryview(rng.randbytes(BLOCK))])
    model = bytearray(chain.active.fetch(0, LENGTH))
    (tmp_path / "lost").mkdir()
    lost = PowerLoss(chain, tmp_path / "lost")

    async def story():
        with chain.commit() as (job, split, gate):
            running = asyncio.create_task(job.run())
            while not running.done():
                offset = rng.randrange(0, MiB, 512)
                if not gate.held:
                    data = rng.randbytes(512)
                    await settle(split.write(offset, [memoryview(data)], fua))
                    if not fua:
                        await settle(split.flush())
                    model[offset : offset + 512] = data
                assert lost.content() == model
                await asyncio.sleep(0)
            await running

    asyncio.run(story())
    assert lost.content() == model


def test_large_zero_marks_to_be_copied_again_no_more_than_a_window_has(tmp_path):
    async def story():
        chain = Switch(tmp_path, HeldSync(LENGTH))
        for offset in range(0, 4 * MiB, 2 * BLOCK):
            chain.active.write(offset, [memoryview(b"\5" * BLOCK)])
        with chain.commit() as (job, split, _):
            running = asyncio.create_task(job.run())
            await until(lambda: len(chain.disk.syncs) == commits.AHEAD)
            split.zero(BLOCK - 512, LENGTH - BLOCK)
            for window in job._windows:
                assert window.redo == {run.offset // BLOCK for run in window.runs}
            await finished(running, chain.disk)
            assert chain.disk.data[: BLOCK - 512] == b"\5" * (BLOCK - 512)
            assert not any(chain.disk.data[BLOCK - 512 :])

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(4))
def test_split_sends_each_block_where_it_is_held(tmp_path, seed):
    rng = random.Random(seed)
    chain = Switch(tmp_path, Memory(LENGTH))
    for overlay in (chain.hidden, chain.active):
        for _ in range(30):
            offset = rng.randrange(LENGTH // BLOCK + 1) * BLOCK
            overlay.zero(offset, min(rng.choice([1, 2, 300]) * BLOCK, LENGTH - offset))
    told = set()
    split = Split(
        chain.active,
        chain.hidden,
        chain.disk,
        lambda at, n: told.update(range(at // BLOCK, (at + n - 1) // BLOCK + 1)),
    )
    for _ in range(50):
        start, end = sorted(rng.sample(range(LENGTH + 1), 2))
        told.clear()
        parts = split._parts(start, end - start)
        assert parts[0][0] == start
        assert parts[-1][0] + parts[-1][1] == end
        assert all(a[0] + a[1] == b[0] and a[2] is not b[2] for a, b in pairwise(parts))
        for offset, length, node in parts:
            for at in (offset, offset + length - 1, *range(offset, offset + length, BLOCK)):
                assert chain.holds(at) == (node is chain.active)
                assert (at // BLOCK in told) == (node is chain.active)
