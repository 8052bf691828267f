"""Serves a TCMU device from a block device of a lab host: `serve_disk.py UIO DISK DEADLINE_S`.

The frontend and nothing around it, on a disk whose writes do not end while the
file STUCK is there. Says "serving", and at its end, by SIGTERM or by the
removal of the device, a line of JSON: why, and the counters.
"""

import asyncio
import functools
import json
import pathlib
import signal
import sys

from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Buffers
from tcmu_replication.block.pending import Pending
from tcmu_replication.frontend.tcmu import TcmuFrontend
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu import uio
from tcmu_replication.tcmu.configfs import Backstore

STUCK = pathlib.Path("/run/stuck")
POLL_S = 0.1


class StickyFile(File):
    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        if not STUCK.exists():
            return super().write(offset, buffers, fua)
        pending = Pending()
        self._later(functools.partial(super().write, offset, buffers, fua), pending)
        return pending

    def _later(self, write: functools.partial, pending: Pending) -> None:
        if STUCK.exists():
            asyncio.get_running_loop().call_later(POLL_S, self._later, write, pending)
        else:
            write()
            pending.complete()


async def main(name: str, disk: str, deadline_s: str) -> None:
    loop = asyncio.get_running_loop()
    found = uio.identify(name)
    assert found is not None
    backstore = Backstore(found.hba, found.name)
    unit = LogicalUnit(backstore.size, backstore.block_size, lambda: Identity(serial=backstore.serial))
    ended: asyncio.Future[str] = loop.create_future()
    device = uio.Device.open(name)
    frontend = TcmuFrontend(
        device,
        backstore,
        unit,
        Gate(StickyFile(disk)),
        loop,
        deadline_s=float(deadline_s),
        on_closed=lambda error: ended.set_result(f"closed: {error}"),
    )
    loop.add_signal_handler(signal.SIGTERM, ended.set_result, "stopped")
    await frontend.start()
    print("serving", flush=True)
    why = await ended
    left = await frontend.stop()
    counters = {counter: getattr(frontend.counters, counter) for counter in frontend.counters.__slots__}
    print(json.dumps({"why": why, "left": left, **counters}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
