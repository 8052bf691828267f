"""The resync: from an image to a secondary, over TCP as a primary does it.

Beside it nbdcopy, to a secondary of ours too, and QEMU's drive-mirror to a secondary of QEMU's.

    python -m benchmarks.resync IMAGE URI PATTERN

is the source: a process that marks the PATTERN dirty, sends it, and says in JSON what that took.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import images, sides
from benchmarks.rows import Sample
from benchmarks.turn import Turn
from tcmu_replication.block.bitmap import Bitmap
from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.remote import Remote
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.nbd import uri
from tcmu_replication.units import BLOCK, KiB, MiB
from tests.support import qemu
from tests.support.nbd import Nbd
from tests.support.tools import listens, until

NBDCOPY = "nbdcopy"
"""A side: it copies the same range between the same two images, read from nbdkit."""
RANDOM = 100
"""One block in so many is dirty in the random pattern."""


def _some(blocks: int) -> list[int]:
    """Spread over the disk, as good as random, and the same each time."""
    return sorted({number * 0x9E3779B1 % blocks for number in range(blocks // RANDOM)})


PATTERNS: dict[str, tuple[Callable[[int], Sequence[int]], Callable[[Turn], int]]] = {
    "dense": (lambda blocks: range(blocks), lambda turn: turn.scale.sequential),
    "checkerboard": (lambda blocks: range(0, blocks, 2), lambda turn: 2 * turn.scale.random),
    "random": (_some, lambda turn: turn.scale.disk),
}
"""Which blocks of so many are dirty, and how long the disk is."""


def measure(turn: Turn) -> Iterator[Sample]:
    """Ours in each pattern; in QEMU's turn nbdcopy of the dense one, and its drive-mirror of the checkerboard."""
    if turn.side == "QEMU":
        with _target(turn, "dense") as (host, source):
            yield Sample("resync-dense", NBDCOPY, _nbdcopy(turn, host, source))
        with _target(turn, "checkerboard", "QEMU") as (host, source):
            yield Sample("resync-checkerboard", "QEMU", _mirror(turn, host, source))
        return
    for pattern in PATTERNS:
        with _target(turn, pattern) as (host, source):
            said = subprocess.run(
                [sys.executable, "-m", "benchmarks.resync", source, host.forwarded, pattern],
                check=True, stdout=subprocess.PIPE, text=True,
            ).stdout  # fmt: skip
        found = json.loads(said)
        if pattern != "random":
            mib = found["differs"] / MiB
            yield Sample(f"resync-{pattern}", turn.side, mib / found["seconds"], 1e6 * found["cpu_s"] / mib)
        yield Sample(f"resync-sent-{pattern}", turn.side, found["sent"] / found["differs"])
        yield Sample(f"resync-sent-{pattern}", "limit", 1.0)


@contextlib.contextmanager
def _target(turn: Turn, pattern: str, side: str = "ours") -> Iterator[tuple[sides.Ours | sides.Theirs, Path]]:
    """A secondary, and the image that is to be sent to it."""
    length = PATTERNS[pattern][1](turn)
    directory = turn.directory / pattern
    directory.mkdir()
    source = images.full(turn.directory / f"{pattern}.img", length)
    with sides.SECONDARY[side](directory, length, tcp=True) as host, turn.memory.lent(length):
        yield host, source


def _nbdcopy(turn: Turn, host: sides.Ours | sides.Theirs, source: Path) -> float:
    """MiB per second."""
    path = turn.directory / "source.nbd"
    server = subprocess.Popen(["nbdkit", "-f", "-r", "-U", path, "file", source])
    try:
        until(lambda: listens(path), "nbdkit's socket")
        began = time.monotonic()
        subprocess.run(["nbdcopy", "--flush", f"nbd+unix:///?socket={path}", host.forwarded], check=True)
        return source.stat().st_size / MiB / (time.monotonic() - began)
    finally:
        server.kill()
        server.wait()


def _mirror(turn: Turn, host: sides.Ours | sides.Theirs, source: Path) -> float:
    """MiB per second of the blocks that were written while QEMU's job was paused."""
    (address, port), export = host.forwarded_address
    length = source.stat().st_size
    blocks = PATTERNS["checkerboard"][0](length // BLOCK)
    disk = f"driver=raw,node-name=disk,file.driver=file,file.filename={source}"
    with qemu.qemu(turn.directory, "-blockdev", disk) as process:
        process.serve_nbd(str(turn.directory / "mirror.nbd"))
        process.export("disk", "disk")
        server = {"type": "inet", "host": address, "port": str(port)}
        process.qmp.execute("blockdev-add", driver="nbd", node_name="peer", server=server, export=export)
        process.qmp.execute(
            "blockdev-mirror", job_id="mirror", device="disk", target="peer", sync="none", granularity=4 * KiB
        )
        process.qmp.wait_event("BLOCK_JOB_READY")
        process.qmp.execute("block-job-pause", device="mirror")
        with process.nbd("disk") as client:
            _dirty(client, blocks)
        began = time.monotonic()
        process.qmp.execute("block-job-resume", device="mirror")
        process.qmp.execute("block-job-complete", device="mirror")
        ended = process.qmp.wait_event("BLOCK_JOB_COMPLETED")
        took = time.monotonic() - began
    if "error" in ended:
        raise RuntimeError(f"QEMU's mirror failed: {ended['error']}")
    return len(blocks) * BLOCK / MiB / took


def _dirty(client: Nbd, blocks: Sequence[int]) -> None:
    for block in blocks:
        client.write(block * BLOCK, b"x" * BLOCK)


async def _source(image: str, target: str, pattern: str) -> dict[str, float]:
    disk = File(image, offload=Offload())
    where = uri.parse(target)
    peer = Remote("peer", where.address, where.export, length=disk.length)
    await peer.open()
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.closing(Bitmap.create(f"{directory}/dirty.map", disk.length)) as marks,
    ):
        blocks = PATTERNS[pattern][0](disk.length // BLOCK)
        if pattern == "dense":
            marks.mark(0, len(blocks))
        else:
            for block in blocks:
                marks.mark(block, block + 1)
        forward = Resyncing("replication", peer, lambda *_: False, Dirty(marks, disk.length))
        mirror = Mirror("mirror", disk, report=print)
        mirror.attach(forward, peer)
        job = Resync("bench", disk, Gate(mirror), forward)
        began, used = time.monotonic(), time.process_time()
        await job.run()
        took, used = time.monotonic() - began, time.process_time() - used
    peer.close()
    disk.close()
    return {"seconds": took, "cpu_s": used, "sent": job.sent, "differs": len(blocks) * BLOCK}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_source(*sys.argv[1:]))))
