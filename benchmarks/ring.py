"""The ring by itself: the kernel's half in this process, our frontend, the SCSI unit, a file on tmpfs.

Only the time in which our half runs counts; the kernel's half is a test double.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import images
from benchmarks.rows import Sample
from benchmarks.scale import Scale
from benchmarks.turn import Turn
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.offload import Offload
from tcmu_replication.frontend.tcmu import TcmuFrontend
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.units import KiB
from tests.support.fake_kernel import FakeKernel

SECTOR = 512
BATCH = 32
_CDB_10 = struct.Struct(">BBIBHB")
_OPCODE = {"read": 0x28, "write": 0x2A}
"""READ (10) and WRITE (10) (SBC-4)."""


def measure(turn: Turn) -> list[Sample]:
    """Commands a second and CPU per command of each kind."""
    disk = images.full(turn.directory / "disk", turn.scale.disk)
    return asyncio.run(_measure(disk, turn.scale))


async def _measure(path: Path, scale: Scale) -> list[Sample]:
    offload = Offload()
    disk = File(str(path), offload=offload)
    samples = []
    try:
        for kind in _OPCODE:
            for name, length, total in (
                ("4k", 4 * KiB, scale.ring // 4),
                ("256k", 256 * KiB, scale.ring * 4),
            ):
                per_s, cpu_us = await _run(disk, kind, length, max(BATCH, total // length))
                samples.append(Sample(f"ring-{name}-{kind}", "ours", per_s, cpu_us))
    finally:
        disk.close()
        offload.close()
    return samples


async def _run(disk: File, kind: str, length: int, count: int) -> tuple[float, float]:
    """`count` commands in batches of BATCH, as an initiator with that queue depth sends them."""
    kernel = FakeKernel(data_size=2 * BATCH * length)
    loop = asyncio.get_running_loop()
    unit = LogicalUnit(disk.length, SECTOR, Identity)
    frontend = TcmuFrontend(kernel.open(), kernel, unit, Gate(disk), loop)
    await frontend.start()
    blocks = length // SECTOR
    choose = random.Random(1).randrange
    data = b"x" * length if kind == "write" else b""
    wall = cpu = 0.0
    try:
        for commands in _batches(count):
            tokens = [
                kernel.queue(
                    _CDB_10.pack(_OPCODE[kind], 0, choose(disk.length // length) * blocks, 0, blocks, 0),
                    data,
                    0 if data else length,
                )
                for _ in range(commands)
            ]
            kernel.kick()
            began, used = time.perf_counter(), time.thread_time()
            while frontend.counters.commands < tokens[-1]:
                await asyncio.sleep(0)
            wall += time.perf_counter() - began
            cpu += time.thread_time() - used
            kernel.pump()
            if any(kernel.results.pop(token).status for token in tokens):
                raise RuntimeError(f"a {kind} of the ring failed")
    finally:
        await frontend.stop()
        kernel.close()
    return count / wall, 1e6 * cpu / count


def _batches(count: int) -> Iterator[int]:
    for start in range(0, count, BATCH):
        yield min(BATCH, count - start)
