"""The leaf that is another host's disk: an export of an NBD server.

Requests are gathered and sent at `unplug`; the caller's memory is sent as it
is and kept until the answer, for it may have to be sent again.

    connecting -> connected <-> waiting -> lost -> connected ...      closed
                              (requests   (requests
                               wait)       fail)

A lost connection is made anew with growing pauses for as long as the node is
open, as QEMU's client does. For `reconnect_delay` after the loss requests
wait, and are sent again in their order; then they fail with PEER_LOST, and new
ones fail at once until the connection is back. A server that comes back only to
fall silent again, without having answered anything, gains no new delay.

Writes that overlap are not in flight together: a server may answer them in any
order, and one of two that is sent again would overwrite the other.
"""

from __future__ import annotations

import asyncio
import enum
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Awaitable, Callable

from tcmu_replication.block.buffers import part, size, zeroes
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending, gather
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import client
from tcmu_replication.nbd.handshake_client import Agreement
from tcmu_replication.nbd.protocol import Command, CommandFlag, ExtentState, TransmissionFlag
from tcmu_replication.nbd.uri import Address
from tcmu_replication.units import GiB

FIRST_PAUSE_S = 0.1
WAITING_PAUSE_S = 0.5
LOST_PAUSE_S = 5.0
"""Pauses between attempts to connect double from the first to the second of these while requests wait,
and on to the third when they do not."""

_SPAN = 1 * GiB
"""The longest zero, discard or block status of one request: they carry no data, but 32 bits of length."""

_LEAST = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH
"""What a server must be able to do that is not asked before requests are made."""

_CHANGES = frozenset({Command.WRITE, Command.WRITE_ZEROES, Command.TRIM})


