"""The requests of a remote disk, from the node's call to the server's last answer.

    add -> queued -> send -> in the session's calls -> ended
             ^                        |
             +------- take_back ------+   the connection was lost

The order is kept, across lost connections too. Writes that overlap are not
under way together: a server may answer them in any order, and of two of which
one is sent again the older would overwrite the newer.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from tcmu_replication.block.buffers import part
from tcmu_replication.block.node import Buffers, Extent
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error
from tcmu_replication.nbd.call import Call
from tcmu_replication.nbd.client import Session
from tcmu_replication.nbd.protocol import Command, ExtentState

_CHANGES = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})


class Request(Call):
    """A call with its `Pending`. With `flush_after` it ends when a flush behind it has ended."""

    __slots__ = ("flush_after", "pending", "queue")

    def __init__(
        self,
        queue: Queue,
        command: Command,
        offset: int,
        length: int,
        buffers: Buffers = (),
        flags: int = 0,
        flush_after: bool = False,
    ) -> None:
        super().__init__(command, offset, length, buffers, flags)
        self.queue = queue
        self.pending = Pending()
        self.flush_after = flush_after

    def place(self, start: int, length: int) -> list[memoryview]:
        """See `Call.place`."""
        if length == len(self.buffers[0]):
            return [self.buffers[0]]
        return part(self.buffers, start, length)

    def ended(self, error: Error | None) -> None:
        """See `Call.ended`."""
        self.queue.ended(self, error)


class Queue:
    """`in_flight` requests of `in_flight_bytes` have not ended; at most `limit` of them are with a session."""

    def __init__(self, limit: int) -> None:
        self.in_flight = 0
        self.in_flight_bytes = 0
        self._limit = limit
        self._waiting: deque[Request] = deque()
        self._changing = Ranges()

    def __len__(self) -> int:
        """Requests that are not sent."""
        return len(self._waiting)

    def add(self, request: Request) -> Pending:
        """Gather a request."""
        self._waiting.append(request)
        self.in_flight += 1
        self.in_flight_bytes += request.length
        return request.pending

    def send(self, session: Session) -> None:
        """Send what was gathered, as far as it may be under way now."""
        waiting = self._waiting
        batch: list[Request] = []
        free = self._limit - len(session.calls)
        while waiting and len(batch) < free:
            request = waiting[0]
            if request.command in _CHANGES and not self._changing.add(request.offset, request.length):
                break
            batch.append(waiting.popleft())
        if batch:
            session.send(batch)

    def take_back(self, session: Session) -> None:
        """What a closed session left unanswered will be sent again, before all else and in its order."""
        for request in reversed(session.calls.values()):
            assert isinstance(request, Request)
            request.reset()
            self._waiting.appendleft(request)
        self._changing = Ranges()

    def fail_all(self, error: Error) -> None:
        """End what is not sent with `error`."""
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            self._complete(request, error)

    def ended(self, request: Request, error: Error | None) -> None:
        """The server has answered."""
        if request.command in _CHANGES:
            self._changing.remove(request.offset)
        if error is None and request.flush_after:
            flush = self.add(Request(self, Command.FLUSH, 0, 0))
            flush.then(lambda flushed: self._complete(request, flushed.error))
        else:
            self._complete(request, error)

    def _complete(self, request: Request, error: Error | None) -> None:
        self.in_flight -= 1
        self.in_flight_bytes -= request.length
        value = None
        if request.command == Command.BLOCK_STATUS and error is None:
            value = extents_of(request.extents, request.length)
        request.pending.complete(error, value)


class Ranges:
    """Byte ranges, none empty, that do not overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: dict[int, int] = {}

    def add(self, offset: int, length: int) -> bool:
        """Add a range; False, and nothing done, if it overlaps one that is here."""
        end = offset + length
        # They do not overlap, so of those that begin before our end the last one ends last.
        index = bisect_left(self._starts, end)
        if index and self._ends[self._starts[index - 1]] > offset:
            return False
        insort(self._starts, offset)
        self._ends[offset] = end
        return True

    def remove(self, offset: int) -> None:
        """Remove the range that begins at `offset`."""
        del self._ends[offset]
        del self._starts[bisect_left(self._starts, offset)]


def extents_of(pairs: list[tuple[int, int]], length: int) -> list[Extent]:
    """base:allocation's (length, state) pairs as extents of at most `length` bytes, alike neighbours merged."""
    extents: list[Extent] = []
    for count, state in pairs:
        count = min(count, length)
        length -= count
        allocated, zero = not state & ExtentState.HOLE, bool(state & ExtentState.ZERO)
        if extents and extents[-1][1:] == (allocated, zero):
            count += extents.pop().length
        if count:
            extents.append(Extent(count, allocated, zero))
    return extents
