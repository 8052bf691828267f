"""Which blocks an overlay holds: one byte per 4 KiB block in a sparse, memory-mapped file.

    byte 0      header (see HEADER), the rest of the page zero
    byte 4096   one byte per block: 0 not here, 1 data here, 2 here and all zero

A mark is a store into the mapping: it outlives the process, needs no
read-modify-write, and many are scanned at the speed of memchr. One page of the
map stands for 16 MiB of disk. Pages are touched only once something is marked
in them, so everything costs what was marked and not what the disk could hold.

A store, and on tmpfs even a load, from a hole of a file on a full filesystem
kills the process (SIGBUS). So a page is written once, with a checked pwrite,
before the mapping is used there, and which pages are safe is remembered.
Not safe from that are filesystems that allocate anew on each rewrite (btrfs,
ZFS): there overlays need a reserve of free space.
"""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Sequence

from tcmu_replication.block.file import File
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import BLOCK, round_up

ABSENT, HERE, ZERO = 0, 1, 2
"""A block's state: look below; data is stored here; here, reads as zeroes, nothing stored."""

PAGE = 4096
HEADER = struct.Struct("<8sIIQ")
"""Magic, version, bytes per block, bytes of the disk; a CRC-32 of these follows."""
CHECKSUM = struct.Struct("<I")
MAGIC = b"tcmurmap"
VERSION = 1

_STATES = [bytes([state]) for state in (ABSENT, HERE, ZERO)]
_RUNS = re.compile(rb"\x00+|\x01+|\x02+")
_OVER = bytes(both & 3 or both >> 2 & 3 for both in range(256))
"""By upper state + 4 * lower state: the state that counts."""
_SAFE = b"\1"
_EMPTY_PAGE = memoryview(bytes(PAGE))


