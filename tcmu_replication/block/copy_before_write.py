"""Copy-before-write: the old content of a block goes to the hidden overlay before its first overwrite.

It lies above the secondary's disk and is what forwarded writes meet. Hidden
lies on the same disk, not on this filter: what it does not hold is still
unchanged there. The order is always: old data stored, marked, disk overwritten;
so the last checkpoint can be read at every instant.

That order survives the death of the process. To survive the loss of power too
(`durable`), the stored data and then the marks must be on stable storage before
the disk is touched. One sync for each write would be slow, so writes are
gathered into a batch until `unplug`:

    made       old data stored at once; the write waits in the batch
    unplug     sync of hidden's data; marks; sync of hidden's map
    then       the batch's writes, in order, and their ends
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tcmu_replication.block.buffers import ZEROES, size
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending, after, attempt
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, KiB, MiB, round_down, round_up

PIECE = 256 * KiB
"""The most that is copied at once: it stays in a processor's cache between its read and its write."""

LARGE = MiB
"""In larger ranges the disk is asked first where it is known to be zero."""


class Waiting(NamedTuple):
    """A write that waits for its batch: the call, its end, and the blocks that it touches, in bytes."""

    call: Callable[[], Pending | None]
    promised: Pending
    start: int
    end: int


class Batch:
    """What is gathered between two unplugs.

    `stored` are pre-images without a mark (offset, length, zero), `marked` the
    (offset, length) runs that this batch marked.
    """

    def __init__(self, into: Overlay) -> None:
        self.into = into
        self.stored: list[tuple[int, int, bool]] = []
        self.marked: list[tuple[int, int]] = []
        self.writes: list[Waiting] = []


class CopyBeforeWrite(Node):
    """Saves pre-images of write, zero and discard `into` an overlay; reads and flushes pass.

    When a pre-image cannot be saved the request fails with that error, the
    disk is unchanged, and later requests try again. With `durable` a flush
    covers writes that have ended, as always; those that wait have not.
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
        self._gathered: Batch | None = None
        self._running: Batch | None = None

    @property
    def into(self) -> Overlay:
        """Where pre-images go."""
        return self._into

    def retarget(self, into: Overlay) -> None:
        """Save into another overlay from now on: a checkpoint. Raises `Error` INVALID_STATE if writes wait."""
        if self._gathered or self._running:
            raise Error(
                Kind.INVALID_STATE, f"{self.name}: writes are under way, drain them before a checkpoint"
            )
        self._into = into

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`; lets what waits begin."""
        if self._gathered:
            self.unplug()
        return self.child.read(offset, buffers)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. Raises the `Error` of the disk, or that of saving."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        try:
            if self._durable:
                return self._gather(offset, length, partial(self.child.write, offset, buffers, fua))
            if not self._into.covers(offset, length):
                self._save(offset, length)
            return self.child.write(offset, buffers, fua)
        except Error as error:
            self._failed(error)
            raise

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`. Raises as `write` does."""
        try:
            if self._durable:
                return self._gather(offset, length, partial(self.child.zero, offset, length, fua, unmap))
            self._save(offset, length)
            return self.child.zero(offset, length, fua, unmap)
        except Error as error:
            self._failed(error)
            raise

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`. Raises as `write` does."""
        try:
            if self._durable:
                return self._gather(offset, length, partial(self.child.discard, offset, length))
            self._save(offset, length)
            return self.child.discard(offset, length)
        except Error as error:
            self._failed(error)
            raise

    def flush(self) -> Pending | None:
        """See `Node.flush`; lets what waits begin."""
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
        """Begin what waits, and close the disk. The overlay belongs to whoever opened it."""
        self.unplug()
        super().close()

    def _save(self, offset: int, length: int) -> None:
        """Save what is missing of the range's blocks, at once."""
        into = self._into
        first = round_down(offset, BLOCK)
        if offset + length <= first + BLOCK:  # by far the most usual
            if not into.covers(offset, length):
                into.save(first, self._disk.fetch(first, min(BLOCK, self.length - first)))
            return
        for start, run in into.missing(offset, length):
            self._copy(start, run, into.save)

    def _copy(self, offset: int, length: int, save: Callable[[int, memoryview], None]) -> None:
        """Pass old content on, in pieces; in large ranges holes of the disk are not read."""
        end = offset + length
        while offset < end:
            step = min(PIECE, end - offset)
            if length > LARGE and all(extent.zero for extent in self.child.extents(offset, step)):
                save(offset, ZEROES[:step])
            else:
                save(offset, self.child.fetch(offset, step))
            offset += step

    # Durable pre-images.

    def _gather(self, offset: int, length: int, call: Callable[[], Pending | None]) -> Pending | None:
        """Store what is missing and let the write wait, unless it has nothing to wait for."""
        start, end = round_down(offset, BLOCK), round_up(offset + length, BLOCK)
        if not self._overlaps(start, end) and self._into.covers(offset, length):
            return call()
        batch = self._gathered or Batch(self._into)

        def store(at: int, data: memoryview) -> None:
            batch.stored.append((at, len(data), self._into.store(at, data)))

        for at, run in self._into.missing(offset, length):
            self._copy(at, run, store)
        # Only now: a write whose pre-image could not be stored has no place in the batch. What was
        # stored for it is marked with the batch, if there is one; the disk still holds the same.
        self._gathered = batch
        batch.writes.append(Waiting(call, Pending(), start, end))
        return batch.writes[-1].promised

    def _overlaps(self, start: int, end: int) -> bool:
        return any(
            write.start < end and start < write.end
            for batch in (self._running, self._gathered)
            if batch is not None
            for write in batch.writes
        )

    def _make_durable(self, batch: Batch) -> Pending | None:
        """Sync the data, mark, sync the marks."""
        if not batch.stored:
            return None

        def mark() -> Pending | None:
            for offset, length, zero in batch.stored:
                # A block may have been stored, and marked, for a batch before this one.
                for run in batch.into.missing(offset, length):
                    batch.into.mark(*run, zero)
                    batch.marked.append(run)
            return batch.into.sync_map()

        return after(batch.into.sync_data(), mark)

    def _durable_now(self, batch: Batch, ended: Pending) -> None:
        self._write_batch(batch, ended.error)
        self.unplug()

    def _write_batch(self, batch: Batch, error: Error | None) -> None:
        """The last step: overwrite the disk, in order; or fail every write, if the old data is not safe."""
        if error is not None:
            # Marks that are not durable must not let later writes pass.
            for run in batch.marked:
                batch.into.forget(*run)
        for write in batch.writes:
            failed, pending = (error, None) if error is not None else attempt(write.call)
            if pending is None:
                self._end(write.promised, failed)
            else:
                pending.then(partial(self._pass_on, write.promised))
        self._running = None

    def _pass_on(self, promised: Pending, ended: Pending) -> None:
        self._end(promised, ended.error)

    def _end(self, promised: Pending, error: Error | None) -> None:
        if error is not None:
            self._failed(error)
        promised.complete(error)
