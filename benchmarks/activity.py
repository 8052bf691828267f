"""What the activity log costs where it costs most: 4 KiB random writes over a disk four times as large as it covers.

The primary's chain without the worker around it, in this process: gate, log (or
none), mirror, a file and a peer over NBD that does nothing (nbdkit's null). So
the log's part of the time is larger than in a worker, which has a ring or a
socket in front too. For the same reason the disk is in memory; the log lies on
a real file system, for there a sync costs something. It is flushed while writes
go on, as an initiator's file system does: only then can extents leave, and be
missed again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import images, limits
from benchmarks.rows import Sample
from benchmarks.turn import Turn
from tcmu_replication.block.activity_log import TARGET, ActivityLog
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.in_flight import InFlight
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.block.remote import Remote
from tcmu_replication.block.replication import Forward
from tcmu_replication.nbd.uri import Unix
from tcmu_replication.units import KiB
from tests.support.tools import listens

ROWS = ("activity-off", "activity-on")
DISK = 4 * TARGET
BLOCK, DEPTH = 4 * KiB, 32
FLUSH_S = 1.0
"""How often it is flushed."""
WARM_UP = 4
"""A part of the work goes before: the log needs some syncs, about 20, until it has caught up with such a load."""


def measure(turn: Turn) -> Iterator[Sample]:
    """Writes a second with the log and without it."""
    path = turn.directory / "peer"
    with limits.nbdkit(f"size={DISK}", "-U", str(path), ready=partial(listens, path)):
        for row in ROWS[:: 1 if turn.number % 2 else -1]:
            count = turn.scale.activity // BLOCK
            with images.directory(turn.disks) as folder:
                log = folder / "log" if row == "activity-on" else None
                per_s, cpu_us = asyncio.run(_measure(turn.directory, log, turn.number, count))
            yield Sample(row, turn.side, per_s, cpu_us)


async def _measure(folder: Path, path: Path | None, seed: int, count: int) -> tuple[float, float]:
    """Writes a second, and the processor's time of each; with a log at `path`."""
    offload = Offload()
    disk = File(str(images.sparse(folder / "disk", DISK)), offload=offload)
    remote = Remote("remote", Unix(str(folder / "peer")), "", length=DISK)
    await remote.open()
    in_flight = InFlight(folder / "in-flight", DISK)
    in_flight.clear()
    mirror = Mirror("mirror", disk, report=lambda failure: None)
    mirror.attach(Forward("replication", remote, lambda *_: False), remote, in_flight)
    below: Node = mirror
    if path is not None:
        below = log = ActivityLog(mirror, path, offload=offload)
        await settle(log.clear())
    try:
        top = Gate(below)
        await _write(top, -1 - seed, count // WARM_UP)
        began, used = time.perf_counter(), time.process_time()
        await _write(top, seed, count)
        return count / (time.perf_counter() - began), 1e6 * (time.process_time() - used) / count
    finally:
        remote.close()
        await remote.wait_closed()
        below.close()
        in_flight.close()
        offload.close()


async def _write(top: Node, seed: int, count: int) -> None:
    """`count` random blocks, DEPTH at a time: those that have ended by then are replaced in one batch."""
    choose = random.Random(seed).randrange
    blocks = top.length // BLOCK
    data = [memoryview(random.Random(seed).randbytes(BLOCK))]
    loop = asyncio.get_running_loop()
    under_way = 0
    woken: asyncio.Future[None] | None = None

    def ended(write: Pending) -> None:
        nonlocal under_way
        if write.error is not None:
            raise write.error
        under_way -= 1
        if woken is not None and not woken.done():
            woken.set_result(None)

    flush: Pending | None = None
    flushed_s = time.monotonic()
    while count or under_way:
        batch = min(count, DEPTH - under_way)
        count -= batch
        for _ in range(batch):
            pending = top.write(choose(blocks) * BLOCK, data)
            if pending is not None:
                under_way += 1
                pending.then(ended)
        if time.monotonic() - flushed_s > FLUSH_S and (flush is None or flush.done):
            flushed_s = time.monotonic()
            flush = top.flush()
        top.unplug()
        if under_way:
            woken = loop.create_future()
            await woken
    await settle(flush)
