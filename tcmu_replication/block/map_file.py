"""The map file of an overlay, mapped: which of its pages are safe to look at, and how they are changed.

A mark is a store into the mapping: it outlives the process, needs no
read-modify-write, and many are looked at in one go. Pages are touched only once
something is marked in them, so everything costs what was marked and not what the
disk could hold.

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
from collections.abc import Iterator

from tcmu_replication.block.file import File
from tcmu_replication.block.map_format import (
    ENTRY,
    PAGE,
    PER_PAGE,
    check_header,
    file_size,
    header,
    pages_of,
    refused,
)
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.reserve import Reserve
from tcmu_replication.errors import Error, Kind, from_os

_EMPTY_PAGE = memoryview(bytes(PAGE))


class MapFile:
    """One, open and locked. Blocks are numbered.

    `entries` are all of the file, by block, and `safe` says of each page, with a 1, that it may be touched there.
    `of_this_boot` is whether it was last opened in this one. `node` is the file itself.
    """

    def __init__(self, path: str, length: int, offload: Offload | None, reserve: Reserve | None) -> None:
        """Open the map of a disk of `length` bytes. Raises `Error` BAD_CONFIG if it is not that.

        No page is safe yet. `reserve` is what it leaves of the filesystem.
        """
        self.path = path
        self._reserve = reserve
        self._head = header(length)
        file = File(path, follow=False, offload=offload)
        self.node: Node = file
        try:
            found = bytes(file.fetch(0, min(PAGE, file.length)))
            check_header(found, path, length)
            if file.length != file_size(length):
                raise refused(path, f"has {file.length} bytes instead of {file_size(length)}")
            self._fd = file.fileno()
            self._bytes = mmap.mmap(self._fd, file.length)
            self.entries = memoryview(self._bytes)[PAGE:].cast("I")
        except OSError as error:
            file.close()
            raise from_os(error, f"map {path}") from error
        except Error:
            file.close()
            raise
        self.of_this_boot = found.startswith(self._head)
        # A byte per page of the map, as a mapping of its own: of a large disk it costs what was touched too.
        pages = (file.length - PAGE) // PAGE
        self.safe = mmap.mmap(-1, max(pages, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def pages(self) -> Iterator[tuple[int, bytes]]:
        """The pages where the file has data (SEEK_DATA), and their content. Only one with a mark is surely no hole."""
        at = 0
        for data, allocated, _ in self.node.extents(PAGE, self.node.length - PAGE):
            if allocated:
                for page in range(at // PAGE, -(-(at + data) // PAGE)):
                    yield page, bytes(self.node.fetch(PAGE + page * PAGE, PAGE))
            at += data

    def content(self, first: int, last: int) -> bytes:
        """The entries of the range, in a page that is safe, as they lie there."""
        return self._bytes[PAGE + first * ENTRY : PAGE + last * ENTRY]

    def prepare(self, first: int, last: int) -> None:
        """Make the pages of the range safe. Raises `Error` (NO_SPACE)."""
        for page in range(first // PER_PAGE, pages_of(last)):
            if not self.safe[page]:
                if self._reserve is not None:
                    self._reserve.take(PAGE)
                self.node.write(PAGE + page * PAGE, [_EMPTY_PAGE])
                self.safe[page] = 1

    def touch(self, block: int) -> None:
        """Wait here, if at all, for a file system that hangs, and not in the `assign` that follows."""
        if self.safe[block // PER_PAGE]:
            self.write(block, self.content(block, block + 1))

    def write(self, first: int, entries: bytes) -> None:
        """Entries from block `first` on, by a system call. Raises `Error`.

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

    def rewrite(self, page: int, content: bytes) -> None:
        """Replace a page. Raises `Error`: where a rewrite needs new space (btrfs, a snapshot of XFS) NO_SPACE."""
        self.node.write(PAGE + page * PAGE, [memoryview(content)])

    def take_into_this_boot(self) -> None:
        """Say that its marks are as this boot understands them. Raises `Error`."""
        if not self.of_this_boot:
            self.node.write(0, [memoryview(self._head)])
            self.of_this_boot = True

    def close(self, *, empty: bool = False) -> None:
        """Unmap and unlock; `empty` the file first if it is about to be removed. Twice is fine.

        mmap holds the interpreter while it unmaps, for as long as there are pages. To empty the file
        unmaps them too, and lets other threads run meanwhile.
        """
        self.entries.release()
        if empty and not self._bytes.closed:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
        self._bytes.close()
        self.node.close()
