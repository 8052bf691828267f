"""A disk in memory: the leaf for tests and trials. Everything ends at once; nothing survives `close`."""

from __future__ import annotations

from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending


class Memory(Node):
    """`length` bytes of memory, all zero at first. `data` is open to tests."""

    def __init__(self, length: int, *, name: str = "memory", read_only: bool = False) -> None:
        super().__init__(name, length, read_only=read_only)
        self.data = bytearray(length)

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`."""
        with memoryview(self.data) as data:
            for view in buffers:
                view[:] = data[offset : offset + len(view)]
                offset += len(view)
        return None

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`."""
        with memoryview(self.data) as data:
            for view in buffers:
                data[offset : offset + len(view)] = view
                offset += len(view)
        return None

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        self.data[offset : offset + length] = bytes(length)
        return None

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`: zeroes."""
        return self.zero(offset, length)

    def flush(self) -> Pending | None:
        """Nothing to do: this memory is as stable as it gets."""
        return None

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`: all data."""
        return [Extent(length, allocated=True, zero=False)]
