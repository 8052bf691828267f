"""A disk in memory that fails whoever leaves it, and that answers late where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers, Extent
from tcmu_replication.block.pending import Pending


class Disk(Memory):
    """Each call takes a bit of `late`, again from the first after the last: set, it ends at `release`."""

    def __init__(self, length: int, late: int = 0) -> None:
        super().__init__(length)
        self._late = late
        self._calls = 0
        self._held: list[Pending] = []

    def release(self) -> bool:
        """End the late calls, the last one first; whether there were any."""
        held, self._held = self._held, []
        for pending in reversed(held):
            pending.complete()
        return bool(held)

    def _inside(self, offset: int, length: int) -> None:
        assert offset >= 0
        assert length > 0
        assert offset + length <= self.length, f"{length} bytes at {offset} of a disk of {self.length}"

    def _do(self, call: Callable[..., Pending | None], *args: Any) -> Pending | None:
        call(*args)
        self._calls += 1
        if not self._late >> self._calls % 8 & 1:
            return None
        self._held.append(Pending())
        return self._held[-1]

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`."""
        self._inside(offset, sum(map(len, buffers)))
        return self._do(super().read, offset, buffers)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`."""
        self._inside(offset, sum(map(len, buffers)))
        return self._do(super().write, offset, buffers)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        self._inside(offset, length)
        return self._do(super().zero, offset, length)

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`."""
        return self.zero(offset, length)

    def flush(self) -> Pending | None:
        """See `Node.flush`."""
        return self._do(super().flush)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`."""
        self._inside(offset, length)
        return super().extents(offset, length)
