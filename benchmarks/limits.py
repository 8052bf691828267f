"""What the machine can do: bare loops of the same reads, writes and copies, with no protocol and no program around.

Each work is done in every way that the kernel offers for it, and the fastest
is its limit. The files have their pages already, as overlays have whose space
serves again; but what a commit copies was written once and never read, and the
kernel takes longer for the first read of a page. Where a client asks for it over NBD, a server that does nothing
(nbdkit's null) is asked by the same client too: no server can be faster than
that, and if it is less than the fastest loop, it is the limit.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from benchmarks import images, loads
from benchmarks.loads import Load
from benchmarks.rows import ROWS, Sample
from benchmarks.turn import Turn
from tcmu_replication.units import KiB, MiB
from tests.support.processes import free_port
from tests.support.tools import listens

SIDE = "limit"
Step = Callable[[int], object]
"""Do one offset's part of the work."""


class _Images:
    """Three images that are in memory: the disk, an overlay, and another disk.

    `fresh` is what an overlay is at the end of its epoch: its pages were written and not yet read.
    """

    def __init__(self, directory: Path, length: int, stack: ExitStack, fresh: int = MiB) -> None:
        self.disk, self.overlay, self.other = (
            self._open(images.full(directory / name, length), stack) for name in ("disk", "overlay", "other")
        )
        self.mapped = self._map(self.disk, length, stack, mmap.MAP_POPULATE)
        self._fresh = fresh
        self.fresh = self._open(images.sparse(directory / "fresh", fresh), stack)
        self.mapped_fresh = self._map(self.fresh, fresh, stack)

    def refresh(self) -> None:
        """Write `fresh` anew."""
        os.ftruncate(self.fresh, 0)
        for offset in range(0, self._fresh, MiB):
            os.pwrite(self.fresh, b"x" * MiB, offset)

    def _open(self, path: Path, stack: ExitStack) -> int:
        fd = os.open(path, os.O_RDWR)
        stack.callback(os.close, fd)
        return fd

    def _map(self, fd: int, length: int, stack: ExitStack, flags: int = 0) -> memoryview:
        mapping = mmap.mmap(fd, length, flags=mmap.MAP_SHARED | flags, prot=mmap.PROT_READ)
        stack.callback(mapping.close)
        return stack.enter_context(memoryview(mapping))


