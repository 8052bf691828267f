"""Copy-before-write: the old content of a block goes to the hidden overlay before its first overwrite.

It lies above the secondary's disk and is what forwarded writes meet. Hidden
lies on the same disk, not on this filter: what it does not hold is still
unchanged there. The order is always: old data stored, marked, disk overwritten;
so the last checkpoint can be read at every instant.

A request whose old data is in the page cache is carried out in one step. Where
it must be read from the disk the request waits, its reads go on beside each
other and beside everything else, and later requests that touch the same blocks
wait behind it (QEMU: block/copy-before-write.c with block/reqlist.c). A block
is saved by the first of those that wait for it, so it is stored once.

The order of steps survives the death of the process. To survive the loss of
power too (`durable`), the stored data and then the marks must be on stable
storage before the disk is touched. One sync for each write would be slow, so
writes whose old data is stored are gathered into a batch until `unplug`:

    stored     the write waits in the batch
    unplug     sync of hidden's data; marks; sync of hidden's map
    then       the batch's writes, in order, and their ends
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from tcmu_replication.block.buffers import ZEROES, size
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending, after, attempt
from tcmu_replication.block.waiting import Batch, Range, Waiting, overlapping, split
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, KiB, MiB, round_down, round_up

PIECE = 256 * KiB
"""The most that is copied at once: it stays in a processor's cache between its read and its write."""

READS = 16
"""The most pieces of one request that are read beside each other."""

ALL_READS = 64
"""When so many are read for all requests together each has one more at most: what bounds their memory."""

TURN = 2 * MiB
"""What one request copies before others have their turn."""

LARGE = MiB
"""In larger ranges the disk is asked first where it is known to be zero."""

LOOK = 16 * MiB
"""How much of a range is looked up in the map at once."""

SPARE = 16
"""Buffers kept for the next reads: memory in use costs less than fresh memory."""


