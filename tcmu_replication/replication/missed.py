"""What the peer may miss: a map of blocks that outlives the process, and sending them again.

    mark        the peer did not get this, or may not have
    resend      read here, write through the filter, and when the peer has it take the mark away

The map is a `Bitmap` beside the manifest; one of an earlier version, an
`AllocationMap`, becomes one at open. Where it could not be written any more, `complete`
is false: then more may differ than it says, and only a comparison of the whole
disks can tell.

A block is read and handed to the filter in one step of the loop, so what is sent
again is never older than what was written before, and what is written later
follows it: the filter below keeps the order of writes that overlap.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tcmu_replication.block import map_format
from tcmu_replication.block.allocation_map import AllocationMap
from tcmu_replication.block.bitmap import Bitmap
from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.file import File
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending, attempt, gather, settle
from tcmu_replication.errors import Error, from_os
from tcmu_replication.replication.manifest import sync_directory
from tcmu_replication.units import BLOCK, KiB, blocks_of

log = logging.getLogger(__name__)

PIECE = 256 * KiB
"""What is read at once."""
UNDER_WAY = 16
"""So many pieces are sent before the next is read."""


class Missed:
    """The map at `path` of a disk of `length` bytes. Until `open` there is nothing in it.

    `unmarked` counts the marks that could not be written.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        self.complete = True
        self.unmarked = 0
        self._length = length
        self._map: Bitmap | None = None
        self._dirty: Dirty | None = None
        self._sending = False
        self._meanwhile: list[tuple[int, int]] = []  # marked while something was being sent

    @property
    def bytes(self) -> int:
        """What is marked, in bytes of the disk."""
        return 0 if self._map is None else self._map.bytes

    def open(self, *, anew: bool = False) -> None:
        """Open the map, and make it if it is not there; `anew` with nothing in it. Raises `Error`."""
        self.close()
        if anew:
            _remove(self.path)
            _remove(_converted(self.path))
        if not os.path.lexists(self.path):
            self._map = Bitmap.create(self.path, self._length)
        else:
            if _is_allocation_map(self.path):
                _convert(self.path, self._length)
            self._map = Bitmap(self.path, self._length)
        self.complete = True
        # Before a manifest names it: without its header the next boot would refuse it.
        self._map.flush()

    def dirty(self) -> Dirty:
        """The map for a resync; what is marked from now on goes through that. Once it is open."""
        assert self._map is not None
        if self._dirty is None:
            self._dirty = Dirty(self._map, self._length)
        return self._dirty

    def mark(self, offset: int, length: int) -> bool:
        """The peer may miss this range. False, and `complete` is false from then on, if it could not be marked."""
        if length == 0:
            return True
        if self._map is None:
            self.complete = False
            return False
        if self._sending:
            self._meanwhile.append(_blocks(offset, length))
        try:
            if self._dirty is not None:
                self._dirty.mark(offset, length)
            else:
                self._map.mark(*_blocks(offset, length))
        except Error as error:
            if self.complete:
                log.error("%s: the map of missed writes is not complete any more: %s", self.path, error)
            self.complete = False
            self.unmarked += 1
        return self.complete

    def flush(self) -> None:
        """Make what is marked stable. Raises `Error`."""
        if self._map is not None:
            self._map.flush()

    def close(self) -> None:
        """Close the map; what is marked stays. Twice is fine."""
        if self._map is not None:
            self._map.close()
            self._map = self._dirty = None

    async def resend(self, disk: Node, peer: Node, stopped: Callable[[], bool]) -> None:
        """Send what is marked again, from `disk` to `peer`, until nothing is, or until `stopped()`.

        Raises the `Error` of the first piece that could not be read or sent; its mark stays.
        """
        batch: list[tuple[int, int]] = []
        for piece in self._pieces():
            if stopped():
                return
            batch.append(piece)
            if len(batch) == UNDER_WAY:
                await self._send(batch, disk, peer)
                batch = []
        await self._send(batch, disk, peer)

    async def _send(self, batch: Iterable[tuple[int, int]], disk: Node, peer: Node) -> None:
        self._sending = True
        try:
            await self._send_and_see(batch, disk, peer)
        finally:
            self._sending = False
            self._meanwhile.clear()

    async def _send_and_see(self, batch: Iterable[tuple[int, int]], disk: Node, peer: Node) -> None:
        """Take the mark of what arrived away, if nothing marked it anew."""
        sent: list[tuple[int, int, Error | None, Pending | None]] = []
        for offset, length in batch:
            error, pending = attempt(_copy, disk, peer, offset, length)
            sent.append((offset, length, error, pending))
        peer.unplug()
        first: Error | None = None
        for offset, length, error, pending in sent:
            try:
                if error is not None:
                    raise error
                await settle(pending)
                self._arrived(*_blocks(offset, length))
            except Error as met:
                first = first or met
        if first is not None:
            raise first

    def _arrived(self, first: int, last: int) -> None:
        if self._map is not None and not any(start < last and first < end for start, end in self._meanwhile):
            self._map.clear(first, last)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """The marked ranges as (offset, length), none longer than PIECE."""
        if self._map is None:
            return
        for first, last in self._map.runs(longest=PIECE // BLOCK):
            yield first * BLOCK, min(last * BLOCK, self._length) - first * BLOCK


def _copy(disk: Node, peer: Node, offset: int, length: int) -> Pending | None:
    # A copy: what `fetch` answers need not stay as it is until the peer has it.
    return gather([peer.write(offset, [memoryview(bytes(disk.fetch(offset, length)))])])


def _blocks(offset: int, length: int) -> tuple[int, int]:
    return offset // BLOCK, blocks_of(offset + length)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise from_os(error, f"remove {path}") from error


def _is_allocation_map(path: Path) -> bool:
    """Whether it is a map as earlier versions made it. Raises `Error` if it is a link, or in use."""
    file = File(os.fspath(path), read_only=True, follow=False)
    try:
        return bytes(file.fetch(0, min(len(map_format.MAGIC), file.length))) == map_format.MAGIC
    finally:
        file.close()


def _converted(path: Path) -> Path:
    """Where the conversion of the map at `path` is made."""
    return path.with_name(f"{path.name}.new")


def _convert(path: Path, length: int) -> None:
    """Make a `Bitmap` of an `AllocationMap`, which stays as it is until that is whole and stable. Raises `Error`."""
    new = _converted(path)
    before = AllocationMap(os.fspath(path), length)
    try:
        _remove(new)  # of a conversion that did not end
        _copy_marks(before, new, length)
        os.replace(new, path)
        sync_directory(path.parent)
    except OSError as error:
        raise from_os(error, f"convert {path}") from error
    finally:
        before.close()


def _copy_marks(before: AllocationMap, new: Path, length: int) -> None:
    converted = Bitmap.create(new, length)
    try:
        for first, last, _ in before.marked(0, blocks_of(length)):
            converted.mark(first, last)
        converted.flush()
    except Error:
        _remove(new)
        raise
    finally:
        converted.close()
