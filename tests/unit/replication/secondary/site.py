"""A secondary on real overlays, its disk, and what its primary and its initiators do to it."""

import asyncio

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.assemble import secondary
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.stages import Mode
from tcmu_replication.units import BLOCK, MiB
from tests.support.tools import PATIENCE_S

LENGTH = 8 * MiB
OLD, FORWARDED, OWN = 0x11, 0x22, 0x33


class Disk(Memory):
    """A disk that can refuse writes."""

    failing = False

    def write(self, offset, buffers, fua=False):
        if self.failing:
            raise Error(Kind.IO, "the medium is broken")
        return super().write(offset, buffers, fua)


class SlowDisk(Disk):
    """A disk whose flush ends when the test says so."""

    syncing = None

    def flush(self):
        if self.syncing is None:
            return None
        self.syncing.append(Pending())
        return self.syncing[-1]


class ColdDisk(SlowDisk):
    """And whose reads end when the test says so."""

    reading = None

    def read(self, offset, buffers):
        if self.reading is None:
            return super().read(offset, buffers)
        self.reading.append((Pending(), offset, buffers))
        return self.reading[-1][0]

    def arrived(self):
        reading, self.reading = self.reading, None
        for pending, offset, buffers in reading:
            self.read(offset, buffers)
            pending.complete()


class Site:
    """A secondary in `directory`; `export` is what the primary would be connected to."""

    def __init__(self, directory, disk=None, *, durable=True, **options):
        self.directory = directory
        self.disk = disk or Disk(LENGTH)
        self.export = None
        self.epochs = Epochs(directory, self.disk)
        self.durable = durable
        self.options = {"top_id": "disk0"} | options
        self.engine = self.make()

    def make(self):
        return secondary(
            "disk0",
            self.disk,
            self.epochs,
            durable=self.durable,
            publish=self.publish,
            withdraw=self.withdraw,
            **self.options,
        )

    async def publish(self, node):
        self.export = node

    async def withdraw(self):
        self.export = None

    async def reopen(self):
        """What a new process finds after the old one was killed: no close was called."""
        if self.engine.receiver.pair is not None:
            self.engine.receiver.pair.close()
        if self.engine.receiver.next is not None:
            self.engine.receiver.next.close()
        self.export = None
        self.engine = self.make()
        await self.engine.open()

    async def forward(self, offset, length, byte=FORWARDED):
        pending = self.export.write(offset, [memoryview(bytes([byte]) * length)])
        self.export.unplug()
        await settle(pending)

    async def own(self, offset, length, byte=OWN):
        await settle(self.engine.top.write(offset, [memoryview(bytes([byte]) * length)]))

    async def top(self, offset, length=BLOCK):
        view = memoryview(bytearray(length))
        await settle(self.engine.top.read(offset, [view]))
        return set(bytes(view))

    def sec(self, offset, length=BLOCK):
        return set(self.disk.data[offset : offset + length])

    async def committed(self):
        await self.engine.role.ended()


def run(coroutine):
    return asyncio.run(coroutine)


async def started(site):
    await site.engine.open()
    assert await site.engine.start(Mode.SECONDARY)
    return site


async def until(condition):
    """Wait for what a thread, or the loop's other work, does."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def failed_over_unflushed(tmp_path):
    """After a failover to the checkpoint with durable = false, whose commit still makes that stable."""
    site = Site(tmp_path, SlowDisk(LENGTH), durable=False)
    site.disk.data[:] = bytes([OLD]) * LENGTH
    await started(site)
    await site.forward(0, MiB)
    site.disk.syncing = []
    assert await site.engine.failover(latest=False)
    await until(lambda: site.disk.syncing)
    return site


async def killed(site):
    await site.engine.role.leave()
    site.disk.syncing = None