def measure(turn: Turn) -> Iterator[Sample]:
    """A sample for each row that has a limit, and for each way to do its work that is slower."""
    scale = turn.scale
    some = random.Random(1).sample(range(0, scale.disk, 4 * KiB), scale.random // (4 * KiB))
    every, middle = range(0, scale.sequential, MiB), range(0, scale.sequential, 256 * KiB)
    served = _nothing(turn)
    with ExitStack() as stack:
        files = _Images(turn.directory, scale.disk, stack, fresh=2 * scale.half)
        small, large = _steps(files, 4 * KiB), _steps(files, MiB)
        for row, ways, offsets, threads in (
            ("forwarded-4k-first", small["first"], some, (1,)),
            ("forwarded-4k-saved", small["write"], some, (1,)),
            ("forwarded-1m-first", large["first"], every, (1, 2)),
            ("lun-4k-write", small["write"], some, (1,)),
            ("lun-4k-read", small["read"], some, (1,)),
            ("lun-1m-write", large["write"], every, (1, 2)),
            ("lun-1m-read", large["read"], every, (1, 2)),
            ("primary-4k", small["mirrored"], some, (1,)),
            ("ring-4k-write", small["write"], some, (1,)),
            ("ring-4k-read", small["read"], some, (1,)),
            ("ring-256k-write", _steps(files, 256 * KiB)["write"], middle, (1,)),
            ("ring-256k-read", _steps(files, 256 * KiB)["read"], middle, (1,)),
        ):
            yield from _fastest(row, ways, offsets, threads, served)
        copied = range(0, 2 * scale.half, MiB)
        yield from _fastest("commit", large["commit"], copied, (1, 2), served, files.refresh)
    manifest_ms = _replace_file_ms(turn.directory)
    python_ms = _python_ms()
    for row in ROWS:
        if row.startswith(("pause", "failover")):
            yield Sample(row, SIDE, manifest_ms)
        elif row.startswith("start"):
            yield Sample(row, SIDE, python_ms)


def synced(directory: Path, length: int, total: int, batch: int) -> dict[str, float]:
    """First touches a second of a disk in `directory`: "on" with two syncs for each batch, "off" without.

    One loop is what a durable secondary must do: save a batch, one block behind the other, sync, overwrite it, sync.
    """
    offsets = random.Random(1).sample(range(0, length, 4 * KiB), total // (4 * KiB))
    buffers = [memoryview(bytearray(b"x" * 4 * KiB))]
    found = {}
    with ExitStack() as stack:
        files = _Images(directory, length, stack)
        for name, sync in (("off", lambda fd: None), ("on", os.fdatasync)):
            os.sync()
            began = time.perf_counter()
            for start in range(0, len(offsets), batch):
                some = offsets[start : start + batch]
                for slot, offset in enumerate(some, start):
                    os.preadv(files.disk, buffers, offset)
                    os.pwritev(files.overlay, buffers, slot * 4 * KiB)
                sync(files.overlay)
                for offset in some:
                    os.pwritev(files.disk, buffers, offset)
                sync(files.disk)
            found[name] = len(offsets) / (time.perf_counter() - began)
    return found


def _steps(files: _Images, length: int) -> dict[str, dict[str, Callable[[], Step]]]:
    """By the work, its ways by name: what makes a step with a buffer of its own."""
    disk, overlay, other = files.disk, files.overlay, files.other
    read, write, copy = os.preadv, os.pwritev, os.copy_file_range

    def steps(*calls: Callable[[list[memoryview], int], object]) -> Callable[[], Step]:
        def make() -> Step:
            buffers = [memoryview(bytearray(b"x" * length))]

            def step(offset: int) -> None:
                for call in calls:
                    call(buffers, offset)

            return step

        return make

    def reads(fd: int) -> Callable[[list[memoryview], int], object]:
        return lambda buffers, offset: read(fd, buffers, offset)

    def writes(fd: int) -> Callable[[list[memoryview], int], object]:
        return lambda buffers, offset: write(fd, buffers, offset)

    def copies(source: int, target: int) -> Callable[[list[memoryview], int], object]:
        return lambda _, offset: copy(source, target, length, offset, offset)

    def maps(mapped: memoryview, target: int) -> Callable[[list[memoryview], int], object]:
        return lambda _, offset: write(target, [mapped[offset : offset + length]], offset)

    def copying(source: int, mapped: memoryview, target: int) -> dict[str, list]:
        return {
            "read and write": [reads(source), writes(target)],
            "copy_file_range": [copies(source, target)],
            "write of a mapping": [maps(mapped, target)],
        }

    save = copying(disk, files.mapped, overlay)
    commit = copying(files.fresh, files.mapped_fresh, disk)
    return {
        "read": {"read": steps(reads(disk))},
        "write": {"write": steps(writes(overlay))},
        "commit": {way: steps(*calls) for way, calls in commit.items()},
        "first": {way: steps(*calls, writes(disk)) for way, calls in save.items()},
        "mirrored": {way: steps(writes(other), *calls, writes(disk)) for way, calls in save.items()},
    }


def _fastest(
    row: str,
    ways: Mapping[str, Callable[[], Step]],
    offsets: Sequence[int],
    threads: Sequence[int],
    served: Mapping[str, float],
    prepare: Callable[[], object] = lambda: None,
) -> Iterator[Sample]:
    found = {}
    for way, make in ways.items():
        for count in threads:
            prepare()
            found[f"{way}, {count} thread{'s' * (count > 1)}"] = _per_s(make, offsets, count)
    limit = max(found.values())
    if row in served:
        limit = min(limit, served[row])
        found["a server that does nothing"] = served[row]
    yield Sample(row, SIDE, limit)
    if len(found) > 1:
        for name, per_s in found.items():
            yield Sample(row, f"{SIDE}: {name}", per_s)


def _per_s(make: Callable[[], Step], offsets: Sequence[int], threads: int) -> float:
    """How many offsets a second get their step; each thread takes a part of its own."""
    share = -(-len(offsets) // threads)
    workers = [
        threading.Thread(target=_each, args=(make(), offsets[start : start + share]))
        for start in range(0, len(offsets), share)
    ]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(offsets) / (time.perf_counter() - began)


def _each(step: Step, offsets: Sequence[int]) -> None:
    for offset in offsets:
        step(offset)


def _nothing(turn: Turn) -> dict[str, float]:
    """By the row: what its client gets from a server that does nothing."""
    scale = turn.scale
    random = Load("randwrite", 4 * KiB, 32, scale.disk, scale.random)
    large = Load("write", MiB, 8, scale.disk, scale.sequential)
    path = turn.directory / "nothing.sock"
    port = free_port()
    unix, tcp = f"nbd+unix:///?socket={path}", f"nbd://127.0.0.1:{port}/"
    found = {}
    with nbdkit(f"size={scale.disk}", "-U", str(path), ready=partial(listens, path)):
        found["lun-4k-write"] = loads.lean(unix, random, []).iops
        found["lun-4k-read"] = loads.lean(unix, random._replace(rw="randread"), []).iops
        found["lun-1m-write"] = loads.fio(unix, large, []).mib_s
        found["lun-1m-read"] = loads.fio(unix, large._replace(rw="read"), []).mib_s
    with nbdkit(f"size={scale.disk}", "-i", "127.0.0.1", "-p", str(port), ready=partial(_listens, port)):
        found["forwarded-4k-saved"] = found["forwarded-4k-first"] = loads.lean(tcp, random, []).iops
        found["forwarded-1m-first"] = loads.fio(tcp, large, []).mib_s
    return found


@contextmanager
def nbdkit(*arguments: str, ready: Callable[[], bool]) -> Iterator[None]:
    """A server that does nothing, for as long as the context lasts."""
    process = subprocess.Popen(["nbdkit", "--foreground", "null", *arguments])
    try:
        while not ready():
            if process.poll() is not None:
                raise RuntimeError(f"nbdkit has ended with {process.returncode}")
            time.sleep(0.01)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
