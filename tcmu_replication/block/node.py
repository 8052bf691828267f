"""The interface of every element of a chain.

A node reads into and writes from buffers that belong to the caller, and copies
nothing that it need not. Offsets and lengths are bytes, of any alignment; the
range has been checked by the `Gate` at the top of the chain, so a node trusts
it. `buffers` is a sequence of writable (read) or readable (write) memoryviews
of format "B"; together they are as long as the request. The caller leaves the
buffers alone until the request has ended.

Each call returns None (done), raises `Error` (failed), or returns a `Pending`.
A write that has ended is seen by every later read of the same chain; writes
take effect in the order in which they were made.

Batches: a frontend makes the calls of everything that it found in its ring or
socket and then calls `unplug()` once; a node that gathers (the NBD client, the
copy-before-write with durable pre-images) starts its gathered work then, at
the latest. Control code that makes single calls does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind

Buffers = Sequence[memoryview]


class Extent(NamedTuple):
    """A run of `length` bytes that is alike: `allocated` here or below, and known to read as `zero`."""

    length: int
    allocated: bool
    zero: bool


class Node:
    """An element of a chain. A filter gives its `child` and overrides what it changes."""

    child: Node
    """The node below; leaves have none. Not a property: every request passes here, at each node."""

    not_ready: Error | None = None
    """Why nothing is served now, where the disk is there but its data may be old; None if it is served."""

    on_lost: Callable[[Error], None] | None = None
    """Told, once, that a sync has failed: what was written since the one before may be on no medium."""

    def __init__(self, name: str, length: int, child: Node | None = None, *, read_only: bool = False) -> None:
        self.name = name
        self.length = length
        self.read_only = read_only
        if child is not None:
            self.child = child

    @property
    def children(self) -> tuple[Node, ...]:
        """The nodes directly below, the one that is read from first."""
        return (self.child,) if hasattr(self, "child") else ()

    @property
    def unmaps(self) -> bool:
        """Whether `zero` with `unmap` gives space back, as far as is known; if not it may have to write every byte."""
        return self.child.unmaps if hasattr(self, "child") else True

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """Fill `buffers` from `offset`."""
        return self.child.read(offset, buffers)

    def fetch(self, offset: int, length: int) -> memoryview:
        """Read at once, blocking: for merges, pre-images and jobs, which must not be overtaken.

        The view may be read-only. Raises `Error`. A node whose `read` may return a `Pending` overrides it.
        """
        view = memoryview(bytearray(length))
        pending = self.read(offset, [view])
        if pending is not None:  # the view is empty still, and whoever asks would take it for data
            raise Error(Kind.UNSUPPORTED, f"{self.name} cannot read at once", offset=offset, length=length)
        return view

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """Write `buffers` at `offset`; with `fua` it ends when the data is on stable storage."""
        return self.child.write(offset, buffers, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """Make the range read as zeroes; with `unmap` space may be given back."""
        return self.child.zero(offset, length, fua, unmap)

    def discard(self, offset: int, length: int) -> Pending | None:
        """The range is not needed any more. Afterwards it reads as zeroes or as before, block by block."""
        return self.child.discard(offset, length)

    def flush(self) -> Pending | None:
        """Ends when every write that had ended before the call is on stable storage."""
        return self.child.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """What the range is made of; the lengths add up to `length`. Alike neighbours are merged."""
        return self.child.extents(offset, length)

    def unplug(self) -> None:
        """Start what was gathered since the last call. Never blocks, never raises."""
        for child in self.children:
            child.unplug()

    def close(self) -> None:
        """Release what this node opened, then close the nodes below. Twice is fine."""
        for child in self.children:
            child.close()
