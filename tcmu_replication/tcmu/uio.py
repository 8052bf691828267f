"""TCMU devices as UIO shows them: find, open, map, wait, wake.

A device is `/sys/class/uio/uioN` with the name
`tcm-user/<hba>/<device>/<subtype>/<config>`, and `/dev/uioN`. Only one process
can have it open.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind, from_os

SYSFS = Path("/sys")
DEV = Path("/dev")
_PREFIX = "tcm-user"
_EVENT = 4
_WAKE = b"\1\0\0\0"


class Identity(NamedTuple):
    """Which backstore a device is: `hba` and `name` locate it in configfs, `subtype` its handler."""

    uio: str
    hba: str
    name: str
    subtype: str
    config: str

    @property
    def dev_config(self) -> str:
        """The backstore's dev_config, as it was given at creation."""
        return f"{self.subtype}/{self.config}"


def parse(uio: str, text: str) -> Identity | None:
    """The identity in a UIO name, or None: another driver's, or a backstore without a subtype."""
    prefix, *rest = text.strip().split("/", 4)
    if prefix != _PREFIX or len(rest) < 3 or not all(rest[:3]):
        return None
    hba, name, subtype = rest[:3]
    return Identity(uio, hba, name, subtype, rest[3] if len(rest) > 3 else "")


def identify(uio: str, sysfs: Path = SYSFS) -> Identity | None:
    """The identity of `uio` ("uio0"), or None if it is not TCMU's or has gone."""
    try:
        return parse(uio, (sysfs / "class/uio" / uio / "name").read_text(errors="replace"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return None
        raise from_os(error, f"read the name of {uio}") from error


def devices(sysfs: Path = SYSFS) -> Iterator[Identity]:
    """Every TCMU device there is, in no order."""
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(sysfs / "class/uio"):
            identity = identify(entry, sysfs)
            if identity is not None:
                yield identity


class Device:
    """An open and mapped device. Takes over `fd` (non-blocking) and `memory`; close() ends both."""

    def __init__(self, name: str, fd: int, memory: mmap.mmap) -> None:
        self.name = name
        self.fd = fd
        self.memory = memoryview(memory)
        self._map: mmap.mmap | None = memory

    @classmethod
    def open(cls, uio: str, sysfs: Path = SYSFS, dev: Path = DEV) -> Device:
        """Open and map `uio` ("uio0").

        Raises `Error`: CONFLICT if another process has it, NOT_FOUND if there
        is none, otherwise as the operating system says.
        """
        path = dev / uio
        size_path = sysfs / "class/uio" / uio / "maps/map0/size"
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                found = f"{path} is open in another process; stop the handler that serves it"
                raise Error(Kind.CONFLICT, found) from error
            raise from_os(error, f"open {path}") from error
        try:
            # The kernel takes this size and no other, and offset 0.
            memory = mmap.mmap(fd, int(size_path.read_text(), 0))
        except OSError as error:
            os.close(fd)
            raise from_os(error, f"map {path}") from error
        except ValueError as error:
            os.close(fd)
            raise Error(Kind.PEER_LIED, f"{size_path} is not a size") from error
        return cls(uio, fd, memory)

    def drain(self) -> None:
        """Take the pending event, if any. Raises `Error` (NOT_FOUND) once the device is removed.

        Call it before looking at the ring: what is queued later wakes again.
        """
        try:
            if os.read(self.fd, _EVENT):
                return
        except BlockingIOError:
            return
        except OSError as error:
            raise self._removed() from error
        raise self._removed()

    def wake(self) -> None:
        """Make the kernel take what was published. Raises `Error` (NOT_FOUND) once the device is removed."""
        try:
            os.write(self.fd, _WAKE)
        except OSError as error:
            raise self._removed() from error

    def _removed(self) -> Error:
        return Error(Kind.NOT_FOUND, f"{self.name} was removed")

    def close(self) -> None:
        """Unmap and close. Buffers still in use keep the mapping (and the device) until the last one goes."""
        if self._map is None:
            return
        memory, self._map = self._map, None
        self.memory.release()
        with contextlib.suppress(BufferError):
            memory.close()
        os.close(self.fd)
