"""One process per control socket: a lock beside it, held until the process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from tcmu_replication import ownership
from tcmu_replication.errors import Error, Kind, from_os

_FLOCK = struct.Struct("@hhqqi4x")
"""struct flock of <bits/fcntl.h>: l_type, l_whence, l_start, l_len, l_pid (64-bit Linux)."""
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def lock_path(socket_path: Path) -> Path:
    """The lock of a control socket. The file stays: removing it would race with the next holder."""
    return socket_path.with_suffix(".lock")


def hold(socket_path: Path) -> int:
    """Take the lock and return its descriptor; closing it gives the lock up.

    Raises CONFLICT if it is held, and BAD_CONFIG if others may write in its directory: they
    could put a socket of their own in the place of ours. An open-file-description lock: a POSIX
    one would go as soon as this process closed the file anywhere else.
    """
    path = lock_path(socket_path)
    ownership.check(path.parent, ownership.DIRECTORY)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise from_os(error, f"open {path}") from error
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
    except OSError as error:
        os.close(descriptor)
        pid = holder(socket_path)
        raise Error(Kind.CONFLICT, f"{socket_path.stem} is already served by process {pid}") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    return descriptor


def holder(socket_path: Path) -> int | None:
    """The process that holds the lock, asked without taking it; None if nobody does."""
    try:
        descriptor = os.open(lock_path(socket_path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        kind = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE))[0]
        pid = os.pread(descriptor, 32, 0).strip()
    finally:
        os.close(descriptor)
    return int(pid) if kind != fcntl.F_UNLCK and pid.isdigit() else None
