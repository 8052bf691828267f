"""tcmu-replication on a kernel of files: `python -m tests.support.files_kernel`, as `python -m tcmu_replication`.

FILES_KERNEL is a directory that `FilesKernel` has made. In it are what sysfs says of devices and
configfs of backstores; uevents are lines of a FIFO. The ring behind a device is a `FakeKernel` in the
process that opens it, without commands. Workers that the daemon starts have the same kernel.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
from pathlib import Path

PLACE = "FILES_KERNEL"
ATTRIBUTES = {
    "enable": "1",
    "attrib/hw_max_sectors": "128",
    "attrib/cmd_time_out": "30",
    "attrib/emulate_write_cache": "1",
    "attrib/tmr_notification": "0",
    "action/block_dev": "",
    "action/reset_ring": "",
    "wwn/vendor_id": "LIO-ORG",
    "wwn/product_id": "",
    "wwn/revision": "",
    "wwn/vpd_unit_serial": "T10 VPD Unit Serial Number: 6b2c1f0a-0000-4000-8000-0000000000a7",
}


class FilesKernel:
    """The test's end: makes and changes devices."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "sys/class/uio").mkdir(parents=True)
        os.mkfifo(place / "events")
        self._events = os.open(place / "events", os.O_RDWR)  # so that neither end waits for the other
        python = place / "python"
        python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -m {__name__} "$@"\n')
        python.chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to have this kernel."""
        return {**os.environ, PLACE: str(self.place)}

    def create(self, uio: str, config: str, size: int, block: int = 512, version: int = 2) -> None:
        """A device of the backstore store-UIO, enabled; `version` is that of its ring's mailbox."""
        for name, value in ATTRIBUTES.items():
            path = self._store(uio) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value)
        self.change(uio, size=size, block=block, version=version)
        device = self.place / "sys/class/uio" / uio
        device.mkdir()
        (device / "name").write_text(f"tcm-user/0/store-{uio}/{config}\n")
        self._tell("add", uio)

    def change(
        self, uio: str, *, size: int | None = None, block: int | None = None, version: int | None = None
    ) -> None:
        """Another size or block size in bytes, or another version of its mailbox."""
        rows = {"attrib/dev_size": size, "attrib/hw_block_size": block, "version": version}
        for name, value in rows.items():
            if value is not None:
                (self._store(uio) / name).write_text(str(value))

    def remove(self, uio: str) -> None:
        shutil.rmtree(self.place / "sys/class/uio" / uio)
        shutil.rmtree(self._store(uio))
        self._tell("remove", uio)

    def close(self) -> None:
        os.close(self._events)

    def _store(self, uio: str) -> Path:
        return self.place / "core/user_0" / f"store-{uio}"

    def _tell(self, action: str, uio: str) -> None:
        os.write(self._events, f"{action} {uio}\n".encode())


def main() -> None:
    """Put the files in the kernel's place, and be tcmu-replication."""
    from tcmu_replication.host import udev
    from tcmu_replication.tcmu import configfs, uio
    from tests.support.fake_kernel import FakeKernel

    place = Path(os.environ[PLACE])
    kernels = []

    class Monitor:
        def __init__(self) -> None:
            self._fd = os.open(place / "events", os.O_RDWR | os.O_NONBLOCK)

        def fileno(self) -> int:
            return self._fd

        def events(self) -> list[udev.Event]:
            lines = os.read(self._fd, 4096).decode().splitlines()
            return [udev.Event(*line.split()) for line in lines]

    def opened(name: str) -> uio.Device:
        kernel = FakeKernel()
        kernels.append(kernel)
        version = (place / "core/user_0" / f"store-{name}" / "version").read_text()
        struct.pack_into("=H", kernel.memory, 0, int(version))
        return kernel.open(name)

    configfs.CORE = place / "core"
    configfs.Backstore.__init__.__defaults__ = (configfs.CORE,)
    uio.devices.__defaults__ = uio.identify.__defaults__ = (place / "sys",)
    uio.Device.open = opened  # type: ignore[method-assign, assignment]
    udev.Monitor = Monitor  # type: ignore[misc, assignment]
    sys.executable = str(place / "python")

    from tcmu_replication.cli.main import main as program

    program()


if __name__ == "__main__":
    main()
