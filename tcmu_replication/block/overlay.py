"""An overlay: the blocks that differ from what lies below, in two sparse files.

`<path>.data` is as long as the disk and holds each block at its own offset;
`<path>.map` says which blocks are here (see `allocation_map`). A block's data
is always written before its mark, so that a process may die at any instruction:
what is marked is whole, what is not marked is not looked at. After a loss of
power what was flushed is there; a block marked but not flushed may then read as
zeroes.

Reads that cross layers are split by runs. A read below that could not be
answered at once looks at the map again when it ends, and reads what has come
here meanwhile once more: the copy-before-write saves a block here before it is
overwritten below, so what the read returns is of one time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tcmu_replication.block import allocation_map
from tcmu_replication.block.allocation_map import ABSENT, HERE, ZERO, AllocationMap, blocks_of
from tcmu_replication.block.buffers import clear, part, size, zeroes
from tcmu_replication.block.extents import merged
from tcmu_replication.block.file import File
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending, after, attempt, gather
from tcmu_replication.block.space import create_sparse
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import BLOCK, format_size, round_down, round_up


class Overlay(Node):
    """Writes stay here; reads find here what was written, and the rest below.

    `flush` and FUA cover what is here, not what lies below. `zero` and
    `discard` of whole blocks store a mark alone, that of parts of blocks writes
    zeroes or does nothing. A failed write leaves each block as it was or as it
    was to be.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        backing: Node,
        *,
        offload: Offload | None = None,
        limit: int | None = None,
    ) -> None:
        """Open an existing overlay of `backing`.

        With `limit` writes fail with NO_SPACE that would store more bytes than
        that. Raises `Error` NOT_FOUND, CONFLICT (in use), or BAD_CONFIG: not an
        overlay of this length, or one whose creation was not finished.
        """
        super().__init__(name, backing.length, backing)
        self.path = os.fspath(path)
        self.limit = limit
        self._released = False
        self._map = AllocationMap(f"{self.path}.map", self.length, offload)
        try:
            self.data: Node = File(f"{self.path}.data", offload=offload)
        except Error:
            self._map.close()
            raise
        if self.data.length != self.length:
            self.release()
            raise Error(
                Kind.BAD_CONFIG,
                f"{self.path}.data has {self.data.length} bytes, its overlay needs {self.length}: "
                "it was cut or belongs elsewhere; give another path, or remove the overlay",
            )

    @classmethod
    def create(
        cls,
        name: str,
        path: str | Path,
        backing: Node,
        *,
        offload: Offload | None = None,
        limit: int | None = None,
    ) -> Overlay:
        """Make an empty overlay and open it; flush it before anything durable names it.

        Raises `Error` and leaves nothing behind: CONFLICT if one of its files
        exists, NO_SPACE, also if the filesystem holds no file of this length.
        """
        made: list[str] = []
        data_path, map_path = _paths(path)
        try:
            create_sparse(data_path, backing.length, b"")
            made.append(data_path)
            # The header comes last of all: a map without it was not finished.
            create_sparse(
                map_path, allocation_map.file_size(backing.length), allocation_map.header(backing.length)
            )
            made.append(map_path)
            return cls(name, path, backing, offload=offload, limit=limit)
        except BaseException:
            for leftover in made:
                os.unlink(leftover)
            raise

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the blocks that are here, known zeroes included."""
        return (self._map.here + self._map.zero) * BLOCK

    @property
    def stored_bytes(self) -> int:
        """Bytes of the blocks whose data is here: what `limit` limits."""
        return self._map.here * BLOCK

    @property
    def ejected(self) -> bool:
        """Whether the files have been closed: nothing can be read or written any more."""
        return self._released

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK + 1
        if last - first == 1:
            state = self._map.state(first)
        else:
            states = self._map.states(first, last)
            state = states[0]
            if states.count(state) != last - first:
                return self._read_runs(offset, buffers, length)
        if state == HERE:
            return self.data.read(offset, buffers)
        if state == ABSENT:
            return self._read_below(offset, buffers)
        clear(buffers)
        return None

    def fetch(self, offset: int, length: int) -> memoryview:
        """See `Node.fetch`."""
        runs = self._runs(offset, length)
        if len(runs) == 1:
            return self._fetch_run(offset, length, runs[0][2])
        whole = memoryview(bytearray(length))
        for start, run, state in runs:
            whole[start - offset : start - offset + run] = self._fetch_run(start, run, state)
        return whole

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. Raises `Error` NO_SPACE at the limit or on a full filesystem."""
        end = offset + (len(buffers[0]) if len(buffers) == 1 else size(buffers))
        first, last = offset // BLOCK, (end - 1) // BLOCK + 1
        if last - first == 1 and self._map.state(first) == HERE:
            self.data.write(offset, buffers)
            return self.flush() if fua else None
        states = self._map.states(first, last)
        fresh = last - first - states.count(HERE)
        if fresh:
            self._make_room(first, last, fresh)
            offset, buffers = self._whole(offset, end, buffers, states)
        self.data.write(offset, buffers)
        if fresh:
            self._map.mark(first, last, HERE)
        return self.flush() if fua else None

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`. Raises `Error` as `write` does."""
        end = offset + length
        first, last = self._whole_blocks(offset, length)
        if first < last:
            self._zero_part(offset, first * BLOCK - offset)
            self._zero_part(last * BLOCK, end - last * BLOCK)
            self._zero_blocks(first, last)
        else:
            at_boundary = min(end, first * BLOCK)
            self._zero_part(offset, at_boundary - offset)
            self._zero_part(at_boundary, end - at_boundary)
        return self.flush() if fua else None

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`: whole blocks become zero."""
        first, last = self._whole_blocks(offset, length)
        if first < last:
            self._zero_blocks(first, last)
        return None

    def flush(self) -> Pending | None:
        """See `Node.flush`: the data, and then the map that names it."""
        return after(self.sync_data(), self.sync_map)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`."""
        found: list[Extent] = []
        for start, run, state in self._runs(offset, length):
            if state == ABSENT:
                found += self.child.extents(start, run)
            else:
                found.append(Extent(run, allocated=state == HERE, zero=state == ZERO))
        return merged(found)

    def close(self) -> None:
        """Close the files, then what lies below. Twice is fine."""
        self.release()
        super().close()

    def release(self) -> None:
        """Close the files and unlock them, and leave what lies below open. Twice is fine."""
        self._released = True
        self._map.close()
        self.data.close()

    def destroy(self) -> None:
        """Close and remove the files; what lies below stays open.

        Files that are gone already are fine. Raises `Error`.
        """
        self.release()
        try:
            for path in reversed(_paths(self.path)):  # without its map the data is nobody's
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
        except OSError as error:
            raise from_os(error, f"remove the overlay {self.path}") from error

    # What the copy-before-write, the commit and the failover ask of an overlay.

    def allocated(self, offset: int, length: int) -> bool:
        """Whether any block that the range touches is here."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK + 1
        return self._map.state(first) != ABSENT if last - first == 1 else self._map.any(first, last)

    def covers(self, offset: int, length: int) -> bool:
        """Whether every block that the range touches is here."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK + 1
        return self._map.state(first) != ABSENT if last - first == 1 else self._map.all(first, last)

    def allocated_runs(self, offset: int = 0) -> Iterator[tuple[int, int, bool]]:
        """What is here from the block of `offset` on: (offset, length, known zero), in order.

        Runs are whole blocks, up to 16 MiB each. Marks that change meanwhile do
        not disturb it.
        """
        for first, last, state in self._map.marked(offset // BLOCK, blocks_of(self.length)):
            start = first * BLOCK
            yield start, min(last * BLOCK, self.length) - start, state == ZERO

    def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The whole blocks, touched by the range, that are not here: (offset, length), up to 16 MiB each."""
        return [
            (first * BLOCK, min(last * BLOCK, self.length) - first * BLOCK)
            for first, last, state in self._map.runs(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
            if state == ABSENT
        ]

    def store(self, offset: int, data: memoryview) -> bool:
        """Write whole blocks without marking them; afterwards `mark` cannot fail. True if they are all zero.

        Zeroes are not stored. Raises `Error` as `write` does.
        """
        length = len(data)
        first, last = offset // BLOCK, blocks_of(offset + length)
        if not data[0] and not data[-1] and bytes(data) == bytes(length):
            self._map.prepare(first, last)
            return True
        self._make_room(first, last, last - first)
        self.data.write(offset, [data])
        return False

    def mark(self, offset: int, length: int, zero: bool) -> None:
        """Mark whole blocks, stored before, as here. `zero`: what `store` said."""
        self._map.mark(offset // BLOCK, blocks_of(offset + length), ZERO if zero else HERE)

    def save(self, offset: int, data: memoryview) -> None:
        """Write and mark whole blocks that are not here yet. Raises `Error` as `write` does."""
        self.mark(offset, len(data), self.store(offset, data))

    def forget(self, offset: int, length: int) -> None:
        """Whole blocks are not here any more: reads find what lies below.

        Their space stays until `destroy`, for a read may be under way in it.
        """
        self._map.mark(offset // BLOCK, blocks_of(offset + length), ABSENT)

    def sync_data(self) -> Pending | None:
        """The data alone, as `flush`."""
        return self.data.flush()

    def sync_map(self) -> Pending | None:
        """The marks alone, as `flush`; the data that they name must be durable before."""
        return self._map.flush()

    def _runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """The range as (offset, length, state) runs."""
        end = offset + length
        found = []
        for first, last, state in self._map.runs(offset // BLOCK, (end - 1) // BLOCK + 1):
            start = max(offset, first * BLOCK)
            found.append((start, min(end, last * BLOCK) - start, state))
        return found

    def _whole(self, offset: int, end: int, buffers: Buffers, states: bytes) -> tuple[int, Buffers]:
        """Where a write begins, and its buffers, once blocks that come here are whole.

        What the request leaves out of them is taken from below, or is zero.
        """
        start = round_down(offset, BLOCK)
        end_whole = min(round_up(end, BLOCK), self.length)
        if len(states) == 1:
            if end - offset == end_whole - start:
                return offset, buffers
            old = self._fetch_run(start, end_whole - start, states[0])
            return start, [old[: offset - start], *buffers, old[end - start :]]
        if end < end_whole and states[-1] != HERE:
            buffers = [*buffers, self._fetch_run(end, end_whole - end, states[-1])]
        if start < offset and states[0] != HERE:
            return start, [self._fetch_run(start, offset - start, states[0]), *buffers]
        return offset, buffers

    def _read_runs(self, offset: int, buffers: Buffers, length: int) -> Pending | None:
        error, pendings = None, []
        for start, run, state in self._runs(offset, length):
            piece = part(buffers, start - offset, run)
            if state == ZERO:
                clear(piece)
                continue
            failed, pending = attempt(self.data.read if state == HERE else self._read_below, start, piece)
            error = error or failed
            pendings.append(pending)
        return gather(pendings, error)

    def _read_below(self, offset: int, buffers: Buffers) -> Pending | None:
        pending = self.child.read(offset, buffers)
        if pending is None:
            return None
        return after(pending, lambda: self._read_arrived(offset, buffers))

    def _read_arrived(self, offset: int, buffers: Buffers) -> Pending | None:
        """Read again what has come here since the read below began."""
        length = size(buffers)
        if not self.allocated(offset, length):
            return None
        pendings = []
        for start, run, state in self._runs(offset, length):
            piece = part(buffers, start - offset, run)
            if state == HERE:
                pendings.append(self.data.read(start, piece))
            elif state == ZERO:
                clear(piece)
        return gather(pendings)

    def _fetch_run(self, offset: int, length: int, state: int) -> memoryview:
        if state == HERE:
            return self.data.fetch(offset, length)
        return self.child.fetch(offset, length) if state == ABSENT else memoryview(bytes(length))

    def _make_room(self, first: int, last: int, fresh: int) -> None:
        """Raise NO_SPACE before anything is written, where `fresh` more stored blocks find no room."""
        if self.limit is not None and self._used_bytes() + fresh * BLOCK > self.limit:
            raise Error(
                Kind.NO_SPACE,
                f"{self.name}: the overlay {self.path} has reached its limit of {format_size(self.limit)}",
                offset=first * BLOCK,
            )
        self._map.prepare(first, last)

    def _used_bytes(self) -> int:
        """What the data file occupies: also what was stored and not marked yet."""
        try:
            return os.stat(f"{self.path}.data").st_blocks * 512
        except OSError as error:
            raise from_os(error, f"look at {self.path}.data") from error

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks that lie in the range as a whole; the disk's end ends its last block."""
        end = offset + length
        return blocks_of(offset), blocks_of(end) if end == self.length else end // BLOCK

    def _zero_part(self, offset: int, length: int) -> None:
        if length > 0 and self._map.state(offset // BLOCK) != ZERO:
            self.write(offset, zeroes(length))

    def _zero_blocks(self, first: int, last: int) -> None:
        for start, end, state in self._map.runs(first, last):
            if state == ZERO:
                continue
            self._map.mark(start, end, ZERO)
            if state == HERE:
                # The mark says it all; that the space could not be given back harms nobody's data.
                with contextlib.suppress(Error):
                    self.data.discard(start * BLOCK, min(end * BLOCK, self.length) - start * BLOCK)


def held_runs(upper: Overlay, lower: Overlay, offset: int = 0) -> Iterator[tuple[int, int, bool]]:
    """What either holds, as `upper` over `lower` reads it: (offset, length, known zero) from `offset` on, in order.

    Runs are whole blocks, up to a page of the map each; the map is read page by page, as the iterator gets there.
    """
    end = blocks_of(upper.length)
    for first, last, state in allocation_map.merged(upper._map, lower._map, offset // BLOCK, end):
        start = first * BLOCK
        yield start, min(last * BLOCK, upper.length) - start, state == ZERO


def _paths(path: str | Path) -> tuple[str, str]:
    return f"{path}.data", f"{path}.map"
