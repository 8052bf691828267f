"""Which blocks of a disk are dirty: one bit per 4 KiB block in a sparse, memory-mapped file.

    byte     bytes
    0        8        "tcmurbit"
    8        4        format, 1
    12       4        bytes per block, 4096
    16       8        bytes of the disk
    24       4        CRC-32 of the bytes before
    28       4068     zero
    4096     to end   a bit per block, in whole pages of 4096 bytes: block n is bit n % 8, the least significant
                      first, of byte n // 8; set is dirty. Bits beyond the end of the disk are zero

Numbers are little-endian. A page stands for 128 MiB of disk, the whole file of a
disk of 16 TiB for 512 MiB, nearly all of it a hole. A page that no mark has
touched is never looked at: to open, to count and to find runs costs what was
touched (SEEK_DATA says where that is) and not what the disk could hold.

A mark is in the page cache when the call returns, so it outlives the process;
`flush` makes it outlive a loss of power. It is looked at through the mapping and
made by pwrite, for a store into the mapping would kill the process where the file
system has no space for the page (SIGBUS), and would keep the whole interpreter
while the file system hangs. A call fails, or waits alone. A block that is dirty
already costs no call.

There is no count in the file: it is taken from the bits at open, so no end of the
process or of the host makes it wrong.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from tcmu_replication.block.file import File
from tcmu_replication.block.space import create_sparse
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import BLOCK, MiB, blocks_of

HEADER = struct.Struct("<8sIIQ")
"""Magic, format, bytes per block, bytes of the disk; the checksum follows."""
CHECKSUM = struct.Struct("<I")
MAGIC = b"tcmurbit"
FORMAT = 1

PAGE = 4096
PER_PAGE = PAGE * 8
"""Blocks that a page of the file stands for."""

PIECE = MiB
"""Bytes of the file that are read at once at open; whole pages."""

Bits = bytes
"""What is in the file, or was: the class has a member of the type's name."""

_BYTES = tuple(bytes([value]) for value in range(256))
_FIRST = tuple((value & -value).bit_length() - 1 for value in range(256))
"""By byte: its first bit that is set."""
_ANY = {True: re.compile(rb"[^\x00]"), False: re.compile(rb"[^\xff]")}
"""A byte with a dirty block; one with a clean block."""


def header(length: int) -> bytes:
    """How the file of a disk of `length` bytes begins; within a sector, so never torn."""
    head = HEADER.pack(MAGIC, FORMAT, BLOCK, length)
    return head + CHECKSUM.pack(zlib.crc32(head))


def file_size(length: int) -> int:
    """Bytes of the file of a disk of `length` bytes: the header's page and whole pages of bits."""
    return PAGE + _pages(blocks_of(length)) * PAGE


