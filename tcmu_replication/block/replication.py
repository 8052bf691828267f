"""The replication filter: the node that QEMU calls `replication`.

It decides nothing. The engines (`replication.primary`, `replication.secondary`)
point it at the node that reads come from and the one that writes go to:

    primary    forwards to the remote node; a failure is reported to the engine
               and answered with success (QEMU), reads are I/O errors (QEMU)
    secondary  reads come from active over hidden over disk, later from the disk;
               writes go to active, later to both as `Split` has it, last to the disk

Before start and after a primary's stop both point at `Closed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from tcmu_replication.block.buffers import part, size
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.overlay import Overlay, held_runs
from tcmu_replication.block.pending import Pending, after, attempt, gather
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, round_down

_NOT_REACHED = {Kind.PEER_LOST, Kind.CANCELLED, Kind.INVALID_STATE}
"""What a remote node says of a request that has no answer: lost, hung up on, closed."""


class Closed(Node):
    """Answers every request with an I/O error, as the filter does where the table says EIO."""

    kind = Kind.IO

    def __init__(self, length: int, reason: str) -> None:
        super().__init__("closed", length)
        self.reason = reason

    def _refuse(self, offset: int | None = None) -> Error:
        return Error(self.kind, self.reason, offset=offset)

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        raise self._refuse(offset)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        raise self._refuse(offset)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        raise self._refuse(offset)

    def discard(self, offset: int, length: int) -> Pending | None:
        raise self._refuse(offset)

    def flush(self) -> Pending | None:
        """Nothing can have been written, so all of it is stable."""
        return None

    def extents(self, offset: int, length: int) -> list[Extent]:
        raise self._refuse(offset)


class NotReady(Closed):
    """A disk that must not be served now, though it is there: its data may be old. `reason` says why.

    `below` is what would be served; nothing is asked of it. `waits`: that ends by itself, so initiators do
    well to try again.
    """

    def __init__(self, below: Node, reason: str, *, waits: bool = False) -> None:
        super().__init__(below.length, reason)
        self.child = below
        self.name = "not-ready"
        self.kind = Kind.BECOMING_READY if waits else Kind.NOT_READY
        self.not_ready = self._refuse()

    def flush(self) -> Pending | None:
        """What was written and not flushed may be on no disk that counts: no promise."""
        raise self._refuse()


class Forward(Node):
    """The primary's filter: sends writes to `remote`, until one fails: that opens the `gap`.

    `missed(offset, length, error)` is told of each range that the peer did not
    get. If it says that this is written down, the failure is answered with success,
    else with the error. A mirror that has lost its own disk sets `alone`: then the
    peer's word is final, and since nobody else has what it does not take there is no gap.

    A flush that does not reach the peer opens no gap, for nothing differs by it:
    the remote node sends one as soon as the link is back. One that the peer
    fails does, since what it has taken may be lost there.
    """

    def __init__(
        self,
        name: str,
        remote: Node,
        missed: Callable[[int, int, Error], bool],
        gap: Error | None = None,
    ) -> None:
        super().__init__(name, remote.length, remote)
        self.alone = False
        self.gap = gap
        self._missed = missed

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        raise Error(Kind.IO, "the primary's replication filter is not read from", offset=offset)

    def fetch(self, offset: int, length: int) -> memoryview:
        raise Error(Kind.IO, "the primary's replication filter is not read from", offset=offset)

    def extents(self, offset: int, length: int) -> list[Extent]:
        raise Error(Kind.IO, "the primary's replication filter is not read from", offset=offset)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        return self._forward(offset, size(buffers), self.child.write, offset, buffers, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        return self._forward(offset, length, self.child.zero, offset, length, fua, unmap)

    def discard(self, offset: int, length: int) -> Pending | None:
        return self._forward(offset, length, self.child.discard, offset, length)

    def flush(self) -> Pending | None:
        return self._forward(0, 0, self.child.flush)

    def _forward(
        self, offset: int, length: int, call: Callable[..., Pending | None], *args: object
    ) -> Pending | None:
        if self.gap is not None:
            # One write is missing over there. Later ones without it would make the peer's disk
            # a state that this one never had, so they are missed too.
            self._miss(offset, length, self.gap)
            return None
        try:
            pending = call(*args)
        except Error as error:
            self._miss(offset, length, error)
            return None
        if pending is None:
            return None
        whole = Pending()

        def ended(p: Pending) -> None:
            counts = p.error is not None and self._counts(offset, length, p.error)
            whole.complete(p.error if counts else None)

        pending.then(ended)
        return whole

    def _miss(self, offset: int, length: int, error: Error) -> None:
        if self._counts(offset, length, error):
            raise error

    def _counts(self, offset: int, length: int, error: Error) -> bool:
        """The peer did not get this: open the gap, and say whether that is the caller's error."""
        if self.alone:
            return True
        if length or (self.gap is None and error.kind not in _NOT_REACHED):
            if self.gap is None:
                self.gap = error
            return not self._missed(offset, length, error)
        return False


