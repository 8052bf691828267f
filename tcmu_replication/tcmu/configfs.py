"""A backstore's directory in configfs: its attributes, and the kernel's switches for its ring.

Never used while the device is being removed: rmdir holds the directory until
the handler has answered, and both would wait for ever.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tcmu_replication.errors import Error, Kind, from_os

CORE = Path("/sys/kernel/config/target/core")

UNIT_SERIAL = "wwn/vpd_unit_serial"
_SERIAL_PREFIX = "T10 VPD Unit Serial Number:"
_RESET_BUSY = "1"  # commands in flight end BUSY (2: CHECK CONDITION)


class Backstore:
    """`core/user_<hba>/<name>`. Methods raise `Error`: NOT_FOUND if it has gone, else as the system says."""

    def __init__(self, hba: str, name: str, core: Path = CORE) -> None:
        self.path = core / f"user_{hba}" / name

    def ready(self) -> bool:
        """Whether enable has finished: until then the actions are refused."""
        return self.read("enable") == "1"

    def read(self, attribute: str) -> str:
        """The text of a file of the directory, without the blanks around it."""
        path = self.path / attribute
        try:
            return path.read_text(errors="replace").strip()
        except OSError as error:
            raise from_os(error, f"read {path}") from error

    def read_number(self, attribute: str) -> int:
        """The number in a file of the directory; PEER_LIED if it is none."""
        text = self.read(attribute)
        try:
            return int(text, 0)
        except ValueError as error:
            raise Error(Kind.PEER_LIED, f"{self.path / attribute} is {text!r}, not a number") from error

    @property
    def size(self) -> int:
        """Bytes. Can change at any time."""
        return self.read_number("attrib/dev_size")

    @property
    def block_size(self) -> int:
        """Bytes of a logical block."""
        return self.read_number("attrib/hw_block_size")

    @property
    def max_blocks(self) -> int:
        """hw_max_sectors: the largest transfer in logical blocks; the kernel does not enforce it."""
        return self.read_number("attrib/hw_max_sectors")

    @property
    def time_out_s(self) -> int:
        """cmd_time_out: seconds until the kernel fails a command by itself; 0 is never."""
        return self.read_number("attrib/cmd_time_out")

    @property
    def write_cache(self) -> bool:
        """emulate_write_cache."""
        return self.read_number("attrib/emulate_write_cache") != 0

    @property
    def vendor(self) -> str:
        """T10 vendor identification, for INQUIRY."""
        return self.read("wwn/vendor_id")

    @property
    def product(self) -> str:
        """Product identification, for INQUIRY; empty if nobody set it."""
        return self.read("wwn/product_id")

    @property
    def revision(self) -> str:
        """Product revision, for INQUIRY; empty if nobody set it."""
        return self.read("wwn/revision")

    @property
    def serial(self) -> str:
        """Unit serial number. Empty until the administrator's tool sets it, some time after enable."""
        return self.read(UNIT_SERIAL).removeprefix(_SERIAL_PREFIX).strip()

    def block(self) -> None:
        """From now on new commands are answered BUSY by the kernel; the ring stays as it is."""
        self._act("block_dev", "1")

    def unblock(self) -> None:
        """New commands come to the ring again."""
        self._act("block_dev", "0")

    def reset_ring(self) -> None:
        """Empty the ring: what is in it ends BUSY, a broken ring works again. Nobody may be at the ring."""
        self._act("reset_ring", _RESET_BUSY)

    def free_kept(self, cmd_id: int) -> None:
        """Give back the buffers of a command that was completed with `keep`."""
        self._act("free_kept_buf", str(cmd_id))

    def notify_task_management(self) -> None:
        """Have the kernel tell the ring which commands it aborted; without it they are only waited for."""
        self._write("attrib/tmr_notification", "1")

    def _act(self, action: str, value: str) -> None:
        self._write(f"action/{action}", value)

    def _write(self, attribute: str, value: str) -> None:
        path = self.path / attribute
        try:
            fd = os.open(path, os.O_WRONLY)  # some cannot be read; none may be created
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno == errno.EINVAL and attribute.startswith("action/"):
                refused = f"write {value} to {path}: refused; is the backstore enabled?"
                raise Error(Kind.INVALID_STATE, refused) from error
            raise from_os(error, f"write {value} to {path}") from error
