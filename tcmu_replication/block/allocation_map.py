"""Which blocks an overlay holds, and where: four bytes per 4 KiB block in a sparse, memory-mapped file.

    byte 0      header (see HEADER), the rest of the page zero
    byte 4096   one entry per block, little-endian; the two high bits say of what kind it is:
                  0                         not here
                  1 + slot                  here; `slot` counts blocks in the data file
                  NOWHERE                   here, without a place (what a map without a data file uses)
                  NEW | 1 + slot            here, but not yet flushed since it came
                  OVER_ZERO | 1 + slot      the same, and it was zero before
                  ZERO_FLAG, or ZERO_FLAG | 1 + slot
                                            here and all zero; the slot stays the block's own

A mark is a store into the mapping: it outlives the process, needs no
read-modify-write, and many are looked at in one go. One page of the
map stands for 4 MiB of disk. Pages are touched only once something is marked
in them, so everything costs what was marked and not what the disk could hold.

The kernel writes pages back as it likes, so after a loss of power a mark may be
there whose data is not. Whoever cannot sync the data before it marks sets NEW
or OVER_ZERO, which a flush takes away once the data is on stable storage. While
the host runs they mean "here". The header names the boot that the file was last
opened in: in another one they mean what was there before, "not here" or "zero",
and are replaced by that at open. A boot's name never comes back, so it does not
matter what of this reaches the disk, nor in which order: at the next boot
whatever is still marked so is replaced again.

A store, and on tmpfs even a load, from a hole of a file on a full filesystem
kills the process (SIGBUS). So a page is written once, with a checked pwrite,
before the mapping is used there, and which pages are safe is remembered.
Not safe from that are filesystems that allocate anew on each rewrite (btrfs,
ZFS): there overlays need a reserve of free space.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tcmu_replication.block import boot
from tcmu_replication.block.file import File
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.reserve import Reserve
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import BLOCK, blocks_of, round_up

ABSENT, HERE, ZERO = 0, 1, 2
"""A block's state: look below; data is stored here; here, reads as zeroes, nothing stored."""

ENTRY = 4
"""Bytes of an entry."""
NEW, OVER_ZERO, ZERO_FLAG = 1 << 30, 2 << 30, 3 << 30
"""An entry's kind; 0 is a block that is here for good. ZERO is the greatest: one comparison tells it from HERE."""
NOWHERE = NEW - 1
MAX_SLOTS = NOWHERE - 1
"""So many slots can be told apart: just under 4 TiB."""

PAGE = 4096
PER_PAGE = PAGE // ENTRY
"""Blocks that a page of the map stands for."""
HEADER = struct.Struct(f"<8sIIQ{boot.LENGTH}s")
"""Magic, version, bytes per block, bytes of the disk, boot; a CRC-32 of these follows."""
CHECKSUM = struct.Struct("<I")
_ENTRY = struct.Struct("=I")
MAGIC = b"tcmurmap"
VERSION = 3

STEP = 1 << 13
"""Marks that a flush looks at in one go: a millisecond or two, so that requests pass meanwhile."""

MANY = 1 << 20
"""So many marks (runs of blocks) that are not flushed are enough: each takes 16 bytes, and the next flush some time."""

_RUNS = re.compile(rb"\x00+|\x01+|\x02+")
_LOW = bytes(bool(byte) for byte in range(256))
_TOP = bytes(2 if byte >= ZERO_FLAG >> 24 else bool(byte) for byte in range(256))
_STATE = bytes((ABSENT, HERE, ZERO, ZERO)[byte & 3] for byte in range(256))
"""From an entry's bytes to its state: 1 if a bit is set, 2 for the kind of zeroes, OR-ed."""
_UNFLUSHED = re.compile(rb"[\x40-\xbf]")
"""The high byte of an entry of the kinds NEW and OVER_ZERO."""
_OVER = bytes(both & 3 or both >> 2 & 3 for both in range(256))
"""By upper state + 4 * lower state: the state that counts."""
_SAFE = b"\1"
_EMPTY_PAGE = memoryview(bytes(PAGE))


