"""An overlay: the blocks that differ from what lies below, in two sparse files.

`<path>.data` holds the blocks one behind the other, in the order in which they
came; `<path>.map` says which blocks are here and in which slot of it (see
`allocation_map`). A block keeps its slot for as long as the overlay lives. Its
data is always written before its mark, so that a process may die at any
instruction: what is marked is whole, what is not marked is not looked at. After
a loss of power what was flushed is there. A block that a write brought here and
that was not flushed since is then not here, or zero if it was that: its mark may
have reached the disk, and its data not. Pre-images are not marked so: whoever
stores them says when their data is synced, before he marks them.

So the data file needs no content of a certain kind: that of an earlier overlay
serves as well as a new one, and already has its space (`create`'s `recycled`).
What such a file holds beyond the slots in use can be given back (`trim`).

Reads that cross layers are split by runs. A read below that could not be
answered at once looks at the map again when it ends, and reads what has come
here meanwhile once more: the copy-before-write saves a block here before it is
overwritten below, so what the read returns is of one time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tcmu_replication.block import allocation_map, overlay_files
from tcmu_replication.block.allocation_map import AllocationMap
from tcmu_replication.block.buffers import clear, part, size, zeroes
from tcmu_replication.block.extents import merged
from tcmu_replication.block.file import File
from tcmu_replication.block.map_format import (
    ABSENT,
    HERE,
    NEW,
    NOWHERE,
    OVER_ZERO,
    ZERO,
    ZERO_FLAG,
)
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending, after, attempt, gather
from tcmu_replication.block.reserve import Reserve
from tcmu_replication.block.slots import Run, Slots, adjacent, position, runs_of, slot_of_all
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, blocks_of, format_size, round_down, round_up


class Overlay(Node):
    """Writes stay here; reads find here what was written, and the rest below.

    `data` is the node that holds what was written, `map` says what of it counts.
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
        make_space: Callable[[], bool] = lambda: False,
        reserve: Reserve | None = None,
    ) -> None:
        """Open an existing overlay of `backing`.

        With `limit` writes fail with NO_SPACE that would store more bytes than
        that, with `reserve` those that would use the last part of the filesystem.
        There and on a full filesystem `make_space()` is asked to free some, and if
        it says that it has, the write is tried again. Raises `Error` NOT_FOUND,
        CONFLICT (in use), or BAD_CONFIG: not an overlay of this length, or one
        whose creation was not finished.
        """
        super().__init__(name, backing.length, backing)
        self.path = os.fspath(path)
        self.limit = limit
        self._make_space = make_space
        self._released = False
        self.map = AllocationMap(overlay_files.map_path(self.path), self.length, offload, reserve)
        self._unflushed = self.map.unflushed
        try:
            self.data: Node = File(overlay_files.data_path(self.path), follow=False, offload=offload)
        except Error:
            self.map.close()
            raise
        tail = self.map.slots
        self._slots = Slots(f"{name}: the overlay {self.path}", tail, reserve)
        if self.data.length <= (tail - 1) * BLOCK or self.map.here > tail:
            self.release()
            raise Error(
                Kind.BAD_CONFIG,
                f"{self.path}.data has {self.data.length} bytes, its map names {self.map.here} blocks in "
                f"{tail} slots: they do not belong together; give another path, or remove the overlay",
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
        make_space: Callable[[], bool] = lambda: False,
        reserve: Reserve | None = None,
        recycled: str | Path | None = None,
    ) -> Overlay:
        """Make an empty overlay and open it; flush it before anything durable names it.

        `recycled` is the data file of an overlay that is no more; if it exists, it becomes this one's.

        Raises `Error` and leaves nothing behind: CONFLICT if one of its files
        exists, NO_SPACE, also if the filesystem holds no file of this length.
        """
        overlay_files.create(path, backing.length, recycled)
        try:
            return cls(
                name, path, backing, offload=offload, limit=limit, make_space=make_space, reserve=reserve
            )
        except BaseException:
            overlay_files.remove(path)
            raise

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the blocks that are here, known zeroes included."""
        return (self.map.here + self.map.zero) * BLOCK

    @property
    def stored_bytes(self) -> int:
        """Bytes of the blocks whose data is here: what `limit` limits."""
        return self.map.here * BLOCK

    @property
    def ejected(self) -> bool:
        """Whether the files have been closed: nothing can be read or written any more."""
        return self._released

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        within = offset % BLOCK
        if within + length <= BLOCK:
            entry = self.map.entry(offset // BLOCK)
            if not entry:
                pending = self.child.read(offset, buffers)
                return None if pending is None else self._read_anew(pending, offset, buffers)
            if entry < ZERO_FLAG:
                return self.data.read(((entry & NOWHERE) - 1) * BLOCK + within, buffers)
            clear(buffers)
            return None
        entries = self.map.entries(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
        slot = slot_of_all(entries)
        if slot is not None:
            return self.data.read(slot * BLOCK + within, buffers)
        return self._read_runs(offset, buffers, length) if any(entries) else self._read_below(offset, buffers)

    def fetch(self, offset: int, length: int) -> memoryview:
        """See `Node.fetch`."""
        entries = self.map.entries(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
        if not any(entries) or slot_of_all(entries) is not None:  # looked at in one go, not block by block
            return self._fetch_run(offset, length, entries[0])
        runs = self._runs(offset, length)
        if len(runs) == 1:
            return self._fetch_run(*runs[0])
        whole = memoryview(bytearray(length))
        for run in runs:
            whole[run[0] - offset : run[0] - offset + run[1]] = self._fetch_run(*run)
        return whole

    def write(
        self, offset: int, buffers: Buffers, fua: bool = False, may_flush: bool = True
    ) -> Pending | None:
        """See `Node.write`. Raises `Error` NO_SPACE at the limit or on a full filesystem.

        Where nobody flushes one write of very many does, as FUA would; `may_flush` says that it may.
        """
        end = offset + (len(buffers[0]) if len(buffers) == 1 else size(buffers))
        first, last = offset // BLOCK, (end - 1) // BLOCK + 1
        try:
            if last - first == 1:
                entry = self.map.entry(first)
                if 0 < entry < ZERO_FLAG:
                    self.data.write(((entry & NOWHERE) - 1 - first) * BLOCK + offset, buffers)
                elif entry:
                    self._write_mixed(offset, end, buffers, [entry])
                else:
                    self._write_new(first, last, offset, end, buffers)
            else:
                entries = self.map.entries(first, last)
                if (slot := slot_of_all(entries)) is not None:
                    self.data.write((slot - first) * BLOCK + offset, buffers)
                elif any(entries):
                    self._write_mixed(offset, end, buffers, entries)
                else:
                    self._write_new(first, last, offset, end, buffers)
        except Error as error:
            if error.kind is not Kind.NO_SPACE or not self._make_space():
                raise
            return self.write(offset, buffers, fua, may_flush)
        return self.flush() if fua or (self._unflushed.crowded and may_flush) else None

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
        named = self._unflushed.begin()
        return after(self.sync_data(), lambda: after(self._unflushed.data_flushed(named), self.sync_map))

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`."""
        end = offset + length
        found: list[Extent] = []
        for first, last, state in self.map.runs(offset // BLOCK, (end - 1) // BLOCK + 1):
            start = max(offset, first * BLOCK)
            run = min(end, last * BLOCK) - start
            if state == ABSENT:
                found += self.child.extents(start, run)
            else:
                found.append(Extent(run, allocated=state == HERE, zero=state == ZERO))
        return merged(found)

    def tell_lost(self, told: Callable[[Error], None]) -> None:
        """Tell `told`, once, when a sync of the data or of the map has failed."""
        self.data.on_lost = told
        self.map.tell_lost(told)

    def close(self) -> None:
        """Close the files, then what lies below. Twice is fine."""
        self.release()
        super().close()

    def release(self) -> None:
        """Close the files and unlock them, and leave what lies below open. Twice is fine."""
        self._release()

    def _release(self, *, for_good: bool = False) -> None:
        self._released = True
        self.map.close(empty=for_good)
        self.data.close()

    def destroy(self) -> None:
        """Close and remove the files; what lies below stays open.

        Files that are gone already are fine. Raises `Error`.
        """
        self._release(for_good=True)
        overlay_files.remove(self.path)

    def retire(self, path: str | Path) -> None:
        """Close, remove the map, and make the data file `path`: `create` may recycle it.

        What lies below stays open. Raises `Error`.
        """
        self._release(for_good=True)
        overlay_files.retire(self.path, path)

    # What the copy-before-write, the commit and the failover ask of an overlay.

    def allocated(self, offset: int, length: int) -> bool:
        """Whether any block that the range touches is here."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK + 1
        return self.map.state(first) != ABSENT if last - first == 1 else self.map.any(first, last)

    def covers(self, offset: int, length: int) -> bool:
        """Whether every block that the range touches is here."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK + 1
        return self.map.state(first) != ABSENT if last - first == 1 else self.map.all(first, last)

    def allocated_runs(self, offset: int = 0) -> Iterator[tuple[int, int, bool]]:
        """What is here from the block of `offset` on: (offset, length, known zero), in order.

        Runs are whole blocks, up to 4 MiB each. Marks that change meanwhile do
        not disturb it.
        """
        for first, last, state in self.map.marked(offset // BLOCK, blocks_of(self.length)):
            start = first * BLOCK
            yield start, min(last * BLOCK, self.length) - start, state == ZERO

    def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The whole blocks, touched by the range, that are not here: (offset, length), up to 4 MiB each."""
        return [
            (first * BLOCK, min(last * BLOCK, self.length) - first * BLOCK)
            for first, last, state in self.map.runs(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
            if state == ABSENT
        ]

    def store(self, offset: int, data: memoryview) -> bool:
        """Write whole blocks, none of which is here, without marking them. True if they are all zero.

        Exactly one `mark` (which cannot fail) or `abandon` of the same range must follow.
        Zeroes are not stored. Raises `Error` as `write` does.
        """
        slot = self._place(offset, data)
        if slot is None:
            return True
        self._slots.keep(offset, len(data), slot)
        return False

    def mark(self, offset: int, length: int, zero: bool) -> None:
        """Mark a range as here that was stored. `zero`: what `store` said."""
        first, last = offset // BLOCK, blocks_of(offset + length)
        if zero:
            self.map.mark(first, last, ZERO)
        else:
            self.map.assign(first, last, 1 + self._slots.claim(offset, length))

    def touch(self, offset: int) -> None:
        """Before several `mark`s, the first at `offset`: a file system that hangs is met here. Raises `Error`."""
        self.map.touch(offset // BLOCK)

    def abandon(self, offset: int, length: int) -> None:
        """Forget that a range was stored: it will not be marked."""
        if self._slots.keeps(offset, length):
            self._slots.give_back(self._slots.claim(offset, length), blocks_of(length))

    def save(self, offset: int, data: memoryview) -> None:
        """Write and mark whole blocks that are not here yet. Raises `Error` as `write` does."""
        slot = self._place(offset, data)
        first, last = offset // BLOCK, blocks_of(offset + len(data))
        if slot is None:
            self.map.mark(first, last, ZERO)
        else:
            self.map.assign(first, last, 1 + slot)

    def trim(self) -> None:
        """Give back what the data file occupies beyond the slots in use. Raises `Error`."""
        start = self._slots.tail * BLOCK
        if start < self.data.length:
            self.data.discard(start, self.data.length - start)

    def forget(self, offset: int, length: int) -> None:
        """Whole blocks are not here any more: reads find what lies below.

        Their space stays until `destroy`, for a read may be under way in it.
        """
        self.map.mark(offset // BLOCK, blocks_of(offset + length), ABSENT)

    def sync_data(self) -> Pending | None:
        """The data alone, as `flush`."""
        return self.data.flush()

    def sync_map(self) -> Pending | None:
        """The marks alone, as `flush`; the data that they name must be durable before."""
        return self.map.flush()

    def _runs(self, offset: int, length: int) -> list[Run]:
        """The range as runs that are read in one piece."""
        return runs_of(offset, length, self.map.entries(offset // BLOCK, (offset + length - 1) // BLOCK + 1))

    def _whole(self, offset: int, end: int, buffers: Buffers, first: int, last: int) -> tuple[int, Buffers]:
        """Where a write begins, and its buffers, once blocks that come here are whole.

        What the request leaves out of its first and last block, of which these are
        the entries, is taken from below, or is zero.
        """
        start = round_down(offset, BLOCK)
        end_whole = min(round_up(end, BLOCK), self.length)
        if end_whole - start <= BLOCK:
            if end - offset == end_whole - start:
                return offset, buffers
            old = self._fetch_run(start, end_whole - start, first)
            return start, [old[: offset - start], *buffers, old[end - start :]]
        if end < end_whole and not 0 < last < ZERO_FLAG:
            buffers = [*buffers, self._fetch_run(end, end_whole - end, last)]
        if start < offset and not 0 < first < ZERO_FLAG:
            return start, [self._fetch_run(start, offset - start, first), *buffers]
        return offset, buffers

    def _write_new(self, first: int, last: int, offset: int, end: int, buffers: Buffers) -> None:
        """Write where nothing is here yet, to new slots: all at once, since these are adjacent."""
        if offset % BLOCK or (end % BLOCK and end != self.length):
            _, buffers = self._whole(offset, end, buffers, 0, 0)
        if self.limit is not None:
            self._check_limit(first, last - first)
        self.map.prepare(first, last)
        slot = self._slots.take(last - first)
        try:
            self.data.write(slot * BLOCK, buffers)
        except Error:
            self._slots.give_back(slot, last - first)
            raise
        self.map.assign(first, last, NEW + 1 + slot)

    def _write_mixed(self, offset: int, end: int, buffers: Buffers, entries: list[int]) -> None:
        """Write where some blocks have a slot and others need one."""
        first, last = offset // BLOCK, offset // BLOCK + len(entries)
        fresh = sum(not 0 < entry < ZERO_FLAG for entry in entries)
        if fresh:
            offset, buffers = self._whole(offset, end, buffers, entries[0], entries[-1])
            end = max(end, offset + size(buffers))
            self._check_limit(first, fresh)
            self.map.prepare(first, last)
        new = sum(not entry & NOWHERE for entry in entries)
        taken = self._slots.take(new) if new else 0
        following = iter(range(taken, taken + new))
        slots = [(entry & NOWHERE) - 1 if entry & NOWHERE else next(following) for entry in entries]
        pieces = adjacent(slots)
        data = buffers[0] if len(buffers) == 1 else None
        try:
            for at, behind in pieces:
                start = max(offset, (first + at) * BLOCK)
                stop = min(end, (first + behind) * BLOCK)
                piece = (
                    part(buffers, start - offset, stop - start)
                    if data is None
                    else (data[start - offset : stop - offset],)
                )
                self.data.write(slots[at] * BLOCK + start - (first + at) * BLOCK, piece)
        except Error:
            self._slots.give_back(taken, new)
            raise
        if fresh:
            self._bring(first, entries, slots)

    def _bring(self, first: int, entries: list[int], slots: list[int]) -> None:
        """Mark those of the blocks from `first` on that were not here; the others stay as they are, flushed or not."""
        marks = [
            0 if 0 < entry < ZERO_FLAG else (OVER_ZERO if entry else NEW) + 1 + slot
            for entry, slot in zip(entries, slots, strict=True)
        ]
        for at, behind in adjacent(marks):
            if marks[at]:
                self.map.assign(first + at, first + behind, marks[at])

    def _place(self, offset: int, data: memoryview) -> int | None:
        """Write whole blocks to new slots and say where; None if they are all zero. Their marks find space."""
        length = len(data)
        first, last = offset // BLOCK, blocks_of(offset + length)
        try:
            if not data[0] and not data[-1] and bytes(data) == bytes(length):
                self.map.prepare(first, last)
                return None
            self._check_limit(first, last - first)
            self.map.prepare(first, last)
            slot = self._slots.take(last - first)
            try:
                self.data.write(slot * BLOCK, [data])
            except Error:
                self._slots.give_back(slot, last - first)
                raise
            return slot
        except Error as error:
            if error.kind is not Kind.NO_SPACE or not self._make_space():
                raise
            return self._place(offset, data)

    def _read_runs(self, offset: int, buffers: Buffers, length: int) -> Pending | None:
        error, pendings = None, []
        for start, run, entry in self._runs(offset, length):
            piece = part(buffers, start - offset, run)
            if entry >= ZERO_FLAG:
                clear(piece)
                continue
            if entry:
                failed, pending = attempt(self.data.read, position(start, entry), piece)
            else:
                failed, pending = attempt(self._read_below, start, piece)
            error = error or failed
            pendings.append(pending)
        return gather(pendings, error)

    def _read_below(self, offset: int, buffers: Buffers) -> Pending | None:
        pending = self.child.read(offset, buffers)
        return None if pending is None else self._read_anew(pending, offset, buffers)

    def _read_anew(self, pending: Pending, offset: int, buffers: Buffers) -> Pending | None:
        return after(pending, lambda: self._read_arrived(offset, buffers))

    def _read_arrived(self, offset: int, buffers: Buffers) -> Pending | None:
        """Read again what has come here since the read below began."""
        length = size(buffers)
        if not self.allocated(offset, length):
            return None
        pendings = []
        for start, run, entry in self._runs(offset, length):
            piece = part(buffers, start - offset, run)
            if entry >= ZERO_FLAG:
                clear(piece)
            elif entry:
                pendings.append(self.data.read(position(start, entry), piece))
        return gather(pendings)

    def _fetch_run(self, offset: int, length: int, entry: int) -> memoryview:
        if 0 < entry < ZERO_FLAG:
            return self.data.fetch(position(offset, entry), length)
        return memoryview(bytes(length)) if entry else self.child.fetch(offset, length)

    def _check_limit(self, first: int, fresh: int) -> None:
        """Raise NO_SPACE before anything is written, where `fresh` more stored blocks are too many."""
        if self.limit is not None and (self.map.here + self._slots.unmarked + fresh) * BLOCK > self.limit:
            raise Error(
                Kind.NO_SPACE,
                f"{self.name}: the overlay {self.path} has reached its limit of {format_size(self.limit)}",
                offset=first * BLOCK,
            )

    def _whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks that lie in the range as a whole; the disk's end ends its last block."""
        end = offset + length
        return blocks_of(offset), blocks_of(end) if end == self.length else end // BLOCK

    def _zero_part(self, offset: int, length: int) -> None:
        if length > 0 and self.map.state(offset // BLOCK) != ZERO:
            self.write(offset, zeroes(length), may_flush=False)  # nobody would wait for its end

    def _zero_blocks(self, first: int, last: int) -> None:
        try:
            self.map.prepare(first, last)
        except Error as error:
            if error.kind is not Kind.NO_SPACE or not self._make_space():
                raise
            self.map.prepare(first, last)
        for start, end, state in self.map.runs(first, last):
            if state == ZERO:
                continue
            runs = self._runs(start * BLOCK, (end - start) * BLOCK) if state == HERE else []
            self.map.mark(start, end, ZERO)
            for offset, length, entry in runs:
                # The mark says it all; that the space could not be given back harms nobody's data.
                with contextlib.suppress(Error):
                    self.data.discard(position(offset, entry), length)


def held_runs(
    upper: Overlay, lower: Overlay, offset: int = 0, end: int | None = None
) -> Iterator[tuple[int, int, bool]]:
    """What either holds, as `upper` over `lower` reads it: (offset, length, known zero), in order.

    Whole blocks that begin at `offset` or behind it and before `end`, in runs of up to a page of the map each;
    the map is read page by page, as the iterator gets there.
    """
    behind = blocks_of(upper.length if end is None else end)
    for first, last, state in allocation_map.merged(upper.map, lower.map, blocks_of(offset), behind):
        start = first * BLOCK
        yield start, min(last * BLOCK, upper.length) - start, state == ZERO
