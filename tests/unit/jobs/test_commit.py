"""The commit job: the chain reads the same at every moment, and what is written meanwhile is right at its end."""

import asyncio
import random
import threading

import pytest

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.replication import Split
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs import commit as commits
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.units import BLOCK, MiB

LENGTH = 8 * MiB + 512
"""The last block is a part."""


class SlowSync(Memory):
    """A disk whose sync takes a turn of the loop, so that requests come in between."""

    def flush(self):
        pending = Pending()
        asyncio.get_running_loop().call_soon(pending.complete)
        return pending


class Switch:
    """The LUN as the secondary's engine has it during a commit."""

    def __init__(self, directory, disk):
        self.disk = disk
        self.hidden = Overlay.create("hidden", directory / "hidden", disk)
        self.active = Overlay.create("active", directory / "active", self.hidden)

    def commit(self, offload=None):
        """The job, and the gate of the LUN."""
        gate = Gate(self.active)
        job = Commit("commit", self.active, self.hidden, self.disk, gate, offload)
        split = Split(self.active, self.hidden, self.disk, job.redo)
        return job, split, gate


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
    monkeypatch.setattr(commits, "CHUNK", 64 * 1024)
    monkeypatch.setattr(commits, "WINDOW", 256 * 1024)
    monkeypatch.setattr(commits, "LAST", 128 * 1024)


@pytest.mark.parametrize("threads", [False, True], ids=["loop", "threads"])
@pytest.mark.parametrize("seed", range(8))
def test_commit_under_writes_ends_with_the_disk_as_the_lun(tmp_path, seed, threads):
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
        offload = Offload() if threads else None
        job, split, gate = chain.commit(offload)
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
        if offload is not None:
            offload.close()
        assert checked > 3
        return job

    job = asyncio.run(story())
    assert job.status is JobStatus.CONCLUDED
    assert job.offset == job.length > 0
    assert chain.active.allocated_bytes == chain.hidden.allocated_bytes == 0
    assert disk.data == model


def test_commit_of_nothing_concludes(tmp_path):
    async def story():
        job, _, gate = Switch(tmp_path, Memory(LENGTH)).commit()
        await job.run()
        assert job.status is JobStatus.CONCLUDED
        assert not gate.held

    asyncio.run(story())


def test_commit_fails_with_the_disk_and_loses_nothing(tmp_path):
    class Broken(Memory):
        def write(self, offset, buffers, fua=False):
            if offset >= MiB:
                raise Error(Kind.IO, "the medium is broken")
            return super().write(offset, buffers, fua)

    async def story():
        chain = Switch(tmp_path, Broken(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * 2 * MiB)])
        job, _, gate = chain.commit()
        with pytest.raises(Error, match="the medium is broken"):
            await job.run()
        assert job.status is JobStatus.FAILED
        assert "the medium is broken" in job.error
        assert job.failed_to == "write"
        assert not gate.held
        assert bytes(chain.active.fetch(0, 2 * MiB)) == b"\5" * 2 * MiB

    asyncio.run(story())


def test_commit_that_cannot_read_says_so(tmp_path, monkeypatch):
    def broken(offset, length):
        raise Error(Kind.IO, "the medium is broken")

    async def story():
        chain = Switch(tmp_path, Memory(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * BLOCK)])
        monkeypatch.setattr(chain.active, "fetch", broken)
        job, _, _ = chain.commit()
        with pytest.raises(Error, match="the medium is broken"):
            await job.run()
        assert job.failed_to == "read"

    asyncio.run(story())


def test_commit_fails_with_a_thread_and_loses_nothing(tmp_path):
    class Broken(Memory):
        def write(self, offset, buffers, fua=False):
            raise Error(Kind.IO, "the medium is broken")

    async def story():
        chain = Switch(tmp_path, Broken(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * 2 * MiB)])
        offload = Offload()
        job, _, _ = chain.commit(offload)
        with pytest.raises(Error, match="the medium is broken"):
            await job.run()
        offload.close()
        assert job.status is JobStatus.FAILED
        assert bytes(chain.active.fetch(0, 2 * MiB)) == b"\5" * 2 * MiB

    asyncio.run(story())


def test_commit_cancelled_waits_for_its_threads(tmp_path):
    class Held(Memory):
        """A disk whose writes wait for the test, and are noted when they end."""

        go = threading.Event()
        ended = 0

        def write(self, offset, buffers, fua=False):
            assert self.go.wait(60)
            self.ended += 1
            return super().write(offset, buffers, fua)

    async def story():
        chain = Switch(tmp_path, Held(LENGTH))
        chain.active.write(0, [memoryview(b"\5" * MiB)])
        offload = Offload()
        job, _, _ = chain.commit(offload)
        running = asyncio.create_task(job.run())
        await asyncio.sleep(0)
        for _ in range(3):
            running.cancel()
            await asyncio.sleep(0)
        assert not running.done()
        chain.disk.go.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert job.status is JobStatus.CANCELLED
        before = chain.disk.ended
        offload.close()
        assert chain.disk.ended == before > 0
        assert chain.active.allocated_bytes == MiB

    asyncio.run(story())


def test_block_written_all_the_time_does_not_keep_the_commit_from_ending(tmp_path):
    async def story():
        chain = Switch(tmp_path, SlowSync(LENGTH))
        chain.active.write(0, [memoryview(b"\1" * MiB)])
        job, split, gate = chain.commit()
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


def test_commit_of_the_last_block_that_the_disk_ends_inside(tmp_path):
    async def story():
        disk = Memory(LENGTH)
        chain = Switch(tmp_path, disk)
        chain.active.write(LENGTH - 512, [memoryview(b"\7" * 512)])
        job, _, _ = chain.commit()
        await job.run()
        assert bytes(disk.data[-513:]) == b"\0" + b"\7" * 512

    asyncio.run(story())