def file_size(length: int) -> int:
    """Bytes of the map file of a disk of `length` bytes: the header's page and whole pages of marks."""
    return PAGE + round_up(blocks_of(length) * ENTRY, PAGE)


def header(length: int) -> bytes:
    """How the map file of a disk of `length` bytes begins in this boot; within a sector, so never torn."""
    head = HEADER.pack(MAGIC, VERSION, BLOCK, length, boot.boot_id().encode())
    return head + CHECKSUM.pack(zlib.crc32(head))


class AllocationMap:
    """The map of one overlay, open and locked. Blocks are numbered; ranges of them are half-open.

    `here` and `zero` count the blocks in these states. `slots` is what was in use when it was opened:
    slots from there on are nobody's. `crowded` asks for a flush: there are MANY marks without one.
    """

    def __init__(
        self, path: str, length: int, offload: Offload | None = None, reserve: Reserve | None = None
    ) -> None:
        """Open the map of a disk of `length` bytes. Raises `Error` BAD_CONFIG if it is not that.

        Marks that were not flushed in an earlier boot are undone. `reserve` is what it leaves of the filesystem.
        """
        self.path = path
        self._offload = offload
        self._reserve = reserve
        self.here = 0
        self.zero = 0
        self.slots = 0
        self.crowded = False
        self._file = File(path, follow=False, offload=offload)
        # The marks that are not flushed yet, as pairs: a block; its entry, and from bit 32 on how many blocks
        # follow in the slots behind. Those that a flush was asked for are in the batches.
        self._unflushed = array("Q")
        self._batches: deque[array[int]] = deque()
        self._ended_batches = 0
        try:
            head = header(length)
            found = bytes(self._file.fetch(0, min(PAGE, self._file.length)))
            _check_header(found, path, length)
            if self._file.length != file_size(length):
                raise _refused(path, f"has {self._file.length} bytes instead of {file_size(length)}")
            self._fd = self._file.fileno()
            self._bytes = mmap.mmap(self._fd, self._file.length)
            self._entries = memoryview(self._bytes)[PAGE:].cast("I")
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
            this_boot = found.startswith(head)
            self._count(length, this_boot)
            if not this_boot:
                self._file.write(0, [memoryview(head)])
        except Error:
            self.close()
            raise

    def entry(self, block: int) -> int:
        """What the file says of a block; see the module."""
        return self._entries[block] if self._safe[block // PER_PAGE] else 0

    def entries(self, first: int, last: int) -> list[int]:
        """The entries of the range."""
        if first // PER_PAGE == (last - 1) // PER_PAGE:
            return (
                self._entries[first:last].tolist() if self._safe[first // PER_PAGE] else [0] * (last - first)
            )
        return [entry for start, end in _by_page(first, last) for entry in self.entries(start, end)]

    def state(self, block: int) -> int:
        """ABSENT, HERE or ZERO."""
        entry = self.entry(block)
        return (HERE if entry < ZERO_FLAG else ZERO) if entry else ABSENT

    def states(self, first: int, last: int) -> bytes:
        """A byte per block of the range: its state."""
        if first // PER_PAGE != (last - 1) // PER_PAGE:
            return b"".join(self.states(start, end) for start, end in _by_page(first, last))
        if not self._safe[first // PER_PAGE]:
            return bytes(last - first)
        return _states(self._bytes[PAGE + first * ENTRY : PAGE + last * ENTRY])

    def any(self, first: int, last: int) -> bool:
        """Whether a block of the range is HERE or ZERO."""
        return next(self.marked(first, last), None) is not None

    def all(self, first: int, last: int) -> bool:
        """Whether every block of the range is HERE or ZERO."""
        return all(
            self._safe[start // PER_PAGE] and 0 not in self._entries[start:end].tolist()
            for start, end in _by_page(first, last)
        )

    def runs(self, first: int, last: int) -> Sequence[tuple[int, int, int]]:
        """The range as (first, last, state) runs, none longer than a page of the map."""
        if first // PER_PAGE == (last - 1) // PER_PAGE:
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
            page = self._safe.find(_SAFE, first // PER_PAGE, _pages(last))
            if page < 0:
                return
            first = max(first, page * PER_PAGE)
            end = min(last, (page + 1) * PER_PAGE)
            for run in self.runs(first, end):
                if run[2] != ABSENT:
                    yield run
            first = end

    def next_page(self, first: int) -> int:
        """The first page of the map, from block `first`'s on, where something may be marked; -1 if none."""
        return self._safe.find(_SAFE, first // PER_PAGE)

    def prepare(self, first: int, last: int) -> None:
        """Make sure that marks in the range find space. Raises `Error` (NO_SPACE)."""
        if last - first == 1 and self._safe[first // PER_PAGE]:
            return
        for page in range(first // PER_PAGE, _pages(last)):
            if not self._safe[page]:
                if self._reserve is not None:
                    self._reserve.take(PAGE)
                self._file.write(PAGE + page * PAGE, [_EMPTY_PAGE])
                self._safe[page] = 1

    def assign(self, first: int, last: int, entry: int) -> None:
        """The range is here; the first block's entry is `entry`, and the others lie in the slots behind its.

        Raises `Error` (NO_SPACE); never after `prepare`.
        """
        if last - first == 1 and self._safe[first // PER_PAGE]:
            before = self._entries[first]
            self._entries[first] = entry
            if not before:
                self.here += 1
            elif before >= ZERO_FLAG:
                self.here += 1
                self.zero -= 1
        else:
            for start, end in _by_page(first, last):
                self.prepare(start, end)
                self._uncount(start, end)
                self._entries[start:end] = _in_order(entry + start - first, end - start)
                self.here += end - start
        if entry >= NEW:
            self._unflushed.append(first)
            self._unflushed.append(entry if last - first == 1 else entry + (last - first - 1 << 32))
            if len(self._unflushed) >= 2 * MANY:
                self.crowded = True

    def mark(self, first: int, last: int, state: int) -> None:
        """Set the range's state, HERE without a place. Raises `Error` (NO_SPACE); never after `prepare`."""
        if state == ZERO and last - first == 1 and self._safe[first // PER_PAGE]:
            entry = self._entries[first]
            self._write(first, _ENTRY.pack(entry | ZERO_FLAG))
            if entry < ZERO_FLAG:
                self.zero += 1
                self.here -= entry != 0
            return
        for start, end in _by_page(first, last):
            if not self._safe[start // PER_PAGE]:
                if state == ABSENT:
                    continue
                self.prepare(start, end)
            count = end - start
            if state == ZERO:
                entries = [entry | ZERO_FLAG for entry in self._entries[start:end].tolist()]
            else:
                entries = [NOWHERE if state == HERE else 0] * count
            before = self.states(start, end)
            self._write(start, array("I", entries).tobytes())
            self.here += (count if state == HERE else 0) - before.count(HERE)
            self.zero += (count if state == ZERO else 0) - before.count(ZERO)

    def touch(self, block: int) -> None:
        """Wait here, if at all, for a file system that hangs, and not in the `assign` that follows."""
        if self._safe[block // PER_PAGE]:
            at = PAGE + block * ENTRY
            self._write(block, self._bytes[at : at + ENTRY])

    def flush(self) -> Pending | None:
        """As `Node.flush`: every mark made before the call. fdatasync covers stores through the mapping."""
        return self._file.flush()

    def begin_flush(self) -> int:
        """Name the marks that are not flushed yet; when their data is, `data_flushed` of the answer follows."""
        if self._unflushed:
            self._batches.append(self._unflushed)
            self._unflushed = array("Q")
            self.crowded = False
        return self._ended_batches + len(self._batches)

    def data_flushed(self, named: int) -> Pending | None:
        """The data of all marks that `begin_flush` had `named` is on stable storage: they are for good.

        A mark that is not as it was is left alone, for it is of another flush. Long lists are done in steps.
        """
        if self._settle_some(named):
            return None
        settled = Pending()
        self._turn().then(partial(self._settle_more, named, settled))
        return settled

    def tell_lost(self, told: Callable[[Error], None]) -> None:
        """Tell `told`, once, when a sync of the map has failed."""
        self._file.on_lost = told

    def close(self, *, empty: bool = False) -> None:
        """Unmap and unlock; `empty` the file first if it is about to be removed. Twice is fine.

        mmap holds the interpreter while it unmaps, for as long as there are pages. To empty the file
        unmaps them too, and lets other threads run meanwhile.
        """
        self._batches.clear()
        self._entries.release()
        if empty and not self._bytes.closed:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), 0)
        self._bytes.close()
        self._file.close()

    def _write(self, first: int, entries: bytes) -> None:
        """Entries from block `first` on, by a system call.

        A store through the mapping keeps the interpreter for as long as the file system does not let the page
        be written (fsfreeze, a device that hangs): no other thread could even say so. So where no data has
        just been written to the same file system, marks begin with this.
        """
        try:
            done = os.pwrite(self._fd, entries, PAGE + first * ENTRY)
        except OSError as error:
            raise from_os(error, f"mark in {self.path}") from error
        if done != len(entries):
            raise Error(Kind.IO, f"mark in {self.path}: {done} of {len(entries)} bytes were written")

    def _uncount(self, first: int, last: int) -> None:
        """The range, in one page of the map, is about to get other states."""
        before = self.states(first, last)
        self.here -= before.count(HERE)
        self.zero -= before.count(ZERO)

    def _turn(self) -> Pending:
        """There and back, behind what the loop has to do meanwhile."""
        assert self._offload is not None
        return self._offload(lambda: None, f"settle {self.path}")

    def _settle_more(self, named: int, settled: Pending, turn: Pending) -> None:
        """The next step. Not by recursion: there may be thousands."""
        error, pending = turn.error, None
        try:
            if error is None and not self._settle_some(named):
                pending = self._turn()
        except Error as met:
            error = met
        if pending is None:
            settled.complete(error)
        else:
            pending.then(partial(self._settle_more, named, settled))

    def _settle_some(self, named: int) -> bool:
        """One step, or without an Offload all of them. Whether all that was `named` is settled."""
        left = STEP
        if self._batches and self._batches[0]:
            self.touch(self._batches[0][-2])
        while self._batches and self._ended_batches < named:
            batch = self._batches[0]
            while batch and left > 0:
                run = batch.pop()
                left -= self._settle(batch.pop(), 1 + (run >> 32), run & 0xFFFFFFFF)
            if not batch:
                self._batches.popleft()
                self._ended_batches += 1
            elif self._offload is not None:
                return False
            else:
                left = STEP
        return True

    def _settle(self, first: int, count: int, entry: int) -> int:
        """These marks, unless they have changed, are for good. What it took, in marks looked at one by one."""
        if count == 1:
            if self._entries[first] == entry:
                self._entries[first] = entry & NOWHERE
            return 1
        for start, end in _by_page(first, first + count):
            came = entry + start - first
            now = self._entries[start:end].tolist()
            if now == list(range(came, came + end - start)):
                self._entries[start:end] = _in_order(came & NOWHERE, end - start)
            else:
                for block, found in enumerate(now, start):
                    if found == entry + block - first:
                        self._entries[block] = found & NOWHERE
        return 1 + count // 8

    def _count(self, length: int, this_boot: bool) -> None:
        """Find the marked pages (SEEK_DATA) and count. Only a page with a mark is surely no hole."""
        at = PAGE
        for data, allocated, _ in self._file.extents(PAGE, self._file.length - PAGE):
            if allocated:
                self._count_pages((at - PAGE) // PAGE, -(-(at - PAGE + data) // PAGE), this_boot)
            at += data
        if any(self.marked(blocks_of(length), (self._file.length - PAGE) // ENTRY)):
            raise _refused(self.path, "marks blocks beyond the end of the disk")

    def _count_pages(self, first: int, last: int, this_boot: bool) -> None:
        for page in range(first, last):
            content = bytes(self._file.fetch(PAGE + page * PAGE, PAGE))
            if _UNFLUSHED.search(content[3::ENTRY]):
                content = self._take_up(page * PER_PAGE, content, this_boot)
            states = _states(content)
            here, zero = states.count(HERE), states.count(ZERO)
            if here or zero:
                self._safe[page] = 1
                self.here += here
                self.zero += zero
                places = {entry & NOWHERE for entry in memoryview(content).cast("I")} - {NOWHERE}
                self.slots = max((self.slots, *places))

    def _take_up(self, first: int, content: bytes, this_boot: bool) -> bytes:
        """A page with marks that were not flushed, as it is from now on: of this boot, or of another."""
        entries = memoryview(content).cast("I").tolist()
        unflushed = [(at, entry) for at, entry in enumerate(entries) if NEW <= entry < ZERO_FLAG]
        if this_boot:
            for at, entry in unflushed:
                if not entry & NOWHERE:
                    raise _refused(self.path, "marks blocks without a slot")
                self._unflushed.extend((first + at, entry))
            return content
        for at, entry in unflushed:
            entries[at] = 0 if entry < OVER_ZERO else entry | ZERO_FLAG
        before = array("I", entries).tobytes()
        # No store: where a rewrite needs new space (btrfs, a snapshot of XFS), that is an error of this open.
        self._file.write(PAGE + first * ENTRY, [memoryview(before)])
        return before


def _states(entries: bytes) -> bytes:
    """The states that entries mean: all at once, as large numbers."""
    count = len(entries) // ENTRY
    if entries.count(0) == len(entries):
        return bytes(count)
    both = int.from_bytes(entries[3::ENTRY].translate(_TOP), "big")
    for byte in range(3):
        both |= int.from_bytes(entries[byte::ENTRY].translate(_LOW), "big")
    return both.to_bytes(count, "big").translate(_STATE)


def _in_order(entry: int, count: int) -> memoryview:
    """Entries of so many adjacent slots."""
    return memoryview(array("I", range(entry, entry + count)))


def merged(
    upper: AllocationMap, lower: AllocationMap, first: int, last: int
) -> Iterator[tuple[int, int, int]]:
    """As `AllocationMap.marked`, of two maps: a block that `upper` does not have is as in `lower`."""
    while first < last:
        found = [page for page in (upper.next_page(first), lower.next_page(first)) if page >= 0]
        first = max(first, min(found) * PER_PAGE) if found else last
        end = min(last, (first // PER_PAGE + 1) * PER_PAGE)
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
    return -(-last // PER_PAGE)


def _by_page(first: int, last: int) -> list[tuple[int, int]]:
    """The range in pieces that lie in one page of the map each."""
    if first // PER_PAGE == (last - 1) // PER_PAGE:
        return [(first, last)]
    inner = list(range((first // PER_PAGE + 1) * PER_PAGE, last, PER_PAGE))
    return list(zip([first, *inner], [*inner, last], strict=True))


def _check_header(page: bytes, path: str, length: int) -> None:
    if len(page) < PAGE or not any(page[: HEADER.size + CHECKSUM.size]):
        raise _refused(path, "was not finished when it was created")
    magic, version, block, disk_length, _ = HEADER.unpack_from(page)
    if magic != MAGIC:
        raise _refused(path, "is something else")
    if version != VERSION or block != BLOCK:
        raise _refused(path, f"has version {version} and blocks of {block}, not {VERSION} and {BLOCK}")
    if CHECKSUM.unpack_from(page, HEADER.size) != (zlib.crc32(page[: HEADER.size]),):
        raise _refused(path, "has a damaged header")
    if disk_length != length:
        raise _refused(path, f"is for a disk of {disk_length} bytes, not of {length}")


def _refused(path: str, why: str) -> Error:
    return Error(
        Kind.BAD_CONFIG,
        f"{path} is no map of this overlay: it {why}. Give another path, or remove the overlay",
    )
