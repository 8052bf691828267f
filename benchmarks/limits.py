"""What the machine can do: bare loops of the same reads, writes and copies, with no protocol and no program around."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import images
from benchmarks.rows import ROWS, Sample
from benchmarks.scale import Scale
from tcmu_replication.units import KiB, MiB

SIDE = "limit"
Step = tuple[Callable[[int, Sequence[memoryview], int], int], int]
"""os.preadv or os.pwritev, and the descriptor."""


def measure(directory: Path, scale: Scale) -> list[Sample]:
    """A sample for each row that has a limit."""
    disk = os.open(images.full(directory / "disk", scale.disk), os.O_RDWR)
    other = os.open(images.full(directory / "other", scale.disk), os.O_RDWR)
    fds = [disk, other]

    def fresh() -> int:
        fds.append(os.open(directory / "fresh", os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        os.truncate(fds[-1], scale.disk)
        return fds[-1]

    read, write = os.preadv, os.pwritev
    some = random.Random(1).sample(range(0, scale.disk, 4 * KiB), scale.random // (4 * KiB))
    every = range(0, scale.sequential, MiB)
    found = {}
    try:
        hidden = fresh()
        found["forwarded-4k-first"] = _per_s([(read, disk), (write, hidden), (write, disk)], some, 4 * KiB)
        found["forwarded-4k-saved"] = _per_s([(write, disk)], some, 4 * KiB)
        found["lun-4k-read"] = _per_s([(read, disk)], some, 4 * KiB)
        found["lun-4k-write"] = _per_s([(write, fresh())], some, 4 * KiB)
        hidden = fresh()
        found["primary-4k"] = _per_s(
            [(write, other), (read, disk), (write, hidden), (write, disk)], some, 4 * KiB
        )
        found["forwarded-1m-first"] = _per_s([(read, disk), (write, fresh()), (write, disk)], every, MiB)
        found["lun-1m-write"] = _per_s([(write, fresh())], every, MiB)
        found["lun-1m-read"] = found["commit"] = _per_s([(read, disk)], every, MiB)
        found["commit"] = _per_s([(read, other), (write, disk)], every, MiB)
        for kind, step in (("write", write), ("read", read)):
            found[f"ring-4k-{kind}"] = _per_s([(step, disk)], some, 4 * KiB)
            found[f"ring-256k-{kind}"] = _per_s(
                [(step, disk)], range(0, scale.sequential, 256 * KiB), 256 * KiB
            )
    finally:
        for fd in fds:
            os.close(fd)
    manifest_ms = _replace_file_ms(directory)
    python_ms = _python_ms()
    found |= {row: manifest_ms for row in ROWS if row.startswith(("pause", "failover"))}
    found |= {row: python_ms for row in ROWS if row.startswith("start")}
    return [Sample(row, SIDE, value) for row, value in found.items()]


def _per_s(steps: Sequence[Step], offsets: Sequence[int], length: int) -> float:
    """How many offsets a second get all steps."""
    buffers = [memoryview(bytearray(b"x" * length))]
    began = time.perf_counter()
    for offset in offsets:
        for call, fd in steps:
            call(fd, buffers, offset)
    return len(offsets) / (time.perf_counter() - began)


def _replace_file_ms(directory: Path) -> float:
    """Replace a small file durably, as the manifest is: the one thing that a checkpoint cannot do without."""
    times = 100
    began = time.perf_counter()
    for _ in range(times):
        with (directory / "new").open("wb") as file:
            file.write(b"x" * 500)
            file.flush()
            os.fsync(file.fileno())
        os.replace(directory / "new", directory / "manifest")
    return 1000 * (time.perf_counter() - began) / times


def _python_ms() -> float:
    """An interpreter that imports asyncio and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
    return 1000 * (time.perf_counter() - began)
