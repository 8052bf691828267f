"""Which extents of a disk are hot, in a small file that a loss of power does not tear: one bit for 4 MiB.

    byte 0      header (see HEADER), the rest of the page zero
    byte 4096   sectors of 512 bytes: a bit for each of PER_SECTOR extents, the lowest first, and a CRC-32

A disk of 16 TiB has half a mebibyte of it. The file is written once, in its full
length, and later only in place: a file system that is full forbids nothing.
(Those that write nothing in place, btrfs and ZFS, need room for it.)

A sector is what a disk writes whole or not at all, and every sector stands for
itself: a loss of power leaves of each what was there before, or what was
written. To name an extent too early is safe, and so is to forget one too late.
A sector whose checksum does not fit names all of its extents, and so does a file
that is not there or is no such file: it begins as one that names everything,
until its owner has noted that elsewhere and says `clear`.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import TiB

SHIFT = 22
EXTENT = 1 << SHIFT
"""Bytes that a bit stands for: 4 MiB, as in DRBD's activity log."""

PAGE = 4096
SECTOR = 512
PER_SECTOR = 8 * (SECTOR - 4)
"""Extents of a sector: 15.9 GiB."""
HEADER = struct.Struct("<8sIIQ")
"""Magic, version, bytes per extent, bytes of the disk; a CRC-32 of these follows. All is little-endian."""
CHECKSUM = struct.Struct("<I")
MAGIC = b"tcmurlog"
VERSION = 1
LONGEST = 1024 * TiB
"""The longest disk; its file has 32 MiB."""

Run = tuple[int, int]
"""Extents: the first, and the one behind the last."""
Piece = tuple[int, bytes]
"""What is to be written: where in the file, and sectors."""