def blocks_of(length: int) -> int:
    """Blocks of a disk of `length` bytes; the last may be a part."""
    return -(-length // BLOCK)


def file_size(length: int) -> int:
    """Bytes of the map file of a disk of `length` bytes: the header's page and whole pages of marks."""
    return PAGE + round_up(blocks_of(length), PAGE)


def header(length: int) -> bytes:
    """How the map file of a disk of `length` bytes begins; within a sector, so never torn."""
    head = HEADER.pack(MAGIC, VERSION, BLOCK, length)
    return head + CHECKSUM.pack(zlib.crc32(head))


class AllocationMap:
    """The map of one overlay, open and locked. Blocks are numbered; ranges of them are half-open.

    `here` and `zero` count the blocks in these states.
    """

    def __init__(self, path: str, length: int, offload: Offload | None = None) -> None:
        """Open the map of a disk of `length` bytes. Raises `Error` BAD_CONFIG if it is not that."""
        self.path = path
        self.here = 0
        self.zero = 0
        self._file = File(path, offload=offload)
        try:
            _check_header(bytes(self._file.fetch(0, min(PAGE, self._file.length))), path, length)
            if self._file.length != file_size(length):
                raise _refused(path, f"has {self._file.length} bytes instead of {file_size(length)}")
            self._bytes = mmap.mmap(self._file.fileno(), self._file.length)
        except OSError as error:
            self._file.close()
            raise from_os(error, f"map {path}") from error
        except Error:
            self._file.close()
            raise
        # A byte per page of the map, as a mapping of its own: of a large disk it costs what was touched too.
        pages = (self._file.length - PAGE) // PAGE
        self._safe = mmap.mmap(-1, max(pages, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self._count(length)
        except Error:
            self.close()
            raise

    def state(self, block: int) -> int:
        """ABSENT, HERE or ZERO."""
        return self._bytes[PAGE + block] if self._safe[block // PAGE] else ABSENT

    def states(self, first: int, last: int) -> bytes:
        """A byte per block of the range."""
        if first // PAGE == (last - 1) // PAGE:
            return (
                self._bytes[PAGE + first : PAGE + last] if self._safe[first // PAGE] else bytes(last - first)
            )
        return b"".join(self.states(start, end) for start, end in _by_page(first, last))

    def any(self, first: int, last: int) -> bool:
        """Whether a block of the range is HERE or ZERO."""
        return next(self.marked(first, last), None) is not None

    def all(self, first: int, last: int) -> bool:
        """Whether every block of the range is HERE or ZERO."""
        return all(
            self._safe[start // PAGE] and ABSENT not in self._bytes[PAGE + start : PAGE + end]
            for start, end in _by_page(first, last)
        )

    def runs(self, first: int, last: int) -> Sequence[tuple[int, int, int]]:
        """The range as (first, last, state) runs, none longer than a page of the map."""
        if first // PAGE == (last - 1) // PAGE:
            states = self.states(first, last)
            state = states[0]
            if states.count(state) == last - first:  # by far the most usual: all alike
                return ((first, last, state),)
        found = []
        for start, end in _by_page(first, last):
            states = self.states(start, end)
            for run in _RUNS.finditer(states):
                found.append((start + run.start(), start + run.end(), states[run.start()]))
        return found

    def marked(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """As `runs`, without the absent ones; what is marked or unmarked behind it does not disturb it."""
        while first < last:
            page = self._safe.find(_SAFE, first // PAGE, _pages(last))
            if page < 0:
                return
            first = max(first, page * PAGE)
            end = min(last, (page + 1) * PAGE)
            for run in self.runs(first, end):
                if run[2] != ABSENT:
                    yield run
            first = end

    def next_page(self, first: int) -> int:
        """The first page of the map, from block `first`'s on, where something may be marked; -1 if none."""
        return self._safe.find(_SAFE, first // PAGE)

    def prepare(self, first: int, last: int) -> None:
        """Make sure that marks in the range find space. Raises `Error` (NO_SPACE)."""
        if last - first == 1 and self._safe[first // PAGE]:
            return
        for page in range(first // PAGE, _pages(last)):
            if not self._safe[page]:
                self._file.write(PAGE + page * PAGE, [_EMPTY_PAGE])
                self._safe[page] = 1

    def mark(self, first: int, last: int, state: int) -> None:
        """Set the range's state. Raises `Error` (NO_SPACE); never where `prepare` was called before."""
        if last - first == 1 and self._safe[first // PAGE]:
            self._mark_one(PAGE + first, state)
            return
        for start, end in _by_page(first, last):
            if not self._safe[start // PAGE]:
                if state == ABSENT:
                    continue
                self.prepare(start, end)
            at, count = PAGE + start, end - start
            before = self._bytes[at : at + count]
            self._bytes[at : at + count] = _STATES[state] * count
            self.here -= before.count(HERE)
            self.zero -= before.count(ZERO)
            if state == HERE:
                self.here += count
            elif state == ZERO:
                self.zero += count

    def flush(self) -> Pending | None:
        """As `Node.flush`: every mark made before the call. fdatasync covers stores through the mapping."""
        return self._file.flush()

    def close(self) -> None:
        """Unmap and unlock. Twice is fine."""
        self._bytes.close()
        self._file.close()

    def _mark_one(self, at: int, state: int) -> None:
        """`mark` of a single block, the most usual: no bytes objects."""
        before = self._bytes[at]
        self._bytes[at] = state
        self.here += (state == HERE) - (before == HERE)
        self.zero += (state == ZERO) - (before == ZERO)

    def _count(self, length: int) -> None:
        """Find the marked pages (SEEK_DATA) and count. Only a page with a mark is surely no hole."""
        at = PAGE
        for data, allocated, _ in self._file.extents(PAGE, self._file.length - PAGE):
            if allocated:
                self._count_pages((at - PAGE) // PAGE, _pages(at - PAGE + data))
            at += data
        if any(self.marked(blocks_of(length), self._file.length - PAGE)):
            raise _refused(self.path, "marks blocks beyond the end of the disk")

    def _count_pages(self, first: int, last: int) -> None:
        for page in range(first, last):
            states = bytes(self._file.fetch(PAGE + page * PAGE, PAGE))
            here, zero = states.count(HERE), states.count(ZERO)
            if here + zero + states.count(ABSENT) != PAGE:
                raise _refused(self.path, "holds bytes that are no block states")
            if here or zero:
                self._safe[page] = 1
                self.here += here
                self.zero += zero


def merged(
    upper: AllocationMap, lower: AllocationMap, first: int, last: int
) -> Iterator[tuple[int, int, int]]:
    """As `AllocationMap.marked`, of two maps: a block that `upper` does not have is as in `lower`."""
    while first < last:
        found = [page for page in (upper.next_page(first), lower.next_page(first)) if page >= 0]
        first = max(first, min(found) * PAGE) if found else last
        end = min(last, (first // PAGE + 1) * PAGE)
        if first < end:
            states = _over(upper.states(first, end), lower.states(first, end))
            for run in _RUNS.finditer(states):
                if states[run.start()] != ABSENT:
                    yield first + run.start(), first + run.end(), states[run.start()]
        first = end


def _over(upper: bytes, lower: bytes) -> bytes:
    """The states of `upper`, and those of `lower` where it has none: all bytes at once, as one large number."""
    both = int.from_bytes(upper, "big") | int.from_bytes(lower, "big") << 2
    return both.to_bytes(len(upper) + 1, "big")[1:].translate(_OVER)


def _pages(last: int) -> int:
    """Map pages that hold the blocks before `last`."""
    return -(-last // PAGE)


def _by_page(first: int, last: int) -> list[tuple[int, int]]:
    """The range in pieces that lie in one page of the map each."""
    if first // PAGE == (last - 1) // PAGE:
        return [(first, last)]
    inner = list(range((first // PAGE + 1) * PAGE, last, PAGE))
    return list(zip([first, *inner], [*inner, last], strict=True))


def _check_header(page: bytes, path: str, length: int) -> None:
    if len(page) < PAGE or not any(page[: HEADER.size + CHECKSUM.size]):
        raise _refused(path, "was not finished when it was created")
    magic, version, block, disk_length = HEADER.unpack_from(page)
    if magic != MAGIC:
        raise _refused(path, "is something else")
    if CHECKSUM.unpack_from(page, HEADER.size) != (zlib.crc32(page[: HEADER.size]),):
        raise _refused(path, "has a damaged header")
    if version != VERSION or block != BLOCK:
        raise _refused(path, f"has version {version} and blocks of {block}, not {VERSION} and {BLOCK}")
    if disk_length != length:
        raise _refused(path, f"is for a disk of {disk_length} bytes, not of {length}")


def _refused(path: str, why: str) -> Error:
    return Error(
        Kind.BAD_CONFIG,
        f"{path} is no map of this overlay: it {why}. Give another path, or remove the overlay",
    )