class Bitmap:
    """The map of one disk, open and locked. Blocks are numbered; ranges of them are half-open.

    `count` is how many blocks are dirty. Where a call raises `Error` what it had changed until then stays changed,
    and `count` is right.
    """

    def __init__(self, path: str | Path, length: int) -> None:
        """Open the map of a disk of `length` bytes.

        Raises `Error` BAD_CONFIG if the file is not that, CONFLICT if it is in use, NOT_FOUND.
        """
        self.path = os.fspath(path)
        self.count = 0
        self._length = length
        self._blocks = blocks_of(length)
        self._file = File(self.path, follow=False)
        # A byte per page of bits: whether anything was ever marked in it. Other pages may be holes.
        self._touched = bytearray(_pages(self._blocks))
        try:
            _check(self._file, length)
            self._bits = mmap.mmap(self._file.fileno(), self._file.length, access=mmap.ACCESS_READ)
        except OSError as error:
            self._file.close()
            raise from_os(error, f"map {self.path}") from error
        except Error:
            self._file.close()
            raise
        try:
            self._take_count()
        except Error:
            self.close()
            raise

    @classmethod
    def create(cls, path: str | Path, length: int) -> Bitmap:
        """Make a map with nothing dirty and open it; flush it before anything durable names it.

        Raises `Error` and leaves nothing behind: CONFLICT if the file exists, NO_SPACE.
        """
        create_sparse(os.fspath(path), file_size(length), header(length))
        try:
            return cls(path, length)
        except BaseException:
            os.unlink(path)
            raise

    @property
    def bytes(self) -> int:
        """Bytes of the disk in blocks that are dirty."""
        beyond = self._blocks * BLOCK - self._length
        return self.count * BLOCK - (beyond if beyond and self.test(self._blocks - 1) else 0)

    def mark(self, first: int, last: int) -> None:
        """The blocks are dirty. Raises `Error`: NO_SPACE, IO, OUT_OF_RANGE.

        A call for 128 MiB of disk takes some 40 microseconds, so one for a large disk keeps the caller for long.
        """
        if last - first == 1:  # of one block, most often: no lists
            self._check_range(first, last)
            byte = self._bits[PAGE + first // 8] if self._touched[first // PER_PAGE] else 0
            if not byte & 1 << first % 8:
                self._write(first // 8, _BYTES[byte], _BYTES[byte | 1 << first % 8])
            return
        for at, before, mask in self._masks(first, last):
            marked = (int.from_bytes(before, "little") | mask).to_bytes(len(before), "little")
            if marked != before:
                self._write(at, before, marked)

    def clear(self, first: int, last: int) -> None:
        """The blocks are not dirty. Raises `Error` as `mark` does: some file systems need space to write anew."""
        for at, before, mask in self._masks(first, last):
            if any(before):
                cleared = (int.from_bytes(before, "little") & ~mask).to_bytes(len(before), "little")
                if cleared != before:
                    self._write(at, before, cleared)

    def test(self, block: int) -> bool:
        """Whether the block is dirty."""
        return bool(self._touched[block // PER_PAGE] and self._bits[PAGE + block // 8] & 1 << block % 8)

    def runs(
        self, first: int = 0, last: int | None = None, *, longest: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """The runs of dirty blocks of the range, in order: (first, last), none of more than `longest` blocks.

        Each is as the map is when the iterator gets there, and none is longer than it then is: marks and clears
        made meanwhile ahead of it are seen, those behind it are not. It ends when the map is closed.
        """
        assert longest is None or longest > 0
        last = self._blocks if last is None else min(last, self._blocks)
        bits, touched = self._bits, self._touched
        while first < last and not bits.closed:
            # Where dirty and clean blocks alternate the next one is in the same byte, mostly: no call for that.
            here = bits[PAGE + first // 8] >> first % 8 if touched[first // PER_PAGE] else 0
            start = first + _FIRST[here] if here else self._find(first, last, dirty=True)
            if start >= last:
                return
            stop = last if longest is None else min(last, start + longest)
            here = (bits[PAGE + start // 8] ^ 0xFF) >> start % 8
            end = start + _FIRST[here] if here else self._find(start + 1, stop, dirty=False)
            first = min(end, stop)
            yield start, first

    def flush(self) -> None:
        """Make every mark and clear durable. Raises `Error`, and after that at each later call too."""
        self._file.flush()

    def close(self) -> None:
        """Unmap and unlock; what is marked stays. Twice is fine."""
        self._bits.close()
        self._file.close()

    def _masks(self, first: int, last: int) -> Iterator[tuple[int, Bits, int]]:
        """The range in pieces of a page: where it begins (bytes), its bytes now, and which of their bits are meant."""
        self._check_range(first, last)
        while first < last:
            page = first // PER_PAGE
            stop = min(last, (page + 1) * PER_PAGE)
            at, end = first // 8, (stop - 1) // 8 + 1
            before = self._bits[PAGE + at : PAGE + end] if self._touched[page] else bytes(end - at)
            yield at, before, (1 << stop - at * 8) - (1 << first - at * 8)
            first = stop

    def _write(self, at: int, before: Bits, after: Bits) -> None:
        """Bytes of one page of bits become others, in the file and in the count."""
        page = at // PAGE
        try:
            self._file.write(PAGE + at, [memoryview(after)])
        except Error:
            # Perhaps a part was written. A page of memory is whole, so what can be looked at now is what stays.
            if self._touched[page]:
                self.count += _ones(self._bits[PAGE + at : PAGE + at + len(before)]) - _ones(before)
            raise
        self._touched[page] = 1
        self.count += _ones(after) - _ones(before)

    def _find(self, block: int, last: int, *, dirty: bool) -> int:
        """The first block from `block` on, before `last`, that is dirty, or that is clean; `last` if none is."""
        flip = 0 if dirty else 0xFF
        while block < last:
            page = block // PER_PAGE
            if not self._touched[page]:
                if not dirty:
                    return block
                page = self._touched.find(1, page)
                if page < 0:
                    return last
                block = page * PER_PAGE
                continue
            end = min(last, (page + 1) * PER_PAGE)
            at = block // 8
            found = (self._bits[PAGE + at] ^ flip) >> block % 8 << block % 8
            if not found:
                match = _ANY[dirty].search(self._bits, PAGE + at + 1, PAGE + (end - 1) // 8 + 1)
                if match is None:
                    block = end
                    continue
                at = match.start() - PAGE
                found = self._bits[PAGE + at] ^ flip
            return min(last, at * 8 + _FIRST[found])
        return last

    def _check_range(self, first: int, last: int) -> None:
        if not 0 <= first <= last <= self._blocks:
            raise Error(
                Kind.OUT_OF_RANGE, f"{self.path}: blocks {first} to {last} of a disk of {self._blocks} blocks"
            )

    def _take_count(self) -> None:
        """Find what was touched and count it. A page without a dirty block may be a hole, and counts as one."""
        at = 0
        for length, allocated, _ in self._file.extents(PAGE, self._file.length - PAGE):
            if allocated:
                self._count_pages(at // PAGE * PAGE, -(-(at + length) // PAGE) * PAGE)
            at += length
        beyond = self._blocks % PER_PAGE
        if beyond and self._touched[-1]:
            bits = int.from_bytes(self._bits[-PAGE:], "little")
            if bits >> beyond:
                raise _refused(self.path, "marks blocks beyond the end of the disk")

    def _count_pages(self, start: int, end: int) -> None:
        """What lies in these bytes of bits, whole pages."""
        for at in range(start, end, PIECE):
            piece = self._file.fetch(PAGE + at, min(PIECE, end - at))
            for begin in range(0, len(piece), PAGE):
                found = _ones(piece[begin : begin + PAGE])
                if found:
                    self._touched[(at + begin) // PAGE] = 1
                    self.count += found


def _pages(blocks: int) -> int:
    """Pages of bits for so many blocks."""
    return -(-blocks // PER_PAGE)


def _ones(bits: bytes | memoryview) -> int:
    """How many bits are set."""
    return int.from_bytes(bits, "little").bit_count()


def _check(file: File, length: int) -> None:
    """Raise `Error` BAD_CONFIG unless the file is a map of a disk of this length."""
    head = bytes(file.fetch(0, min(HEADER.size + CHECKSUM.size, file.length)))
    if len(head) < HEADER.size + CHECKSUM.size or not any(head):
        raise _refused(file.path, "was not finished when it was created")
    magic, number, block, disk = HEADER.unpack_from(head)
    if magic != MAGIC:
        raise _refused(file.path, f"begins with {magic!r} instead of {MAGIC!r}")
    if CHECKSUM.unpack_from(head, HEADER.size) != (zlib.crc32(head[: HEADER.size]),):
        raise _refused(file.path, "has a damaged header")
    if (number, block) != (FORMAT, BLOCK):
        raise _refused(
            file.path, f"has format {number} and blocks of {block} bytes, not {FORMAT} and {BLOCK}"
        )
    if disk != length:
        raise _refused(file.path, f"is for a disk of {disk} bytes, not of {length}")
    if file.length != file_size(length):
        raise _refused(file.path, f"has {file.length} bytes instead of {file_size(length)}")


def _refused(path: str, why: str) -> Error:
    return Error(
        Kind.BAD_CONFIG,
        f"{path} is no map of this disk's dirty blocks: it {why}. If it is of another disk put it back there; "
        "if it is damaged remove it, and the disks have to be compared as a whole",
    )