class Split(Node):
    """Writes to `active` where active or `hidden` holds the block, else to `disk`.

    So the overlays never grow while they are being committed, and after a
    failed commit the LUN stays right (QEMU's FAILOVER_FAILED rule). A write to
    active is reported through `redo`: what of it was already copied must be
    copied again.

    What is flushed here is safe only when the overlays' marks are stable too: a
    block that had been forgotten would come back with a loss of power, over
    what was written on the disk since. So is that of FUA, for the same reason.
    """

    def __init__(
        self, active: Overlay, hidden: Overlay, disk: Node, redo: Callable[[int, int], None]
    ) -> None:
        super().__init__("split", disk.length, active)
        self.active = active
        self.hidden = hidden
        self.disk = disk
        self._redo = redo

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.active, self.disk)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        parts = self._parts(offset, size(buffers))
        if len(parts) == 1:
            written = parts[0][2].write(offset, buffers)
        else:
            written = _all([partial(node.write, o, part(buffers, o - offset, n)) for o, n, node in parts])
        return after(written, self.flush) if fua else written

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        parts = self._parts(offset, length)
        written = _all([partial(node.zero, o, n, unmap=unmap) for o, n, node in parts])
        return after(written, self.flush) if fua else written

    def discard(self, offset: int, length: int) -> Pending | None:
        return _all([partial(node.discard, o, n) for o, n, node in self._parts(offset, length)])

    def flush(self) -> Pending | None:
        return _all([self.active.flush, self.hidden.flush, self.disk.flush])

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, Node]]:
        """The range as (offset, length, node) runs, each going to one node."""
        active, hidden = self.active, self.hidden
        if not active.allocated(offset, length) and not hidden.allocated(offset, length):
            return [(offset, length, self.disk)]
        end = offset + length
        parts: list[tuple[int, int, Node]] = []
        at = offset
        for start, run, _ in held_runs(active, hidden, round_down(offset, BLOCK), end):
            start, behind = max(start, offset), min(start + run, end)
            if at < start:
                parts.append((at, start - at, self.disk))
            elif parts:
                start = parts.pop()[0]
            parts.append((start, behind - start, active))
            at = behind
        if at < end:
            parts.append((at, end - at, self.disk))
        for start, run, node in parts:
            if node is active:
                self._redo(start, run)
        return parts


def _all(calls: Sequence[Callable[[], Pending | None]]) -> Pending | None:
    """Make every call, also after one that failed; ends when all have, with the first error."""
    outcomes = [attempt(call) for call in calls]
    first = next((error for error, _ in outcomes if error is not None), None)
    return gather((pending for _, pending in outcomes), first)


class Filter(Node):
    """The secondary's filter: reads come from `reads`, writes go to `writes`.

    `alone` is called before every change, for as long as it is set.
    """

    def __init__(self, name: str, length: int, closed: Closed) -> None:
        super().__init__(name, length)
        self.reads: Node = closed
        self.writes: Node = closed
        self.alone: Callable[[], None] | None = None

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.reads,) if self.reads is self.writes else (self.reads, self.writes)

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        return self.reads.read(offset, buffers)

    def fetch(self, offset: int, length: int) -> memoryview:
        return self.reads.fetch(offset, length)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return self.reads.extents(offset, length)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        if self.alone is not None:
            self.alone()
        return self.writes.write(offset, buffers, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        if self.alone is not None:
            self.alone()
        return self.writes.zero(offset, length, fua, unmap)

    def discard(self, offset: int, length: int) -> Pending | None:
        if self.alone is not None:
            self.alone()
        return self.writes.discard(offset, length)

    def flush(self) -> Pending | None:
        return self.writes.flush()

    def unplug(self) -> None:
        self.writes.unplug()
