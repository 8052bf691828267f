"""Space of open files and block devices: giving it back, zeroing it, asking where data is.

Each function answers False where the kernel or the filesystem cannot do it
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

# include/uapi/linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02 | KEEP_SIZE
ZERO_RANGE = 0x10 | KEEP_SIZE

# include/uapi/linux/fs.h
BLKDISCARD = 0x1277
BLKSSZGET = 0x1268

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS}

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate64 = _libc.fallocate64
_fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


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
