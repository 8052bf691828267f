"""The requests of a remote disk, from the node's call to the server's last answer.

    add -> queued -> send -> in the session's calls -> ended
             ^                        |
             +------- take_back ------+   the connection was lost

The order is kept, across lost connections too. Writes that overlap are not
under way together: a server may answer them in any order, and of two of which
one is sent again the older would overwrite the newer.

A request says what is wanted. What of it goes over the wire is decided when it
is sent, by what the server of that connection can do, for a request may be made
before there is one. What one call cannot carry is spread over several, each
made when it has its turn: a zero or discard of the whole disk is one object.
Nothing else changes its range until it has ended; requests for other ranges pass by.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from tcmu_replication.block.buffers import part, zeroes
from tcmu_replication.block.node import Buffers, Extent
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.call import Call
from tcmu_replication.nbd.client import Session
from tcmu_replication.nbd.handshake_client import Agreement
from tcmu_replication.nbd.protocol import Command, CommandFlag, ExtentState, TransmissionFlag
from tcmu_replication.units import MiB

SPAN = 16 * MiB
"""The most that zeroes and discards under way change together, and so each call of them: a few bytes ask for it, but
a secondary may have to save all of it first, which at 50 MB/s takes a third of a second."""

_CHANGES = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})
_LONG = frozenset({Command.WRITE_ZEROES, Command.TRIM})
_WRITE = Command.WRITE


class _Placed(Call):
    """A call whose `buffers` are all of its own data."""

    __slots__ = ()

    def place(self, start: int, length: int) -> list[memoryview]:
        """See `Call.place`."""
        if length == len(self.buffers[0]):
            return [self.buffers[0]]
        return part(self.buffers, start, length)


class Request(_Placed):
    """What is wanted, with its `Pending`; most are sent as they are.

    `flags` may be FUA and NO_HOLE. With `flush_after` it ends when a flush behind it has ended.
    """

    __slots__ = ("flush_after", "pending", "queue")

    def __init__(
        self,
        queue: Queue,
        command: Command,
        offset: int,
        length: int,
        buffers: Buffers = (),
        flags: int = 0,
    ) -> None:
        super().__init__(command, offset, length, buffers, flags)
        self.queue = queue
        self.pending = Pending()
        self.flush_after = False

    def ended(self, error: Error | None) -> None:
        """See `Call.ended`."""
        self.queue.ended(self, error)


class Part(_Placed):
    """A call that carries a part of a request."""

    __slots__ = ("spread",)

    def __init__(self, spread: Spread, offset: int, length: int, buffers: Buffers) -> None:
        super().__init__(spread.command, offset, length, buffers, spread.request.flags)
        self.spread = spread

    def ended(self, error: Error | None) -> None:
        """See `Call.ended`."""
        self.spread.request.queue.part_ended(self, error)


class Spread:
    """A request that goes as parts of at most `step` bytes, as `command`.

    `under_way` parts are with the session; those in `again` were, when it was
    lost. After an `error` no more are made.
    """

    __slots__ = ("_at", "_end", "again", "command", "error", "request", "step", "under_way")

    def __init__(self, request: Request, command: Command, step: int) -> None:
        self.request = request
        self.command = command
        self.step = step
        self.under_way = 0
        self.again: deque[Part] = deque()
        self.error: Error | None = None
        self._at = request.offset
        self._end = request.offset + request.length

    @property
    def next_length(self) -> int:
        """Bytes of the next part, 0 if there is none."""
        if self.error is not None:
            return 0
        return self.again[0].length if self.again else min(self.step, self._end - self._at)

    def take(self) -> Part:
        """The next part."""
        self.under_way += 1
        if self.again:
            return self.again.popleft()
        request, offset, length = self.request, self._at, self.next_length
        self._at += length
        if request.command in _LONG:
            buffers: Buffers = zeroes(length) if self.command == _WRITE else ()
        else:
            buffers = part(request.buffers, offset - request.offset, length)
        return Part(self, offset, length, buffers)


class Queue:
    """`in_flight` requests of `in_flight_bytes` have not ended; at most `limit` calls are with a session."""

    def __init__(self, limit: int) -> None:
        self.in_flight = 0
        self.in_flight_bytes = 0
        self._limit = limit
        self._waiting: deque[Request] = deque()
        self._spreads: dict[Spread, None] = {}
        self._unsent: deque[Spread] = deque()  # those that may have another part
        self._spanned = 0
        self._changing = Ranges()

    def __len__(self) -> int:
        """Requests that are not sent, or not all of."""
        return len(self._waiting) + len(self._unsent)

    def add(self, request: Request, *, first: bool = False) -> Pending:
        """Gather a request; with `first` it goes before all that wait."""
        if first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)
        self.in_flight += 1
        self.in_flight_bytes += request.length
        return request.pending

    def send(self, session: Session) -> None:
        """Send what was gathered, as far as it may be under way now."""
        over: list[tuple[Request, Error | None]] = []
        while True:
            batch: list[Call] = []
            self._take_parts(batch, session, over)
            self._take_requests(batch, session, over)
            if batch:
                session.send(batch)
            if not over:
                return
            for request, error in over:
                if session.closed:  # whoever heard of the last one has hung up
                    self._complete(request, error)
                else:
                    self.ended(request, error)
            if session.closed:
                return
            over.clear()

    def _take_parts(
        self, batch: list[Call], session: Session, over: list[tuple[Request, Error | None]]
    ) -> None:
        """The next parts of what was begun; `over` gets those that have ended meanwhile."""
        free = self._limit - len(session.calls)
        while self._unsent and len(batch) < free:
            spread = self._unsent[0]
            length = spread.next_length
            if length:
                if self._spanned and self._spanned + length > SPAN:
                    return
                self._spanned += length
                batch.append(spread.take())
            if not spread.next_length:
                self._unsent.popleft()
                if not spread.under_way and self._spreads.pop(spread, True) is None:
                    over.append((spread.request, spread.error))

    def _take_requests(
        self, batch: list[Call], session: Session, over: list[tuple[Request, Error | None]]
    ) -> None:
        """The next requests, up to one that overlaps what is under way."""
        waiting, agreement = self._waiting, session.agreement
        free = self._limit - len(session.calls)
        maximum = agreement.maximum
        while waiting and len(batch) < free:
            request = waiting[0]
            command = request.command
            if command in _CHANGES and not self._changing.add(request.offset, request.length):
                return
            waiting.popleft()
            if (
                command <= _WRITE
                and not request.flags
                and request.length <= maximum
                and agreement.minimum == 1
            ):
                batch.append(request)
            else:
                self._fit(request, agreement, batch, over)
                if self._unsent:
                    self._take_parts(batch, session, over)

    def _fit(
        self,
        request: Request,
        agreement: Agreement,
        batch: list[Call],
        over: list[tuple[Request, Error | None]],
    ) -> None:
        """Make of a request what this server can do."""
        can, command, length = agreement.flags, request.command, request.length
        if request.flags & CommandFlag.FUA and not can & TransmissionFlag.SEND_FUA:
            request.flags &= ~CommandFlag.FUA
            request.flush_after = bool(can & TransmissionFlag.SEND_FLUSH)
        refused = unaligned(agreement, request.offset, length)
        if refused is not None:
            over.append((request, refused))
        elif command in _LACKING and not can & _LACKING[command]:
            over.append((request, None))
        elif command == Command.BLOCK_STATUS and agreement.allocation_id is None:
            request.extents = [(length, 0)]
            over.append((request, None))
        elif command == Command.WRITE_ZEROES and not can & TransmissionFlag.SEND_WRITE_ZEROES:
            request.flags &= ~CommandFlag.NO_HOLE
            self._spread(request, _WRITE, min(SPAN, agreement.maximum))
        elif command in _LONG and self._spanned + length > SPAN:
            self._spread(request, command, SPAN)
        elif command <= _WRITE and length > agreement.maximum:
            self._spread(request, command, agreement.maximum)
        else:
            if command in _LONG:
                self._spanned += length
            batch.append(request)

    def _spread(self, request: Request, command: Command, step: int) -> None:
        spread = Spread(request, command, step)
        self._spreads[spread] = None
        self._unsent.append(spread)

    def take_back(self, session: Session) -> None:
        """What a closed session left unanswered will be sent again, before all else and in its order."""
        for call in reversed(session.calls.values()):
            call.reset()
            if isinstance(call, Part):
                call.spread.again.appendleft(call)
                call.spread.under_way -= 1
            else:
                assert isinstance(call, Request)
                self._waiting.appendleft(call)
        self._spanned = 0
        self._unsent = deque(self._spreads)
        self._changing = Ranges()
        for spread in self._spreads:
            if spread.request.command in _CHANGES:
                self._changing.add(spread.request.offset, spread.request.length)

    def fail_all(self, error: Error) -> None:
        """End what is not sent with `error`. No session may be there."""
        waiting, self._waiting = self._waiting, deque()
        spreads, self._spreads = self._spreads, {}
        self._unsent.clear()
        self._changing = Ranges()
        for request in [*(spread.request for spread in spreads), *waiting]:
            self._complete(request, error)

    def ended(self, request: Request, error: Error | None) -> None:
        """The server has answered, to all of it."""
        if request.command in _CHANGES:
            self._changing.remove(request.offset)
            if request.command in _LONG and request.batch is not None:  # it was sent, and not spread
                self._spanned -= request.length
        if error is None and request.flush_after:
            flush = self.add(Request(self, Command.FLUSH, 0, 0))
            flush.then(lambda flushed: self._complete(request, flushed.error))
        else:
            self._complete(request, error)

    def part_ended(self, ended: Part, error: Error | None) -> None:
        """The server has answered to a part of it."""
        spread = ended.spread
        spread.under_way -= 1
        self._spanned -= ended.length
        if spread.error is None:
            spread.error = error
        if not spread.next_length and not spread.under_way:
            del self._spreads[spread]
            self.ended(spread.request, spread.error)

    def _complete(self, request: Request, error: Error | None) -> None:
        self.in_flight -= 1
        self.in_flight_bytes -= request.length
        value = None
        if request.command == Command.BLOCK_STATUS and error is None:
            value = extents_of(request.extents, request.length)
        request.pending.complete(error, value)


_LACKING = {Command.FLUSH: TransmissionFlag.SEND_FLUSH, Command.TRIM: TransmissionFlag.SEND_TRIM}
"""What ends at once, without effect, on a server that has not said that it can do it."""


def unaligned(agreement: Agreement, offset: int, length: int) -> Error | None:
    """The error of a request that is not in the server's blocks."""
    if not offset % agreement.minimum and not length % agreement.minimum:
        return None
    return Error(
        Kind.UNALIGNED,
        f"the server takes blocks of {agreement.minimum} bytes only",
        offset=offset,
        length=length,
    )


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