class CopyBeforeWrite(Node):
    """Saves pre-images of write, zero and discard `into` an overlay; reads and flushes pass.

    When a pre-image cannot be saved the request fails with that error, the
    disk is unchanged, and later requests try again. A flush covers writes that
    have ended, as always; those that wait have not.
    `failed(error)` hears of every request that could not be carried out.
    """

    def __init__(
        self,
        disk: Node,
        into: Overlay,
        durable: bool = False,
        *,
        name: str = "copy-before-write",
        failed: Callable[[Error], None] = lambda error: None,
    ) -> None:
        super().__init__(name, disk.length, disk, read_only=disk.read_only)
        self._failed = failed
        self._disk = disk
        self._into = into
        self._durable = durable
        self._waiting: dict[Waiting, None] = {}  # in the order in which they came
        self._gathered: Batch | None = None
        self._running: Batch | None = None
        self._ready: deque[Waiting] = deque()
        self._reads = 0
        self._stepping = False
        self._closing = False
        self._spare: dict[int, list[memoryview]] = {BLOCK: [], PIECE: []}

    @property
    def into(self) -> Overlay:
        """Where pre-images go."""
        return self._into

    def retarget(self, into: Overlay) -> None:
        """Save into another overlay from now on: a checkpoint. Raises `Error` INVALID_STATE if writes wait."""
        if self._waiting:
            raise Error(
                Kind.INVALID_STATE, f"{self.name}: writes are under way, drain them before a checkpoint"
            )
        self._into = into

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`; lets what is gathered begin."""
        if self._gathered:
            self.unplug()
        return self.child.read(offset, buffers)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. Raises the `Error` of the disk, or that of saving."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        saved, reading = False, None
        if not self._waiting or not overlapping(self._waiting, *self._blocks(offset, length)):
            try:
                saved = self._into.covers(offset, length)
                if not saved and not self._durable and offset % BLOCK + length <= BLOCK:
                    first = offset - offset % BLOCK
                    reading = self._read(first, min(BLOCK, self.length - first), self._into.save)
                    saved = reading is None
                if saved:  # by far the most usual
                    return self.child.write(offset, buffers, fua)
            except Error as error:
                self._failed(error)
                raise
        return self._wait(offset, length, partial(self.child.write, offset, buffers, fua), reading)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`. Raises as `write` does."""
        return self._wait(offset, length, partial(self.child.zero, offset, length, fua, unmap))

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`. Raises as `write` does."""
        return self._wait(offset, length, partial(self.child.discard, offset, length))

    def flush(self) -> Pending | None:
        """See `Node.flush`; lets what is gathered begin."""
        if self._gathered:
            self.unplug()
        return self.child.flush()

    def unplug(self) -> None:
        """Let the gathered batch begin, now or when the one that runs has ended."""
        while self._gathered is not None and self._running is None:
            batch, self._gathered = self._gathered, None
            self._running = batch
            error, pending = attempt(self._make_durable, batch)
            if pending is None:
                self._write_batch(batch, error)
            else:
                pending.then(partial(self._durable_now, batch))
        self.child.unplug()

    def close(self) -> None:
        """Begin what is gathered, and close the disk when nothing waits. The overlay is its opener's."""
        self.unplug()
        self._closing = True
        if not self._waiting:
            super().close()

    def _read(self, at: int, length: int, keep: Callable[[int, memoryview], None]) -> Pending | None:
        """Give the disk's old content to `keep`: at once if it is cached, else when it has been read."""
        spare = self._spare[BLOCK if length <= BLOCK else PIECE]
        whole = spare.pop() if spare else memoryview(bytearray(BLOCK if length <= BLOCK else PIECE))
        view = whole if len(whole) == length else whole[:length]
        reading = self._disk.read(at, [view])
        if reading is None:
            keep(at, view)
            spare.append(whole)
            return None

        def arrived() -> None:
            keep(at, view)
            if len(spare) < SPARE:
                spare.append(whole)

        return after(reading, arrived)

    def _blocks(self, offset: int, length: int) -> Range:
        return round_down(offset, BLOCK), min(round_up(offset + length, BLOCK), self.length)

    # Requests that wait.

    def _wait(
        self, offset: int, length: int, call: Callable[[], Pending | None], reading: Pending | None = None
    ) -> Pending | None:
        """Carry out `call` when the old content of its blocks is safe, and after earlier calls for them.

        `reading` ends when the only block has been saved. Raises if it fails at once.
        """
        start, end = self._blocks(offset, length)
        waiting = Waiting(call, start, end, overlapping(self._waiting, start, end))
        self._waiting[waiting] = None
        if reading is None:
            self._advance([waiting])
        else:
            waiting.rest = []
            waiting.under_way = 1
            self._reads += 1
            reading.then(partial(self._read_ended, waiting))
        if not waiting.promised.done:
            return waiting.promised
        if waiting.promised.error is not None:
            raise waiting.promised.error
        return None

    def _advance(self, some: Iterable[Waiting]) -> None:
        """Take requests as far as they get. Not by recursion: many may wait in a row for each other."""
        self._ready.extend(some)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._ready:
                self._step(self._ready.popleft())
        finally:
            self._stepping = False

    def _step(self, waiting: Waiting) -> None:
        if waiting.batch is not None or waiting not in self._waiting:
            return
        while True:
            self._save(waiting)
            if waiting.under_way:
                return
            if waiting.error is not None:
                for at, length, _ in waiting.stored:
                    self._into.abandon(at, length)
                self._carry_out(waiting, waiting.error)
                return
            earlier = waiting.earlier = [other for other in waiting.earlier if other in self._waiting]
            ours, waiting.rest = split(waiting.rest, earlier)
            if not ours:
                break
            waiting.pieces = self._missing(ours)
        # What is left of `rest` is in the hands of earlier requests. To be in one batch with them is enough.
        ahead = [other for other in earlier if other.batch is None or other.batch is not self._gathered]
        if ahead:
            ahead[-1].behind.append(waiting)
        elif earlier or waiting.stored:
            self._gather(waiting)
        else:
            self._carry_out(waiting)

    def _missing(self, ranges: Iterable[Range]) -> Iterator[tuple[int, int]]:
        """The pieces of the ranges that hidden does not hold: (offset, length)."""
        for start, end in ranges:
            for first in range(start, end, LOOK):
                for at, run in self._into.missing(first, min(LOOK, end - first)):
                    for offset in range(at, at + run, PIECE):
                        yield offset, min(PIECE, at + run - offset)

    def _save(self, waiting: Waiting) -> None:
        """Save the next pieces, as many as have their turn; after an error no more."""
        copied = 0
        while waiting.error is None and waiting.under_way < (READS if self._reads < ALL_READS else 1):
            if copied >= TURN and self._make_way(waiting):
                return
            piece = next(waiting.pieces, None)
            if piece is None:
                return
            error, reading = attempt(self._copy, waiting, *piece)
            if error is not None:
                waiting.error = error
            elif reading is not None:
                waiting.under_way += 1
                self._reads += 1
                reading.then(partial(self._read_ended, waiting))
            copied += piece[1]

    def _copy(self, waiting: Waiting, at: int, length: int) -> Pending | None:
        """Save one piece; in large ranges holes of the disk are not read."""
        if waiting.end - waiting.start > LARGE and all(e.zero for e in self._disk.extents(at, length)):
            self._keep(waiting, at, ZEROES[:length])
            return None
        return self._read(at, length, partial(self._keep, waiting))

    def _keep(self, waiting: Waiting, at: int, data: memoryview) -> None:
        if self._durable:
            waiting.stored.append((at, len(data), self._into.store(at, data)))
        else:
            self._into.save(at, data)

    def _read_ended(self, waiting: Waiting, ended: Pending) -> None:
        self._reads -= 1
        if waiting.error is None:
            waiting.error = ended.error
        self._resume(waiting)

    def _make_way(self, waiting: Waiting) -> bool:
        """Go on when the loop has looked after others; False if no loop runs, and so nobody else waits."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        waiting.under_way += 1
        loop.call_soon(self._resume, waiting)
        return True

    def _resume(self, waiting: Waiting) -> None:
        waiting.under_way -= 1
        self._advance([waiting])
        if self._gathered is not None:
            self.unplug()  # whoever made the request did it long ago

    def _carry_out(self, waiting: Waiting, error: Error | None = None) -> None:
        """The last step: overwrite the disk, or with `error` do not."""
        pending = None
        if error is None:
            error, pending = attempt(waiting.call)
        del self._waiting[waiting]
        if self._closing and not self._waiting:
            super().close()
        behind, waiting.behind, waiting.earlier = waiting.behind, [], []
        self._advance(behind)
        if pending is None:
            self._end(waiting.promised, error)
        else:
            pending.then(partial(self._pass_on, waiting.promised))

    def _pass_on(self, promised: Pending, ended: Pending) -> None:
        self._end(promised, ended.error)

    def _end(self, promised: Pending, error: Error | None) -> None:
        if error is not None:
            self._failed(error)
        promised.complete(error)

    # Durable pre-images.

    def _gather(self, waiting: Waiting) -> None:
        if self._gathered is None:
            self._gathered = Batch()
        waiting.batch = self._gathered
        waiting.batch.stored += waiting.stored
        waiting.batch.writes.append(waiting)
        behind, waiting.behind = waiting.behind, []
        self._advance(behind)

    def _make_durable(self, batch: Batch) -> Pending | None:
        """Sync the data, mark, sync the marks."""

        def mark() -> Pending | None:
            if batch.stored:
                self._into.touch(batch.stored[0][0])
            for stored in batch.stored:
                self._into.mark(*stored)
            batch.marked = True
            return self._into.sync_map()

        return after(self._into.sync_data(), mark)

    def _durable_now(self, batch: Batch, ended: Pending) -> None:
        self._write_batch(batch, ended.error)
        self.unplug()

    def _write_batch(self, batch: Batch, error: Error | None) -> None:
        """Overwrite the disk, in order; or fail every write, if the old data is not safe."""
        if error is not None:
            # Marks that are not durable must not let later writes pass.
            undo = self._into.forget if batch.marked else self._into.abandon
            for at, length, _ in batch.stored:
                undo(at, length)
        for waiting in batch.writes:
            self._carry_out(waiting, error)
        self._running = None