def extents_of(length: int) -> int:
    """Extents of a disk of `length` bytes; the last may be a part."""
    return -(-length // EXTENT)


def file_size(length: int) -> int:
    """Bytes of the file of a disk of `length` bytes."""
    return PAGE + SECTOR * -(-extents_of(length) // PER_SECTOR)


class HotExtents:
    """The extents that the file at `path` names, or shall name. What was changed here is written by whom `take` tells.

    `found` is what an earlier life left, as runs; None if that cannot be known. `count` is how many are named.
    """

    def __init__(self, path: Path, length: int) -> None:
        """Open the file of a disk of `length` bytes, and make it if it is not there or another's.

        When this returns what is named is on stable storage, whoever named it. Raises `Error`: BAD_CONFIG if a newer
        version wrote it, else that the file can be neither read nor written.
        """
        assert 0 < length <= LONGEST, "the size was checked"
        self.path = path
        self.found: list[Run] | None = None
        self.lost: Error | None = None
        self._extents = extents_of(length)
        self._all = [
            (1 << min(PER_SECTOR, self._extents - first)) - 1 for first in range(0, self._extents, PER_SECTOR)
        ]
        self._bits = list(self._all)
        self._changed: set[int] = set()
        self._fd = -1
        try:
            data = _read(path, file_size(length) + 1)
            if data is not None and _is_of(data, path, length):
                self._bits = [bits & every for bits, every in zip(_sectors(data), self._all, strict=True)]
                self.found = list(self._runs())
            else:
                _create(
                    path,
                    _header(length).ljust(PAGE, b"\0") + b"".join(self._sector(at) for at in self._every()),
                )
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if self.found is not None:
                # Written by a process that is dead, it may be in the page cache alone.
                self._changed.update(self._every())
                self.store(self.take(), sync=True)
        except OSError as error:
            self.close()
            raise from_os(error, f"open the activity log {path}") from error
        except Error:
            self.close()
            raise
        self.count = sum(bits.bit_count() for bits in self._bits)

    def names(self, extent: int) -> bool:
        """Whether the extent is named."""
        return bool(self._bits[extent // PER_SECTOR] >> extent % PER_SECTOR & 1)

    def runs(self, first: int = 0, last: int | None = None) -> list[Run]:
        """What is named in the range, by default of the disk."""
        return list(self._runs(first, last))

    def missing(self, first: int, last: int) -> list[Run]:
        """What is not named in the range."""
        return _merged(
            (start, end)
            for sector, mask in _masks(first, last)
            for start, end in _ones(mask & ~self._bits[sector], sector)
        )

    def add(self, first: int, last: int) -> None:
        """Name the range."""
        self._set((sector, self._bits[sector] | mask) for sector, mask in _masks(first, last))

    def remove(self, first: int, last: int) -> None:
        """Forget the range."""
        self._set((sector, self._bits[sector] & ~mask) for sector, mask in _masks(first, last))

    def clear(self) -> None:
        """Forget everything."""
        self._set((sector, 0) for sector in self._every())

    @property
    def changed(self) -> bool:
        """Whether `take` has something to say."""
        return bool(self._changed)

    def take(self) -> list[Piece]:
        """What is to be written for what was changed since this was called last: for `store`."""
        pieces: list[Piece] = []
        behind = -1
        for at in sorted(self._changed):
            if at == behind:
                where, before = pieces.pop()
                pieces.append((where, before + self._sector(at)))
            else:
                pieces.append((PAGE + at * SECTOR, self._sector(at)))
            behind = at + 1
        self._changed.clear()
        return pieces

    def store(self, pieces: Sequence[Piece], *, sync: bool) -> None:
        """Write that, and with `sync` make it and all that was stored before stable. From any thread, one at a time.

        Raises `Error`. After a sync that failed nobody knows what is on the disk, and the kernel forgets that it
        failed; so `lost` says so, and every later call fails, until the file is opened again.
        """
        if self.lost is not None:
            raise self.lost
        try:
            for where, data in pieces:
                _write(self._fd, data, where)
        except OSError as error:
            raise from_os(error, f"write the activity log {self.path}") from error
        if not sync:
            return
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self.lost = from_os(error, f"sync the activity log {self.path}")
            raise self.lost from error

    def close(self) -> None:
        """Close the file. Twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _every(self) -> range:
        return range(len(self._all))

    def _set(self, sectors: Iterable[tuple[int, int]]) -> None:
        for sector, bits in sectors:
            before = self._bits[sector]
            if bits != before:
                self._bits[sector] = bits
                self._changed.add(sector)
                self.count += bits.bit_count() - before.bit_count()

    def _runs(self, first: int = 0, last: int | None = None) -> Iterator[Run]:
        return iter(
            _merged(
                run
                for sector, mask in _masks(first, self._extents if last is None else last)
                for run in _ones(mask & self._bits[sector], sector)
            )
        )

    def _sector(self, at: int) -> bytes:
        bits = self._bits[at].to_bytes(PER_SECTOR // 8, "little")
        return bits + _checksum(bits, at)


def _checksum(bits: bytes, sector: int) -> bytes:
    """That of another sector's bits does not fit, nor do zeroes."""
    return CHECKSUM.pack(zlib.crc32(bits, sector))


def _header(length: int) -> bytes:
    head = HEADER.pack(MAGIC, VERSION, EXTENT, length)
    return head + CHECKSUM.pack(zlib.crc32(head))


def _is_of(data: bytes, path: Path, length: int) -> bool:
    """Whether it is the whole file of a disk of that length. Raises `Error` BAD_CONFIG if a newer version wrote it."""
    head = data[: HEADER.size]
    if data[HEADER.size : HEADER.size + CHECKSUM.size] != CHECKSUM.pack(zlib.crc32(head)):
        return False
    magic, version, _, _ = HEADER.unpack(head)
    if magic == MAGIC and version > VERSION:
        raise Error(
            Kind.BAD_CONFIG,
            f"{path}: found an activity log of version {version}, this program reads version {VERSION}; run the "
            "version of tcmu-replication that wrote it, or a newer one",
        )
    return data.startswith(_header(length)) and len(data) == file_size(length)


def _sectors(data: bytes) -> Iterator[int]:
    """The bits of each sector, all of them where the checksum does not fit."""
    for number, at in enumerate(range(PAGE, len(data), SECTOR)):
        bits, checksum = data[at : at + SECTOR - 4], data[at + SECTOR - 4 : at + SECTOR]
        yield int.from_bytes(bits, "little") if checksum == _checksum(bits, number) else (1 << PER_SECTOR) - 1


def _masks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The range as the bits of each sector that it touches."""
    while first < last:
        sector, at = divmod(first, PER_SECTOR)
        count = min(PER_SECTOR - at, last - first)
        yield sector, (1 << count) - 1 << at
        first += count


def _ones(bits: int, sector: int) -> Iterator[Run]:
    """The runs of bits that are set."""
    at = sector * PER_SECTOR
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        count = (~bits & bits + 1).bit_length() - 1
        bits >>= count
        yield at + skip, at + skip + count
        at += skip + count


def _merged(runs: Iterable[Run]) -> list[Run]:
    """Runs in their order, those that touch as one."""
    merged: list[Run] = []
    for start, end in runs:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


def _read(path: Path, most: int) -> bytes | None:
    """The file's first `most` bytes, or None if it is not there. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        return file.read(most)


def _create(path: Path, data: bytes) -> None:
    """A file that holds `data`, on stable storage, in the place of what was there. Raises OSError."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _write(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(fd: int, data: bytes, at: int) -> None:
    """All of it. Raises OSError."""
    if os.pwrite(fd, data, at) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
