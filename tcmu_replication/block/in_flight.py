"""Which writes are under way, in memory that outlives the process: what its death may have left half done.

    byte 0      header (see HEADER), the rest of the page zero
    byte 4096   SLOTS places of 16 bytes: offset and length of a write under way, or zeroes

A mirror takes a place before the first of its disks is written, and gives it
back when both have answered. What a dead process leaves here is all that its two
disks may differ in, besides what it had noted elsewhere. The file is written
once in its full length and mapped: a mark costs a store, needs no space and no
sync. A host that went down has lost the page cache, and with it what this file
said: it is of one boot only, and the next one finds nothing in it.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import zlib
from pathlib import Path

from tcmu_replication.block import boot
from tcmu_replication.errors import from_os

HEADER = struct.Struct(f"<8sI{boot.LENGTH}s")
"""Magic, version, boot; a CRC-32 of these follows."""
_CHECKSUM = struct.Struct("<I")
MAGIC = b"tcmurflt"
VERSION = 1
PAGE = 4096
SLOTS = 8192
"""More than a full ring of small writes."""
FILE_SIZE = PAGE + 16 * SLOTS
_FLAGS = PAGE // 8 - 2
"""Where in the header's page, in words of 8 bytes: the flags, and behind them how many writes found no place."""

UNKNOWN = 1
"""A flag: more may differ than the places say, and it could not be noted anywhere else."""

_PLACES = range(FILE_SIZE // 8 - 2, PAGE // 8 - 2, -2)
"""Where each place begins, in words; the first is taken first."""


class InFlight:
    """The log of one disk, open and mapped. `begin` and `end` are called around every write.

    `found` are the ranges that an earlier process of this boot left, merged: (offset,
    length); None if nothing can be known of it: another boot, no file, or more
    writes than places. `clear` forgets them.
    """

    def __init__(self, path: Path, length: int) -> None:
        """Open the log of a disk of `length` bytes, and make it if it is not there. Raises `Error`."""
        self.path = path
        self.found: list[tuple[int, int]] | None = None
        head = _header()
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                whole = os.pread(fd, FILE_SIZE + 1, 0)
                if len(whole) == FILE_SIZE and whole.startswith(head):
                    self.found = _ranges(whole, length)
                elif len(whole) != FILE_SIZE:
                    os.ftruncate(fd, 0)
                    _write(fd, bytes(FILE_SIZE))
                self._bytes = mmap.mmap(fd, FILE_SIZE)
            finally:
                os.close(fd)
        except OSError as error:
            raise from_os(error, f"map {path}") from error
        self._words = memoryview(self._bytes).cast("Q")
        self._free = list(_PLACES)

    def clear(self) -> None:
        """Nothing is under way: begin anew, in this boot."""
        self._bytes[PAGE:] = bytes(FILE_SIZE - PAGE)
        self._bytes[:PAGE] = _header().ljust(PAGE, b"\0")
        self._free = list(_PLACES)

    def begin(self, offset: int, length: int) -> int:
        """A write of this range begins; the answer is for `end`."""
        if not self._free:
            self._words[_FLAGS + 1] += 1
            return -1
        slot = self._free.pop()
        words = self._words
        words[slot] = offset
        words[slot + 1] = length
        return slot

    def end(self, slot: int) -> None:
        """The write that `begin` gave this answer to has ended, on both disks, and what failed is noted."""
        if slot < 0:
            self._words[_FLAGS + 1] -= 1
            return
        self._words[slot + 1] = 0
        self._free.append(slot)

    def set_unknown(self) -> None:
        """Say that the places do not tell everything, in a way that cannot fail."""
        self._words[_FLAGS] |= UNKNOWN

    def close(self) -> None:
        """Unmap; what the file says stays. Twice is fine."""
        if not self._bytes.closed:
            self._words.release()
            self._bytes.close()


def _header() -> bytes:
    head = HEADER.pack(MAGIC, VERSION, boot.boot_id().encode())
    return head + _CHECKSUM.pack(zlib.crc32(head))


def _ranges(whole: bytes, disk: int) -> list[tuple[int, int]] | None:
    """What the file says, merged; None if it does not say everything, or says what cannot be."""
    words = memoryview(whole).cast("Q")
    if words[_FLAGS] or words[_FLAGS + 1]:
        return None
    merged: list[tuple[int, int]] = []
    slots = range(PAGE // 8, len(words), 2)
    for offset, length in sorted((words[at], words[at + 1]) for at in slots if words[at + 1]):
        if offset + length > disk:
            return None
        if merged and offset <= sum(merged[-1]):
            first, before = merged.pop()
            length = max(offset + length, first + before) - first
            offset = first
        merged.append((offset, length))
    return merged


def _write(fd: int, data: bytes) -> None:
    if os.pwrite(fd, data, 0) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
