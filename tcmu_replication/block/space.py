"""Space of files and block devices: giving it back, zeroing it, asking where data is, sparse new files.

A function that returns bool answers False where the kernel or the filesystem cannot do it
(hostfs has no fallocate at all, tmpfs has no ZERO_RANGE, many disks have no
discard); the caller remembers that and does without. Other failures are
OSErrors.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct

from tcmu_replication.block.node import Extent
from tcmu_replication.errors import from_os
from tcmu_replication.units import BLOCK, format_size

# include/uapi/linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02 | KEEP_SIZE
ZERO_RANGE = 0x10 | KEEP_SIZE

# include/uapi/linux/fs.h
BLKDISCARD = 0x1277
BLKSSZGET = 0x1268

# include/uapi/linux/magic.h
IN_MEMORY = {0x01021994, 0x858458F6}
"""tmpfs and ramfs."""

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS}

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate64 = _libc.fallocate64
_fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


_statfs64 = _libc.statfs64
_statfs64.argtypes = (ctypes.c_char_p, ctypes.c_void_p)


def in_memory(path: str) -> bool:
    """Whether what lies at `path` is kept in memory alone: there a sync does nothing. Raises OSError."""
    # struct statfs of include/uapi/asm-generic/statfs.h begins with the type, a word; 120 bytes in all.
    answer = (ctypes.c_long * 32)()
    if _statfs64(os.fsencode(path), answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return answer[0] in IN_MEMORY


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2): PUNCH_HOLE or ZERO_RANGE; afterwards the range reads as zeroes.

    Block devices take it too (block/fops.c, blkdev_fallocate), in multiples
    of their logical block.
    """
    while _fallocate64(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code in UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def punches(fd: int, length: int, *, device: bool) -> bool:
    """Whether PUNCH_HOLE is likely to work on a file of `length` bytes, or a device. Changes nothing.

    Behind the end of a file there is nothing to punch; a device says it in sysfs
    (Documentation/ABI/stable/sysfs-block, write_zeroes_max_bytes), a partition's disk for it.
    """
    if not device:
        try:
            return fallocate(fd, PUNCH_HOLE, length, BLOCK)
        except OSError:
            return True
    number = os.fstat(fd).st_rdev
    place = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for folder in (place, os.path.dirname(place)):
        try:
            with open(os.path.join(folder, "queue/write_zeroes_max_bytes"), "rb") as file:
                return int(file.read()) > 0
        except (OSError, ValueError):
            continue
    return True


def discard_device(fd: int, offset: int, length: int) -> bool:
    """BLKDISCARD of a range in whole logical blocks."""
    try:
        fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", offset, length))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def logical_block(fd: int) -> int:
    """Bytes of a block device's logical block: the grain of fallocate and discard on it."""
    (grain,) = struct.unpack("=i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
    return grain


def data_runs(fd: int, offset: int, length: int) -> list[Extent]:
    """Data and holes of a regular file's range by SEEK_DATA and SEEK_HOLE (lseek(2)).

    A filesystem without them answers that all is data. What lies beyond the
    file's end counts as a hole.
    """
    found = []
    end = offset + length
    while offset < end:
        try:
            data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            data = end
        if data > offset:
            found.append(Extent(data - offset, allocated=False, zero=True))
        if data < end:
            offset = min(os.lseek(fd, data, os.SEEK_HOLE), end)
            found.append(Extent(offset - data, allocated=True, zero=False))
        else:
            offset = end
    return found


def create_sparse(path: str, length: int, head: bytes) -> None:
    """A new sparse file of `length` bytes that begins with `head`. Raises `Error` and leaves nothing behind."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, length)
            os.pwrite(fd, head, 0)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise from_os(error, f"create {path} for {format_size(length)}") from error
