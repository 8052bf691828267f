"""The primary's filter while parts of the peer's disk are dirty: new writes are forwarded from the beginning.

    to a clean or swept block     as it is
    to all of a dirty block       as it is, and when it has arrived the block is clean
    to a part of a dirty block    not at all: the resync reads the block, with this write in it

What a resync sends comes through here too (`resend`). It reads a block while no write to it is under way
(`Gate.claim`), and hands it on before it lets go of the claim; the node below keeps the order of writes that
overlap. So the peer never ends with older data, and nothing waits for the peer's answer.

A dirty part is not completed here with what the local disk has around it: another write may be on its way
to that disk, and the block would be sent without it, behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tcmu_replication.block.buffers import part, size
from tcmu_replication.block.dirty import Dirty, Sweep
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.pending import Pending, gather
from tcmu_replication.block.replication import Forward
from tcmu_replication.errors import Error

Part = tuple[int, int, memoryview | None]
"""Offset, length and bytes of what is sent again; zeroes without any."""

Watcher = Callable[[], Callable[[Pending], None]]
"""Called when a write begins; what it returns is called when that has ended."""


class Resyncing(Forward):
    """`Forward`, for a peer that lacks what is `dirty`.

    `missed` has to mark what it is told (`Dirty.mark`), before it returns. A gap that opens spoils every
    sweep: the peer may have lost what it took. It is closed again by whoever knows that the peer is
    still ours: `gap = None`, and all that is not dirty is forwarded from there on. Of a connection that was
    lost and made again without a gap nobody here knows: `dirty.spoil_all()` is for whoever cannot be sure
    that the peer's host has not lost power meanwhile.

    A `watcher` is told of each write that is forwarded.
    """

    def __init__(
        self,
        name: str,
        remote: Node,
        missed: Callable[[int, int, Error], bool],
        dirty: Dirty,
        gap: Error | None = None,
    ) -> None:
        self.dirty = dirty
        self.watcher: Watcher | None = None
        super().__init__(name, remote, missed, gap)

    @property
    def gap(self) -> Error | None:
        """Why nothing is forwarded; None if it is."""
        return self._gap

    @gap.setter
    def gap(self, error: Error | None) -> None:
        self._gap = error
        if error is not None:
            self.dirty.spoil_all()

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`."""
        ended = None if self.watcher is None else self.watcher()
        if self._gap is not None or not self.dirty.marks.count:
            pending = super().write(offset, buffers, fua)
        else:
            length = size(buffers)
            start, end = self.dirty.sent_part(offset, offset + length)
            if end - start != length:
                buffers = part(buffers, start - offset, end - start)
            pending = self._sweep(start, end, partial(super().write, start, buffers, fua))
        if ended is not None and pending is not None:
            pending.then(ended)
        return pending

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        if self._gap is not None or not self.dirty.marks.count:
            return super().zero(offset, length, fua, unmap)
        start, end = self.dirty.sent_part(offset, offset + length)
        return self._sweep(start, end, partial(super().zero, start, end - start, fua, unmap))

    # A discard makes nothing clean: it promises no content. (The mirror makes zeroes of discards.)

    def resend(self, parts: Iterable[Part]) -> Pending | None:
        """Send what the local disk has there. Whoever calls has begun the sweep; ends when all has. Raises `Error`."""
        if self._gap is not None:
            raise self._gap
        write = self.child.write
        sending: list[Pending | None] = []
        error = None
        try:
            for offset, length, data in parts:
                sending.append(self.child.zero(offset, length) if data is None else write(offset, (data,)))
        except Error as met:
            error = met
        return gather(sending, error)

    def flush_resent(self) -> Pending | None:
        """A flush whose failure is told, other than that of `flush`: a sweep has arrived when it is durable there."""
        if self._gap is not None:
            raise self._gap
        try:
            pending = self.child.flush()
        except Error as error:
            self._counts(0, 0, error)
            raise
        if pending is not None:
            pending.then(self._was_flushed)
        return pending

    def _was_flushed(self, flushing: Pending) -> None:
        if flushing.error is not None:
            self._counts(0, 0, flushing.error)

    def _sweep(self, start: int, end: int, call: Callable[[], Pending | None]) -> Pending | None:
        """Forward the bytes from `start` to `end`; dirty blocks that are covered are clean when they have arrived."""
        if start == end:
            return None
        sweep = self.dirty.sweep(start, end)
        if sweep is None:
            return call()
        try:
            pending = call()
        except Error:
            self.dirty.failed(sweep)
            raise
        if pending is None:
            self._swept(sweep, None)
        else:
            pending.then(lambda p: self._swept(sweep, p.error))
        return pending

    def _swept(self, sweep: Sweep, error: Error | None) -> None:
        """A forwarded write has ended. (One that the peer missed has spoiled its sweep.)"""
        if error is not None:
            self.dirty.failed(sweep)
            return
        try:
            self.dirty.arrived(sweep)
        except Error:
            return  # what could not be taken from the map is sent once more

    def _counts(self, offset: int, length: int, error: Error) -> bool:
        if length:
            self.dirty.spoil(offset, length)
        return super()._counts(offset, length, error)