class State(enum.Enum):
    """How the connection is."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    LOST = "lost"
    CLOSED = "closed"


class _Request(client.Call):
    """A call with its `Pending`."""

    __slots__ = ("flush_after", "owner", "pending")

    def __init__(
        self,
        owner: Remote,
        command: Command,
        offset: int,
        length: int,
        buffers: Buffers = (),
        flags: int = 0,
        flush_after: bool = False,
    ) -> None:
        super().__init__(command, offset, length, buffers, flags)
        self.owner = owner
        self.pending = Pending()
        self.flush_after = flush_after

    def place(self, start: int, length: int) -> list[memoryview]:
        if length == len(self.buffers[0]):
            return [self.buffers[0]]
        return part(self.buffers, start, length)

    def ended(self, error: Error | None) -> None:
        self.owner._ended(self, error)


class Remote(Node):
    """Export `export` of the NBD server at `address`; `await open()` before the first request.

    `length` is what the export must have (None: whatever it has). `read_only`
    says that nothing will be written, so that a read-only export will do.
    `reconnect_delay` and `open_timeout` (seconds, as all times here) are QEMU's
    options, 0 by default: no waiting, one attempt. `timeout` bounds an attempt to
    connect and how long the server may leave a request unanswered. `verify` is
    awaited, within `timeout`, before each connection counts; it raises Error to refuse it.
    `on_state(state, reason)` hears of every change.

    A server without FUA gets a flush behind the write; without write-zeroes,
    zeroes; without trim, discards end at once without effect; without flush,
    so do flushes. A request that is not a multiple of the server's minimum
    block size is refused as UNALIGNED.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        export: str,
        *,
        length: int | None = None,
        read_only: bool = False,
        reconnect_delay: float = 0.0,
        open_timeout: float = 0.0,
        timeout: float = 10.0,
        max_in_flight: int = 256,
        verify: Callable[[], Awaitable[None]] | None = None,
        on_state: Callable[[State, str], None] | None = None,
    ) -> None:
        super().__init__(name, length or 0, read_only=read_only)
        self.address = address
        self.export = export
        self.state = State.CONNECTING
        self.reason = ""
        self.in_flight = 0
        self.in_flight_bytes = 0
        self._expected = length
        self._reconnect_delay_s = reconnect_delay
        self._open_timeout_s = open_timeout
        self._timeout_s = timeout
        self._max_in_flight = max_in_flight
        self._verify = verify
        self._on_state = on_state
        self._agreement: Agreement | None = None
        self._flags = TransmissionFlag(0)
        self._session: client.Session | None = None
        self._queue: deque[_Request] = deque()
        self._changing = _Ranges()
        self._patience: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._task: asyncio.Task[None] | None = None

    # The life of the connection

    async def open(self) -> None:
        """Connect, within `open_timeout` if the server cannot be reached at first.

        Raises Error: PEER_LOST, PEER_LIED (no NBD server), NOT_FOUND (no such export),
        BAD_CONFIG (another length), READ_ONLY, PERMISSION, UNSUPPORTED, or what `verify` raises.
        May be called again after a failure.
        """
        assert self._agreement is None, "open once"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._open_timeout_s
        pause = FIRST_PAUSE_S
        self._set_state(State.CONNECTING, "")
        while True:
            try:
                await self._connect()
                return
            except Error as error:
                self.reason = str(error)
                if error.kind is not Kind.PEER_LOST or loop.time() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, WAITING_PAUSE_S)

    def open_later(self) -> None:
        """Instead of `open`: connect in the background, as after a loss just now. Requests wait for it.

        `length` must have been given.
        """
        assert self._agreement is None, "open once"
        assert self._expected is not None, "the length is not known before the connection"
        # What every server has; one that has less is refused by `_check`.
        self._agreement = Agreement(self._expected, _LEAST, False, None)
        self._flags = _LEAST
        self._lost(Error(Kind.PEER_LOST, "not connected yet"))

    def close(self) -> None:
        """Hang up, never to connect again; unanswered requests fail with CANCELLED. Twice is fine."""
        if self.state is State.CLOSED:
            return
        self._set_state(State.CLOSED, "closed")
        if self._task is not None:
            self._task.cancel()
        if self._patience is not None:
            self._patience.cancel()
        self._take_back()
        self._fail_all(Error(Kind.CANCELLED, f"{self._who()} was closed"))

    async def wait_closed(self) -> None:
        """Wait for the end of what `close` has stopped."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _connect(self) -> None:
        """Make a connection, check it, and go on with it."""
        sock, agreement, received = await client.connect(
            self.address, self.export, timeout_s=self._timeout_s
        )
        try:
            self._check(agreement)
            if self._verify is not None:
                async with asyncio.timeout(self._timeout_s):
                    await self._verify()
            if self.state is State.CLOSED:
                raise Error(Kind.CANCELLED, f"{self._who()} was closed")
        except (Error, asyncio.CancelledError):
            sock.close()
            raise
        except Exception as error:  # whatever `verify` met, it refuses the connection
            sock.close()
            raise Error(Kind.PEER_LOST, f"{self._who()} could not be verified: {error!r}") from error
        self._agreement = agreement
        self._flags = agreement.flags
        self.length = agreement.length
        self._session = client.Session(
            sock,
            agreement,
            received,
            timeout_s=self._timeout_s,
            answered=self._answered,
            lost=self._lost,
        )
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
        if not self._queue:
            self._deadline = None
        self._set_state(State.CONNECTED, "")
        self.unplug()

    def _check(self, new: Agreement) -> None:
        """Raise unless the export is what was asked for and no less than it was before."""
        old = self._agreement
        expected = self._expected if old is None else old.length
        if expected is not None and new.length != expected:
            raise Error(
                Kind.BAD_CONFIG, f"{self._who()} has {new.length} bytes; it must have {expected}, as here"
            )
        if new.flags & TransmissionFlag.READ_ONLY and not self.read_only:
            raise Error(Kind.READ_ONLY, f"{self._who()} is read-only; export it writable")
        if old is not None and (
            old.flags & ~new.flags & ~TransmissionFlag.READ_ONLY
            or new.minimum > old.minimum
            or new.maximum < old.maximum
        ):
            raise Error(Kind.UNSUPPORTED, f"{self._who()} came back with fewer abilities than it had")

    def _lost(self, error: Error) -> None:
        """The session has ended by itself."""
        loop = asyncio.get_running_loop()
        self._take_back()
        reason = f"{self._who()}: {error.detail}"
        if self._deadline is None:
            self._deadline = loop.time() + self._reconnect_delay_s
        left = self._deadline - loop.time()
        if left > 0:
            self._set_state(State.WAITING, reason)
            self._patience = loop.call_later(left, self._give_up)
        else:
            self._set_state(State.LOST, reason)
            self._fail_all(Error(error.kind, reason))
        if self.state is not State.CLOSED:
            self._task = loop.create_task(self._reconnect())

    def _give_up(self) -> None:
        self._patience = None
        self._set_state(State.LOST, self.reason)
        self._fail_all(Error(Kind.PEER_LOST, self.reason))

    async def _reconnect(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                await self._connect()
                return
            except Error as error:
                self._set_state(self.state, str(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, WAITING_PAUSE_S if self.state is State.WAITING else LOST_PAUSE_S)

    def _set_state(self, state: State, reason: str) -> None:
        changed = (state, reason) != (self.state, self.reason)
        self.state, self.reason = state, reason
        if changed and self._on_state is not None:
            self._on_state(state, reason)

    def _take_back(self) -> None:
        """Close the session; what it has not answered goes to the head of the queue, in its order."""
        session, self._session = self._session, None
        if session is None:
            return
        session.close()
        unanswered = list(session.calls.values())
        for request in reversed(unanswered):
            assert isinstance(request, _Request)
            request.reset()
            self._queue.appendleft(request)
        self._changing = _Ranges()

    def _fail_all(self, error: Error) -> None:
        queue, self._queue = self._queue, deque()
        for request in queue:
            self._complete(request, error)

    def _who(self) -> str:
        return f"export {self.export!r} of NBD server {self.address}"

    # Requests

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`."""
        return self._data(Command.READ, offset, buffers, 0)

    def fetch(self, offset: int, length: int) -> memoryview:
        """A remote disk cannot be read at once: raises Error UNSUPPORTED."""
        raise Error(Kind.UNSUPPORTED, f"{self._who()} cannot be read without waiting")

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`."""
        flags, flush = self._fua(fua)
        return self._data(Command.WRITE, offset, buffers, flags, flush)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        if not self._flags & TransmissionFlag.SEND_WRITE_ZEROES:
            return self.write(offset, zeroes(length), fua)
        flags, flush = self._fua(fua)
        if not unmap:
            flags |= CommandFlag.NO_HOLE
        return self._spans(Command.WRITE_ZEROES, offset, length, flags, flush)

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`."""
        if not self._flags & TransmissionFlag.SEND_TRIM:
            return None
        return self._spans(Command.TRIM, offset, length, 0, False)

    def flush(self) -> Pending | None:
        """See `Node.flush`."""
        if not self._flags & TransmissionFlag.SEND_FLUSH:
            return None
        self._admit(0, 0)
        return self._add(_Request(self, Command.FLUSH, 0, 0))

    def extents(self, offset: int, length: int) -> list[Extent]:
        """All data: the server cannot be asked without waiting; `block_status` asks it."""
        return [Extent(length, True, False)]

    def block_status(self, offset: int, length: int) -> Pending:
        """Ask the server what the range is made of; the Pending's value is a list of `Extent`.

        They begin at `offset` and may end earlier than asked. A server without block status
        has only data.
        """
        self._admit(offset, length)
        if self._agreement is None or self._agreement.allocation_id is None:
            known = Pending()
            known.complete(value=self.extents(offset, length))
            return known
        return self._add(_Request(self, Command.BLOCK_STATUS, offset, min(length, _SPAN)))

    def unplug(self) -> None:
        """Send what was gathered, as far as it may be in flight now."""
        session = self._session
        if session is None or not self._queue:
            return
        queue = self._queue
        batch: list[_Request] = []
        free = self._max_in_flight - len(session.calls)
        while queue and len(batch) < free:
            request = queue[0]
            if request.command in _CHANGES and not self._changing.add(request.offset, request.length):
                break
            batch.append(queue.popleft())
        if batch:
            session.send(batch)

    def _fua(self, wanted: bool) -> tuple[int, bool]:
        """The command flag, and whether a flush must follow instead."""
        if not wanted:
            return 0, False
        if self._flags & TransmissionFlag.SEND_FUA:
            return CommandFlag.FUA, False
        return 0, bool(self._flags & TransmissionFlag.SEND_FLUSH)

    def _admit(self, offset: int, length: int) -> None:
        """Raise unless a request may be made now."""
        if self.state is State.LOST:
            raise Error(Kind.PEER_LOST, self.reason)
        agreement = self._agreement
        if self.state is State.CLOSED or agreement is None:
            raise Error(Kind.INVALID_STATE, f"{self._who()} is {self.state.value}")
        if agreement.minimum > 1 and (offset % agreement.minimum or length % agreement.minimum):
            raise Error(
                Kind.UNALIGNED,
                f"{self._who()} takes blocks of {agreement.minimum} bytes only",
                offset=offset,
                length=length,
            )

    def _data(
        self, command: Command, offset: int, buffers: Buffers, flags: int, flush: bool = False
    ) -> Pending | None:
        length = size(buffers)
        self._admit(offset, length)
        if not length:
            return None
        assert self._agreement is not None
        step = self._agreement.maximum
        if length <= step:
            return self._add(_Request(self, command, offset, length, buffers, flags, flush))
        requests = []
        for start in range(0, length, step):
            count = min(step, length - start)
            views = part(buffers, start, count)
            requests.append(_Request(self, command, offset + start, count, views, flags, flush))
        return gather([self._add(request) for request in requests])

    def _spans(self, command: Command, offset: int, length: int, flags: int, flush: bool) -> Pending | None:
        self._admit(offset, length)
        parts = [(start, min(_SPAN, length - start)) for start in range(0, length, _SPAN)]
        return gather(
            [
                self._add(_Request(self, command, offset + start, count, (), flags, flush))
                for start, count in parts
            ]
        )

    def _add(self, request: _Request) -> Pending:
        self._queue.append(request)
        self.in_flight += 1
        self.in_flight_bytes += request.length
        return request.pending

    def _ended(self, request: _Request, error: Error | None) -> None:
        """The server has answered."""
        if request.command in _CHANGES:
            self._changing.remove(request.offset)
        if error is None and request.flush_after:
            flush = _Request(self, Command.FLUSH, 0, 0)
            flush.pending.then(lambda flushed: self._complete(request, flushed.error))
            self._add(flush)
            return
        self._complete(request, error)

    def _complete(self, request: _Request, error: Error | None) -> None:
        self.in_flight -= 1
        self.in_flight_bytes -= request.length
        value = None
        if request.command == Command.BLOCK_STATUS and error is None:
            value = extents_of(request.extents, request.length)
        request.pending.complete(error, value)

    def _answered(self) -> None:
        """A batch of replies is in: the connection is good, and there is room for more."""
        self._deadline = None
        self.unplug()


class _Ranges:
    """Byte ranges that do not overlap."""

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
