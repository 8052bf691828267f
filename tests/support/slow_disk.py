"""A disk whose calls wait for the test: to be done, to fail, to be lost with the link, in any order that is allowed.

What a node promises is kept: calls that overlap take effect in the order in which they were made. Others end
as the test likes. A call that fails, or is lost, may have changed a part of its range.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tcmu_replication.block.extents import merged
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers, Extent
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK


class Waiting:
    """A call that waits, and what it changes."""

    def __init__(self, name: str, offset: int, data: bytes | int, do: Callable[[], None]) -> None:
        self.name = name
        self.offset = offset
        self.data = data
        self.length = data if isinstance(data, int) else len(data)
        self.do = do
        self.pending = Pending()


class SlowDisk(Memory):
    """While `slow`, calls wait in `waiting`; `lost` is the error of each call while the link is down.

    `refuses` is raised by the next call that changes something. `stable` is what a loss of power would leave.
    `taken` counts bytes of data, `zeroed` those of zeroes. What is all zero is a hole.
    """

    def __init__(self, length: int, *, name: str) -> None:
        super().__init__(length, name=name)
        self.slow = False
        self.lost: Error | None = None
        self.refuses: Error | None = None
        self.waiting: list[Waiting] = []
        self.stable = bytes(length)
        self.taken = 0
        self.zeroed = 0

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        length = sum(map(len, buffers))
        return self._call("read", offset, length, lambda: super(SlowDisk, self).read(offset, buffers))

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        data = b"".join(buffers)
        return self._call("write", offset, data, partial(self._change, offset, data))

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        return self._call("zero", offset, length, partial(self._change, offset, length))

    def flush(self) -> Pending | None:
        stable = bytes(self.data)  # what had ended before the call

        def keep() -> None:
            self.stable = stable

        return self._call("flush", 0, 0, keep)

    def extents(self, offset: int, length: int) -> list[Extent]:
        found = []
        end = offset + length
        while offset < end:
            step = min(BLOCK - offset % BLOCK, end - offset)
            zero = not any(self.data[offset : offset + step])
            found.append(Extent(step, not zero, zero))
            offset += step
        return merged(found)

    def free(self) -> list[int]:
        """Which of those that wait may end next."""
        return [
            index
            for index, call in enumerate(self.waiting)
            if not any(_overlap(call, before) for before in self.waiting[:index])
        ]

    def end(self, index: int, error: Error | None = None, torn: int = 0) -> None:
        """End the call with that place in `waiting`: done, or failed with its first `torn` bytes done."""
        call = self.waiting.pop(index)
        if error is None:
            call.do()
        else:
            self._tear(call, torn)
        call.pending.complete(error)

    def cut(self, error: Error, torn: int) -> None:
        """The link is lost: every call fails, of each the first `torn` bytes are done, or those of none."""
        self.lost = error
        self.drop(torn)
        calls, self.waiting = self.waiting, []
        for call in calls:
            call.pending.complete(error)

    def drop(self, torn: int) -> None:
        """Do the first `torn` bytes of each call that may be done now."""
        for index in self.free():
            self._tear(self.waiting[index], torn)

    def lose_power(self) -> None:
        """What was not flushed is gone."""
        self.data[:] = self.stable

    def _call(self, name: str, offset: int, data: bytes | int, do: Callable[[], None]) -> Pending | None:
        if self.lost is not None:
            raise self.lost
        call = Waiting(name, offset, data, do)
        if self.refuses is not None and name in ("write", "zero"):
            error, self.refuses = self.refuses, None
            raise error
        if not self.slow and not any(_overlap(call, before) for before in self.waiting):
            do()
            return None
        self.waiting.append(call)
        return call.pending

    def _change(self, offset: int, data: bytes | int) -> None:
        if isinstance(data, int):
            self.zeroed += data
            data = bytes(data)
        else:
            self.taken += len(data)
        self.data[offset : offset + len(data)] = data

    def _tear(self, call: Waiting, torn: int) -> None:
        if call.name in ("write", "zero"):
            data = bytes(call.data) if isinstance(call.data, int) else call.data
            self.data[call.offset : call.offset + min(torn, len(data))] = data[:torn]


def _overlap(one: Waiting, other: Waiting) -> bool:
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


LINK_LOST = Error(Kind.PEER_LOST, "the link is lost")
