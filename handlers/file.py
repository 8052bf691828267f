"""The handler of `user:file`: a plain image file or block device. The example, and the baseline of benchmarks.

file//srv/images/disk.img        (the second slash begins the path)
"""

from __future__ import annotations

import os
import stat
from typing import ClassVar

from tcmu_replication import ownership
from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.offload import Offload
from tcmu_replication.daemon.handler import Backstore, Context, Handler
from tcmu_replication.errors import Error, Kind, from_os


class FileBackstore(Backstore):
    """A file through a gate, with threads for what blocks."""

    def __init__(self, path: str) -> None:
        self._offload = Offload()
        try:
            super().__init__(Gate(File(path, offload=self._offload)), offload=self._offload)
        except Error:
            self._offload.close()
            raise

    async def close(self) -> None:
        """Close the file, then end the threads that it used."""
        await super().close()
        self._offload.close()


class FileHandler(Handler):
    """`config` is an absolute path."""

    subtype: ClassVar[str] = "file"
    description: ClassVar[str] = "an absolute path of an image file or a block device"

    def check(self, config: str, context: Context) -> None:
        """See `Handler.check`."""
        if not config.startswith("/"):
            raise Error(
                Kind.BAD_CONFIG, f"file/{config}: expected an absolute path, as in file//srv/disk.img"
            )
        try:
            mode = os.stat(config).st_mode
        except OSError as error:
            found = from_os(error, f"file/{config}: found")
            raise Error(found.kind, f"{found}; expected an image file or a block device") from error
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise Error(Kind.BAD_CONFIG, f"file/{config}: neither a regular file nor a block device")
        ownership.check(config, ownership.DEVICE if stat.S_ISBLK(mode) else ownership.FILE)

    async def open(self, config: str, context: Context) -> Backstore:
        """See `Handler.open`."""
        self.check(config, context)
        return FileBackstore(config)
