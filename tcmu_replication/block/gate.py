"""The checked door at the top of a chain: bounds, read-only, and the hold of a checkpoint.

Everything from outside comes through here once; below, nodes trust each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from tcmu_replication.block.buffers import size
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending, attempt, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import format_size


class Gate(Node):
    """Refuses what does not fit the disk, counts what passes, and can hold it.

    A checkpoint calls `hold()`, waits for `drained()`, changes what lies below
    (`swap`), and calls `release()`: the requests made meanwhile then run in
    the order in which they were made (`quiet()` is all of that). Requests of no
    bytes end at once.

    Counters since the start: `reads`, `writes` (zeroing included), `bytes_read`
    and `bytes_written`; what is refused does not count.
    """

    def __init__(self, child: Node, *, name: str = "gate") -> None:
        super().__init__(name, child.length, child, read_only=child.read_only)
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self._held = False
        self._releasing = False
        self._queue: deque[tuple[str, tuple[Any, ...], Pending]] = deque()
        self._in_flight = 0
        self._drained: Pending | None = None

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`. Raises `Error` OUT_OF_RANGE."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        if offset < 0 or offset + length > self.length or not length:
            self._refuse(offset, length)
            return None
        self.reads += 1
        self.bytes_read += length
        if self._held:
            return self._wait("read", offset, buffers)
        pending = self.child.read(offset, buffers)
        return None if pending is None else self._follow(pending)

    def fetch(self, offset: int, length: int) -> memoryview:
        """See `Node.fetch`: at once, held or not. Raises `Error` OUT_OF_RANGE."""
        self._check(offset, length)
        return self.child.fetch(offset, length) if length else memoryview(b"")

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        if self.read_only or offset < 0 or offset + length > self.length or not length:
            self._refuse(offset, length, writes=True)
            return None
        self.writes += 1
        self.bytes_written += length
        if self._held:
            return self._wait("write", offset, buffers, fua)
        pending = self.child.write(offset, buffers, fua)
        return None if pending is None else self._follow(pending)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        if self.read_only or offset < 0 or length <= 0 or offset + length > self.length:
            self._refuse(offset, length, writes=True)
            return None
        self.writes += 1
        self.bytes_written += length
        if self._held:
            return self._wait("zero", offset, length, fua, unmap)
        return self._follow(self.child.zero(offset, length, fua, unmap))

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        if self.read_only or offset < 0 or length <= 0 or offset + length > self.length:
            self._refuse(offset, length, writes=True)
            return None
        if self._held:
            return self._wait("discard", offset, length)
        return self._follow(self.child.discard(offset, length))

    def flush(self) -> Pending | None:
        """See `Node.flush`."""
        if self._held:
            return self._wait("flush")
        return self._follow(self.child.flush())

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`: at once, held or not. Raises `Error` OUT_OF_RANGE."""
        self._check(offset, length)
        return self.child.extents(offset, length) if length else []

    def hold(self) -> None:
        """From now on requests wait for `release`. What was gathered below is started. Twice is fine."""
        self._held = True
        self._releasing = False
        self.child.unplug()

    @property
    def held(self) -> bool:
        """Whether new requests wait."""
        return self._held

    @property
    def in_flight(self) -> int:
        """Requests that were passed on and have not ended; those that wait are not among them."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for `release`."""
        return len(self._queue)

    def drained(self) -> Pending | None:
        """Ends when nothing that was passed on is under way; None if nothing is."""
        if self._in_flight == 0:
            return None
        if self._drained is None:
            self._drained = Pending()
        return self._drained

    def swap(self, child: Node) -> Node:
        """Put `child` below instead of the present node, which is returned and stays open.

        Raises `Error` INVALID_STATE unless held and drained, BAD_CONFIG when the length differs.
        """
        if not self._held or self._in_flight:
            raise Error(
                Kind.INVALID_STATE,
                f"{self.name}: the node below is exchanged only while requests are held and none is in flight"
                f" (held: {self._held}, in flight: {self._in_flight})",
            )
        if child.length != self.length:
            raise Error(
                Kind.BAD_CONFIG,
                f"{child.name} has {child.length} bytes and {self.child.name} has {self.length}; "
                "they must be equal",
            )
        before, self.child = self.child, child
        self.read_only = child.read_only
        return before

    def release(self) -> None:
        """Run what waited, in order, and let requests pass again.

        Requests made by whoever is told of an end meanwhile come after those
        that waited. A `hold` from there stops the release.
        """
        if not self._held or self._releasing:
            return
        self._releasing = True
        while self._queue and self._releasing:
            operation, args, promised = self._queue.popleft()
            error, pending = attempt(getattr(self.child, operation), *args)
            if pending is None:
                promised.complete(error)
            else:
                self._follow(pending)
                pending.then(partial(_pass_on, promised))
        if self._releasing:
            self._releasing = self._held = False
        self.child.unplug()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Within it nothing is under way, and new requests wait."""
        self.hold()
        try:
            await settle(self.drained())
            yield
        finally:
            self.release()

    def _wait(self, operation: str, *args: Any) -> Pending:
        promised = Pending()
        self._queue.append((operation, args, promised))
        return promised

    def _follow(self, pending: Pending | None) -> Pending | None:
        if pending is not None and not pending.done:
            self._in_flight += 1
            pending.then(self._ended)
        return pending

    def _ended(self, _: Pending) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._drained is not None:
            drained, self._drained = self._drained, None
            drained.complete()

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise Error(
                Kind.OUT_OF_RANGE,
                f"{self.name}: outside the disk of {self.length} bytes ({format_size(self.length)})",
                offset=offset,
                length=length,
            )

    def _refuse(self, offset: int, length: int, *, writes: bool = False) -> None:
        """The error of a request that does not pass, or nothing if it is only empty."""
        if writes and self.read_only:
            raise Error(Kind.READ_ONLY, f"{self.name}: {self.child.name} is read-only")
        self._check(offset, length)


def _pass_on(promised: Pending, ended: Pending) -> None:
    promised.complete(ended.error, ended.value)
