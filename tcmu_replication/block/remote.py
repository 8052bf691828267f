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
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable

from tcmu_replication.block.buffers import part, size, zeroes
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending, gather
from tcmu_replication.block.remote_queue import Queue, Request
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.client import Session
from tcmu_replication.nbd.connect import connect
from tcmu_replication.nbd.handshake_client import Agreement
from tcmu_replication.nbd.protocol import Command, CommandFlag, TransmissionFlag
from tcmu_replication.nbd.uri import Address
from tcmu_replication.tls import Context
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


class State(enum.Enum):
    """How the connection is."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"
    LOST = "lost"
    CLOSED = "closed"


class Remote(Node):
    """Export `export` of the NBD server at `address`; `await open()` before the first request.

    `length` is what the export must have (None: whatever it has). `read_only`
    says that nothing will be written, so that a read-only export will do.
    `reconnect_delay` and `open_timeout` (seconds, as all times here) are QEMU's
    options, 0 by default: no waiting, one attempt. `timeout` bounds an attempt to
    connect and how long the server may leave a request unanswered. `verify` is
    awaited, within `timeout`, before each connection counts; it raises Error to refuse it,
    and with CONFLICT to refuse it for good: then requests do not wait any longer.
    `on_state(state, reason)` hears of every change. With `tls` every connection is inside of it.

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
        tls: Context | None = None,
        verify: Callable[[], Awaitable[None]] | None = None,
        on_state: Callable[[State, str], None] | None = None,
    ) -> None:
        super().__init__(name, length or 0, read_only=read_only)
        self.address = address
        self.export = export
        self.state = State.CONNECTING
        self.reason = ""
        self._expected = length
        self._reconnect_delay_s = reconnect_delay
        self._open_timeout_s = open_timeout
        self._timeout_s = timeout
        self._tls = tls
        self._verify = verify
        self._on_state = on_state
        self._agreement: Agreement | None = None
        self._flags = TransmissionFlag(0)
        self._session: Session | None = None
        self._queue = Queue(max_in_flight)
        self._patience: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._pause_s = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """Requests that have not ended, sent or not."""
        return self._queue.in_flight

    @property
    def in_flight_bytes(self) -> int:
        """The length of those, together."""
        return self._queue.in_flight_bytes

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
        self._queue.fail_all(Error(Kind.CANCELLED, f"{self._who()} was closed"))

    async def wait_closed(self) -> None:
        """Wait for the end of what `close` has stopped."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _connect(self) -> None:
        """Make a connection, check it, and go on with it."""
        sock, agreement, received = await connect(
            self.address, self.export, timeout_s=self._timeout_s, tls=self._tls
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
        self._session = Session(
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
        if old is None:
            return
        missing = old.flags & ~new.flags & ~TransmissionFlag.READ_ONLY
        if missing:
            raise Error(Kind.UNSUPPORTED, f"{self._who()} lacks {missing.name}, which requests rely on")
        if new.minimum > old.minimum or new.maximum < old.maximum:
            raise Error(
                Kind.UNSUPPORTED,
                f"{self._who()} takes blocks of {new.minimum} to {new.maximum} bytes; "
                f"requests rely on {old.minimum} to {old.maximum}",
            )

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
            self._queue.fail_all(Error(error.kind, reason))
        if self.state is not State.CLOSED:
            self._task = loop.create_task(self._reconnect())

    def _give_up(self) -> None:
        self._patience = None
        self._set_state(State.LOST, self.reason)
        self._queue.fail_all(Error(Kind.PEER_LOST, self.reason))

    async def _reconnect(self) -> None:
        """Try until there is a connection: at once if the last one was good, else after a pause."""
        while True:
            longest = WAITING_PAUSE_S if self.state is State.WAITING else LOST_PAUSE_S
            await asyncio.sleep(min(self._pause_s, longest))
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), longest)
            try:
                await self._connect()
                return
            except Error as error:
                self._set_state(self.state, str(error))
                if error.kind is Kind.CONFLICT and self._patience is not None:
                    # `verify` has found another peer than ours: no patience brings that one back.
                    self._patience.cancel()
                    self._give_up()

    def _set_state(self, state: State, reason: str) -> None:
        changed = (state, reason) != (self.state, self.reason)
        self.state, self.reason = state, reason
        if changed and self._on_state is not None:
            self._on_state(state, reason)

    def _take_back(self) -> None:
        """Close the session; what it has not answered is queued again."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
            self._queue.take_back(session)

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
        return self._queue.add(Request(self._queue, Command.FLUSH, 0, 0))

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
        return self._queue.add(Request(self._queue, Command.BLOCK_STATUS, offset, min(length, _SPAN)))

    def unplug(self) -> None:
        """Send what was gathered, as far as it may be in flight now."""
        if self._session is not None and self._queue:
            self._queue.send(self._session)

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
            return self._queue.add(Request(self._queue, command, offset, length, buffers, flags, flush))
        requests = []
        for start in range(0, length, step):
            count = min(step, length - start)
            views = part(buffers, start, count)
            requests.append(Request(self._queue, command, offset + start, count, views, flags, flush))
        return gather([self._queue.add(request) for request in requests])

    def _spans(self, command: Command, offset: int, length: int, flags: int, flush: bool) -> Pending | None:
        self._admit(offset, length)
        parts = [(start, min(_SPAN, length - start)) for start in range(0, length, _SPAN)]
        return gather(
            [
                self._queue.add(Request(self._queue, command, offset + start, count, (), flags, flush))
                for start, count in parts
            ]
        )

    def _answered(self) -> None:
        """A batch of replies is in: the connection is good, and there is room for more."""
        self._deadline = None
        self._pause_s = 0.0
        self.unplug()
