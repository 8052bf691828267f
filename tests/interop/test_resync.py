"""A resync to other people's NBD servers: the peer need not be one of ours."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block.bitmap import Bitmap
from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.nbd.uri import Unix
from tcmu_replication.units import BLOCK, MiB
from tests.support import tools
from tests.support.tools import PATIENCE_S, requires

pytestmark = pytest.mark.interop

LENGTH = 48 * MiB


def qemu_nbd(directory: Path) -> contextlib.AbstractAsyncContextManager[Any]:
    """qemu-nbd of directory/peer on directory/nbd.sock; a socket of an earlier one is removed."""
    where = directory / "nbd.sock"
    where.unlink(missing_ok=True)
    return tools.server(
        "qemu-nbd", "-t", "-f", "raw", "--discard=unmap", "-k", str(where), "-x", "peer",
        str(directory / "peer"), socket=where,
    )  # fmt: skip


@requires("qemu-nbd")
def test_server_that_dies_in_the_middle_is_waited_for_and_has_all_in_the_end(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(LENGTH // 2)
    for name in ("disk", "peer"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(LENGTH)
    (tmp_path / "disk").open("r+b").write(noise)

    async def story() -> None:
        disk = File(str(tmp_path / "disk"), offload=Offload())
        with contextlib.closing(Bitmap.create(tmp_path / "dirty.map", LENGTH)) as marks:
            dirty = Dirty(marks, LENGTH)
            marks.mark(0, LENGTH // BLOCK)
            states: asyncio.Queue[State] = asyncio.Queue()
            peer = Remote(
                "peer", Unix(str(tmp_path / "nbd.sock")), "peer", length=LENGTH,
                on_state=lambda state, _: states.put_nowait(state),
            )  # fmt: skip

            def missed(offset: int, length: int, error: Error) -> bool:
                dirty.mark(offset, length)
                return True

            forward = Resyncing("replication", peer, missed, dirty)
            mirror = Mirror("mirror", disk, report=lambda _: None)
            mirror.attach(forward, peer)
            gate = Gate(mirror)
            job = Resync("disk0", disk, gate, forward, limit=64 * MiB)

            async def write(number: int) -> None:
                data = memoryview(bytes([number]) * 6000)
                pending = gate.write(number * 777_777 % (LENGTH - 6000), [data])
                gate.unplug()
                await settle(pending)
                await asyncio.sleep(0)  # what ended at once has not let others in

            async with qemu_nbd(tmp_path) as server:
                await peer.open()
                task = asyncio.create_task(job.run())
                while job.offset < LENGTH // 4:
                    await write(job.sent % 250 + 1)
                server.kill()
                while await states.get() is not State.LOST:
                    pass
            for number in range(50):
                await write(number)
            assert job.status is JobStatus.RUNNING
            assert not task.done()
            async with qemu_nbd(tmp_path):
                while await states.get() is not State.CONNECTED:
                    pass
                forward.gap = None
                job.peer_is_back()
                while not task.done():
                    await write(job.sent % 250 + 1)
                await task
                await settle(gate.drained())
                assert marks.count == 0
                peer.close()
                await peer.wait_closed()
        disk.close()

    async def within_patience() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await story()

    asyncio.run(within_patience())
    assert (tmp_path / "disk").read_bytes() == (tmp_path / "peer").read_bytes()
