"""What the kernel calls a disk, whatever path leads to it: to notice that it is another one than before.

A device mapper's UUID, else a device's World Wide Identifier, else the UUID of its
partition; of an image file its inode (its file system has no name that stays: XFS
makes one of the device's number). None of them is looked at
where the kernel does not say (a loop or a virtual disk without a serial number):
then nothing is known, and nothing is noticed.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tcmu_replication.errors import from_os

SYSFS = Path("/sys/dev/block")
_SOURCES = ("dm/uuid", "wwid", "device/wwid")
"""Files of a block device in sysfs (Documentation/ABI/stable/sysfs-block), the best first."""
_PARTITION = "PARTUUID="
"""A line of a partition's uevent file (Linux 5.10)."""


def disk_name(path: str) -> str:
    """The name of the disk at `path`, or "" if the kernel gives none. Raises `Error`."""
    try:
        found = os.stat(path)
        if stat.S_ISBLK(found.st_mode):
            return _of_device(SYSFS / f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}")
        return f"inode {found.st_ino}"
    except OSError as error:
        raise from_os(error, f"look at {path}") from error


def _of_device(directory: Path) -> str:
    for source in _SOURCES:
        name = _text(directory / source)
        if name:
            return name
    for line in _text(directory / "uevent").splitlines():
        if line.startswith(_PARTITION):
            return line
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
