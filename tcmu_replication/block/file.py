"""The leaf of most chains: an image file or a block device, through the page cache.

Writes are made inline, so that they take effect in the order in which they
were asked for; they land in the page cache and seldom block. What does block
(fdatasync, reads that miss the cache) goes to threads when there is an
`Offload`; without one everything is done at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import NoReturn

from tcmu_replication.block import space
from tcmu_replication.block.buffers import part, size, zeroes
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import round_down, round_up

IOV_MAX = 1024
"""The most buffers that one preadv or pwritev takes (UIO_MAXIOV, include/uapi/linux/uio.h)."""

ZERO_MODES = {True: (space.PUNCH_HOLE, space.ZERO_RANGE), False: (space.ZERO_RANGE,)}
"""By `unmap`: what to try before zeroes are written."""


class File(Node):
    """An existing regular file or block device of fixed length.

    While it is open for writing nobody else gets it: a file is locked with
    flock(2), a device opened with O_EXCL. Readers share a file.
    """

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        follow: bool = True,
        offload: Offload | None = None,
        name: str = "",
    ) -> None:
        """Without `follow` the path must not be a symbolic link: for files of our own making.

        Raises `Error` NOT_FOUND, PERMISSION, READ_ONLY, CONFLICT, or BAD_CONFIG (another kind of file).
        """
        self.path = path
        self._fd, self._is_device = _open(path, read_only, follow)
        try:
            super().__init__(name or path, os.lseek(self._fd, 0, os.SEEK_END), read_only=read_only)
            self._grain = space.logical_block(self._fd) if self._is_device else 1
        except OSError as error:
            os.close(self._fd)
            raise from_os(error, f"open {path}") from error
        self._offload = offload
        self._nowait = offload is not None
        self._unsupported: set[int] = set()
        self._probed = False
        self._lost: Error | None = None
        self._syncing: Pending | None = None
        self._sync_again: Pending | None = None
        self._in_threads = 0
        self._closing = False

    def fileno(self) -> int:
        """The descriptor, for mapping it. It stays this node's."""
        return self._fd

    @property
    def unmaps(self) -> bool:
        """See `Node.unmaps`. Asked for the first time it tries, and changes nothing."""
        if not self._probed:
            self._probed = True
            if not space.punches(self._fd, self.length, device=self._is_device):
                self._unsupported.add(space.PUNCH_HOLE)
        return space.PUNCH_HOLE not in self._unsupported

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`. With an Offload what is not cached is read in a thread."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        try:
            if self._nowait:
                return self._read_cached(offset, buffers, length)
            done = os.preadv(self._fd, buffers, offset) if len(buffers) <= IOV_MAX else 0
        except OSError as error:
            self._failed(error, "read", offset, length)
        if done != length:
            self._read_rest(offset, buffers, done, length)
        return None

    def fetch(self, offset: int, length: int) -> memoryview:
        """See `Node.fetch`. The view may be read-only."""
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            self._failed(error, "read", offset, length)
        if len(data) == length:
            return memoryview(data)
        view = memoryview(bytearray(length))
        self._read_rest(offset, [view], 0, length)
        return view

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. The data is in the page cache on return; only `fua` may return a `Pending`."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        try:
            done = os.pwritev(self._fd, buffers, offset) if len(buffers) <= IOV_MAX else 0
            while done != length:
                rest = part(buffers, done, length - done)[:IOV_MAX]
                count = os.pwritev(self._fd, rest, offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the kernel wrote nothing")
                done += count
        except OSError as error:
            self._failed(error, "write", offset, length)
        return self.flush() if fua else None

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`. By fallocate; the parts and the places that cannot are written."""
        end = offset + length
        start_whole, end_whole = round_up(offset, self._grain), round_down(end, self._grain)
        if start_whole < end_whole and any(
            self._fallocate(mode, start_whole, end_whole - start_whole) for mode in ZERO_MODES[unmap]
        ):
            self._write_zeroes(offset, start_whole - offset)
            self._write_zeroes(end_whole, end - end_whole)
        else:
            self._write_zeroes(offset, length)
        return self.flush() if fua else None

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`. Punches a hole or discards; without effect where that is unsupported.

        A device that does not promise zeroes after a discard decides itself
        what is read afterwards.
        """
        if not self._is_device:
            self._fallocate(space.PUNCH_HOLE, offset, length)
            return None
        start, end = round_up(offset, self._grain), round_down(offset + length, self._grain)
        if start < end and space.BLKDISCARD not in self._unsupported:
            try:
                if not space.discard_device(self._fd, start, end - start):
                    self._unsupported.add(space.BLKDISCARD)
            except OSError as error:
                self._failed(error, "discard", offset, length)
        return None

    def flush(self) -> Pending | None:
        """See `Node.flush`. With an Offload, calls made while one runs share the next.

        After a failed fdatasync the kernel has dropped what it could not write
        and forgets the error: nobody knows what is on the disk. As in QEMU
        every later flush fails too, until the file is opened again.
        """
        if self._offload is None:
            try:
                self._fdatasync()
            except Error:
                self._tell_lost()
                raise
            return None
        if self._syncing is None:
            self._syncing = self._in_thread(self._fdatasync, "flush", self._synced)
            return self._syncing
        # The running fdatasync began before this call and need not cover the latest writes.
        if self._sync_again is None:
            self._sync_again = Pending()
        return self._sync_again

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`. A block device is all data, for the kernel cannot say."""
        if self._is_device:
            return [Extent(length, allocated=True, zero=False)]
        try:
            return space.data_runs(self._fd, offset, length)
        except OSError as error:
            self._failed(error, "ask for the extents of", offset, length)

    def close(self) -> None:
        """Close and unlock, when the last call in a thread has ended. Twice is fine."""
        self._closing = True
        if self._in_threads == 0 and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read_cached(self, offset: int, buffers: Buffers, length: int) -> Pending | None:
        """What is in the page cache at once (RWF_NOWAIT, preadv2(2)), the rest in a thread."""
        try:
            done = os.preadv(self._fd, buffers, offset, os.RWF_NOWAIT) if len(buffers) <= IOV_MAX else 0
        except BlockingIOError:
            done = 0
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # tmpfs and hostfs: their reads are memory copies, or as good as.
            self._nowait = False
            return self.read(offset, buffers)
        if done == length:
            return None
        return self._in_thread(lambda: self._read_rest(offset, buffers, done, length), "read")

    def _read_rest(self, offset: int, buffers: Buffers, done: int, length: int) -> None:
        """Read on after `done` bytes until all `length` are there, blocking."""
        try:
            while done != length:
                rest = part(buffers, done, length - done)[:IOV_MAX]
                count = os.preadv(self._fd, rest, offset + done)
                if count == 0:
                    raise OSError(errno.EIO, f"it has become shorter than its {self.length} bytes")
                done += count
        except OSError as error:
            self._failed(error, "read", offset, length)

    def _write_zeroes(self, offset: int, length: int) -> None:
        if length:
            self.write(offset, zeroes(length))

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        if mode in self._unsupported:
            return False
        try:
            done = space.fallocate(self._fd, mode, offset, length)
        except OSError as error:
            self._failed(error, "free space of" if mode == space.PUNCH_HOLE else "zero", offset, length)
        if not done:
            self._unsupported.add(mode)
        return done

    def _fdatasync(self) -> None:
        if self._lost is not None:
            raise self._lost
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._lost = from_os(error, f"flush {self.path}")
            raise self._lost from error

    def _synced(self, ended: Pending) -> None:
        self._syncing = None
        if ended.error is not None:
            self._tell_lost()
        waiting, self._sync_again = self._sync_again, None
        if waiting is None:
            return
        try:
            again = self.flush()
        except Error as error:  # the Offload has been closed
            waiting.complete(error)
            return
        assert again is not None
        again.then(lambda ended: waiting.complete(ended.error))

    def _tell_lost(self) -> None:
        """On the loop's thread, once."""
        told, self.on_lost = self.on_lost, None
        if told is not None and self._lost is not None:
            told(self._lost)

    def _in_thread(
        self, call: Callable[[], None], doing: str, ended: Callable[[Pending], None] | None = None
    ) -> Pending:
        assert self._offload is not None
        pending = self._offload(call, f"{doing} {self.path}")
        self._in_threads += 1
        if ended is not None:
            pending.then(ended)
        pending.then(self._left_thread)
        return pending

    def _left_thread(self, _: Pending) -> None:
        self._in_threads -= 1
        if self._closing:
            self.close()

    def _failed(self, error: OSError, doing: str, offset: int, length: int) -> NoReturn:
        raise from_os(error, f"{doing} {self.path}", offset=offset, length=length) from error


def _open(path: str, read_only: bool, follow: bool) -> tuple[int, bool]:
    """The descriptor, locked, and whether it is a block device."""
    try:
        kind = os.stat(path, follow_symlinks=follow).st_mode
        if stat.S_ISLNK(kind):
            raise Error(
                Kind.BAD_CONFIG,
                f"found {path}, which is a symbolic link; expected the file itself: move it there if the link "
                f"is yours, else see who may write in {os.path.dirname(path) or '.'}",
            )
        is_device = stat.S_ISBLK(kind)
        if not is_device and not stat.S_ISREG(kind):
            raise Error(Kind.BAD_CONFIG, f"{path} is neither a regular file nor a block device")
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR) | (0 if follow else os.O_NOFOLLOW)
        fd = os.open(path, flags | (os.O_EXCL if is_device and not read_only else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Error(
                Kind.CONFLICT,
                f"{path} is in use: look for a mount (findmnt {path}), for LVM, MD or multipath on it "
                f"(lsblk {path}), or for another worker (fuser -v {path})",
            ) from error
        raise from_os(error, f"open {path}") from error
    try:
        if not is_device:
            fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EWOULDBLOCK:
            raise Error(
                Kind.CONFLICT, f"{path} is in use by another process, or twice by this one (fuser -v {path})"
            ) from error
        raise from_os(error, f"lock {path}") from error
    return fd, is_device
