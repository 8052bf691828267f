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

from tcmu_replication.background import background
from tcmu_replication.block.buffers import size
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending
from tcmu_replication.block.remote_queue import Queue, Request, unaligned
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.client import Session
from tcmu_replication.nbd.connect import connect
from tcmu_replication.nbd.handshake_client import Agreement
from tcmu_replication.nbd.protocol import Command, CommandFlag, TransmissionFlag
from tcmu_replication.nbd.uri import Address
from tcmu_replication.secret import Secret
from tcmu_replication.tls import Context
from tcmu_replication.units import GiB

FIRST_PAUSE_S = 0.1
WAITING_PAUSE_S = 0.5
LOST_PAUSE_S = 5.0
"""Pauses between attempts to connect double from the first to the second of these while requests wait,
and on to the third when they do not."""

_STATUS = 1 * GiB
"""The longest block status of one request: it has 32 bits for the length."""


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
    connect and how long the server may be silent while it owes an answer. `verify` is
    awaited, within `timeout`, before each connection counts; it raises Error to refuse it,
    and with CONFLICT to refuse it for good: then requests do not wait any longer.
    `on_state(state, reason)` hears of every change. With `tls` every connection is inside of it, with
    `secret` both ends prove that they know it.

    A server without FUA gets a flush behind the write; without write-zeroes,
    zeroes; without trim, discards end at once without effect; without flush,
    so do flushes. That is decided when a request is sent, which may be long after
    it was made. A request that is not a multiple of the server's minimum block
    size is refused as UNALIGNED.
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
        secret: Secret | None = None,
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
        self._secret = secret
        self._verify = verify
        self._on_state = on_state
        self._agreement: Agreement | None = None
        self._session: Session | None = None
        self._queue = Queue(max_in_flight)
        self._patience: asyncio.TimerHandle | None = None
        self._deadline: float | None = None
        self._flush_owed = False
        self._flushing: Pending | None = None
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

    @property
    def flush_owed(self) -> bool:
        """Whether writes that the server has taken wait there for a flush, which failed here for want of a connection.

        It is the first request of the next connection, and one that it fails on does not last.
        """
        return self._flush_owed

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
        self._flush_owed = True  # whoever was connected before us may have left that
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

    def renew(self, reason: str) -> None:
        """Hang up and connect anew: what is not answered is sent again when `verify` has agreed."""
        if self._session is not None:
            # It was there a moment ago, so it is waited for even where a lost one is not.
            patience = max(self._reconnect_delay_s, self._timeout_s)
            self._deadline = asyncio.get_running_loop().time() + patience
            self._lost(Error(Kind.PEER_LOST, reason))

    async def wait_closed(self) -> None:
        """Wait for the end of what `close` has stopped."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _connect(self) -> None:
        """Make a connection, check it, and go on with it."""
        sock, agreement, received = await connect(
            self.address, self.export, timeout_s=self._timeout_s, tls=self._tls, secret=self._secret
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
        self._pay_flush()
        self._set_state(State.CONNECTED, "")
        self.unplug()

    def _pay_flush(self) -> None:
        """Send the flush that is owed before all else. What comes behind need not wait for its end."""
        if self._flush_owed and self._flushing is None:
            self._flushing = self._queue.add(Request(self._queue, Command.FLUSH, 0, 0), first=True)
            self._flushing.then(self._flush_paid)

    def _flush_paid(self, flushed: Pending) -> None:
        self._flushing = None
        self._flush_owed = flushed.error is not None
        if flushed.error is not None and self.state is State.CONNECTED:
            # A server that cannot keep what it has taken is as good as none.
            self._lost(Error(Kind.PEER_LOST, f"the flush that it was owed: {flushed.error.detail}"))

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
            self._flush_owed = True
            self._set_state(State.LOST, reason)
            self._queue.fail_all(Error(error.kind, reason))
        if self.state is not State.CLOSED:
            self._task = background(self._reconnect())

    def _give_up(self) -> None:
        self._patience = None
        self._flush_owed = True
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
        return self._add(Command.READ, offset, size(buffers), buffers)

    def fetch(self, offset: int, length: int) -> memoryview:
        """A remote disk cannot be read at once: raises Error UNSUPPORTED."""
        raise Error(Kind.UNSUPPORTED, f"{self._who()} cannot be read without waiting")

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`."""
        return self._add(Command.WRITE, offset, size(buffers), buffers, CommandFlag.FUA if fua else 0)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        flags = (CommandFlag.FUA if fua else 0) | (0 if unmap else CommandFlag.NO_HOLE)
        return self._add(Command.WRITE_ZEROES, offset, length, (), flags)

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`."""
        return self._add(Command.TRIM, offset, length)

    def flush(self) -> Pending | None:
        """See `Node.flush`."""
        return self._add(Command.FLUSH, 0, 0)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """All data: the server cannot be asked without waiting; `block_status` asks it."""
        return [Extent(length, True, False)]

    def block_status(self, offset: int, length: int) -> Pending:
        """Ask the server what the range is made of; the Pending's value is a list of `Extent`.

        They begin at `offset` and may end earlier than asked. A server without block status
        has only data.
        """
        pending = self._add(Command.BLOCK_STATUS, offset, min(length, _STATUS))
        assert pending is not None
        return pending

    def unplug(self) -> None:
        """Send what was gathered, as far as it may be in flight now."""
        if self._session is not None and self._queue:
            self._queue.send(self._session)

    def _add(
        self, command: Command, offset: int, length: int, buffers: Buffers = (), flags: int = 0
    ) -> Pending | None:
        """Gather a request, if it may be made now: raises if not."""
        if self.state is State.LOST:
            raise Error(Kind.PEER_LOST, self.reason)
        if self.state in (State.CLOSED, State.CONNECTING):
            raise Error(Kind.INVALID_STATE, f"{self._who()} is {self.state.value}")
        agreement = self._agreement
        if agreement is not None and agreement.minimum > 1:
            refused = unaligned(agreement, offset, length)
            if refused is not None:
                raise refused
        if not length and command != Command.FLUSH:
            return None
        return self._queue.add(Request(self._queue, command, offset, length, buffers, flags))

    def _answered(self) -> None:
        """A batch of replies is in: the connection is good, and there is room for more."""
        self._deadline = None
        self._pause_s = 0.0
        self.unplug()
