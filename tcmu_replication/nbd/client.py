"""One connection to an NBD server after the handshake: many calls in flight on one socket.

Calls are sent together, their data straight from the caller's memory, and
replies are taken together, read data straight to the caller's memory where it
is long. A `Session` ends once: because it was closed, lost, because the server
broke the protocol, or because it left a call unanswered for too long. It does
not reconnect; what was unanswered is then still in `calls`, in the order sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Sequence

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol, transmission
from tcmu_replication.nbd.call import Batch, Call
from tcmu_replication.nbd.handshake_client import Agreement
from tcmu_replication.nbd.outbox import MAX_BUFFERS, Queue, drop_first
from tcmu_replication.nbd.protocol import Chunk, Command
from tcmu_replication.nbd.stream import Stream
from tcmu_replication.nbd.tls_socket import Socket, events_of
from tcmu_replication.nbd.transmission import Reply

PATIENCE = 4
"""So many time-outs may pass before a call is answered, whatever else the server says meanwhile."""

_READ = int(Command.READ)
_WRITE = int(Command.WRITE)


class Session:
    """A connection in the transmission phase.

    `answered()` is called after each batch of replies, `lost(error)` once, from
    the loop and never from within `send`, unless `close` was called before.
    `timeout_s` is how long the server may be silent while it owes an answer to
    what it has been sent. Any byte from it counts: one that is busy with a long
    call answers others. But for each call it has PATIENCE times as long at most.
    """

    def __init__(
        self,
        sock: Socket,
        agreement: Agreement,
        received: bytes,
        *,
        timeout_s: float,
        answered: Callable[[], None],
        lost: Callable[[Error], None],
    ) -> None:
        self.agreement = agreement
        self.calls: dict[int, Call] = {}
        self.closed = False
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._events = events_of(sock)
        self._stream = Stream(received)
        self._need = 1
        self._fill: deque[memoryview] = deque()
        self._filled: Reply | None = None
        self._heard_at = 0.0
        self._out: Queue = deque()
        self._queued = self._sent = 0
        self._sent_at = 0.0
        self._batches: deque[Batch] = deque()
        self._cookies = itertools.count(1)
        self._timeout_s = timeout_s
        self._watch: asyncio.TimerHandle | None = None
        self._answered = answered
        self._lost = lost
        self._events.add_reader(sock, self._readable)

    def close(self) -> None:
        """Say goodbye if the socket takes it, and close. `calls` keeps what was unanswered. Twice is fine."""
        if self.closed:
            return
        self.closed = True
        self._events.remove_reader(self._sock)
        self._events.remove_writer(self._sock)
        if self._watch is not None:
            self._watch.cancel()
        if not self._out:
            # If the socket is gone or full, closing it says the same.
            with contextlib.suppress(OSError):
                self._sock.send(transmission.request(Command.DISC, 0))
        self._sock.close()

    def _lose(self, error: Error) -> None:
        if not self.closed:
            self._out.clear()
            self._out.append(b"")  # no goodbye to a server that we gave up
            self.close()
            self._lost(error)

    # Sending

    def send(self, calls: Sequence[Call]) -> None:
        """Send calls in this order, now as far as the socket takes them. Never raises."""
        out = self._out
        idle = not out
        queued = self._queued
        pack = protocol.REQUEST.pack
        batch = Batch(0)
        for call in calls:
            cookie = next(self._cookies)
            self.calls[cookie] = call
            call.batch = batch
            command = call.command
            out.append(pack(protocol.REQUEST_MAGIC, call.flags, command, cookie, call.offset, call.length))
            queued += transmission.REQUEST_SIZE
            if command == _WRITE:
                out.extend(call.buffers)
                queued += call.length
        self._queued = batch.end = queued
        self._batches.append(batch)
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._check)
        if idle:
            self._flush()

    def _flush(self) -> None:
        """Send what is queued, and wait for the socket if it does not take all."""
        out = self._out
        try:
            while out:
                sent = self._sock.sendmsg(
                    out if len(out) <= MAX_BUFFERS else itertools.islice(out, MAX_BUFFERS)
                )
                self._sent += sent
                if self._sent == self._queued:
                    out.clear()
                else:
                    drop_first(out, sent)
        except (BlockingIOError, InterruptedError):
            self._events.add_writer(self._sock, self._writable)
        except OSError as error:
            self._loop.call_soon(self._lose, Error(Kind.PEER_LOST, f"send: {error.strerror}"))
        self._sent_at = self._loop.time()
        batches = self._batches
        while batches and batches[0].end <= self._sent:
            batches.popleft().sent_at = self._sent_at

    def _writable(self) -> None:
        self._events.remove_writer(self._sock)
        self._flush()

    def _check(self) -> None:
        """Find a server that has fallen silent, or has the oldest call for far too long."""
        self._watch = None
        if not self.calls:
            return
        batch = next(iter(self.calls.values())).batch
        assert batch is not None
        since = self._sent_at if batch.sent_at is None else batch.sent_at
        silence = max(since, self._heard_at) + self._timeout_s
        end = since + PATIENCE * self._timeout_s
        left = min(silence, end) - self._loop.time()
        if left <= 0:
            limit = self._timeout_s if silence <= end else PATIENCE * self._timeout_s
            self._lose(Error(Kind.PEER_LOST, f"no answer for {limit:g} s"))
        else:
            self._watch = self._loop.call_later(left, self._check)

    # Receiving

    def _readable(self) -> None:
        stream = self._stream
        try:
            if self._fill:
                room = stream.room()
                targets = list(itertools.islice(self._fill, MAX_BUFFERS - 1))
                count = self._sock.recvmsg_into([*targets, room])[0]
                direct = min(count, sum(map(len, targets)))
                drop_first(self._fill, direct)
                stream.end += count - direct
            else:
                count = self._sock.recv_into(stream.room(self._need))
                stream.end += count
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(Error(Kind.PEER_LOST, f"receive: {error.strerror}"))
            return
        if not count:
            self._lose(Error(Kind.PEER_LOST, "the server closed the connection"))
            return
        self._heard_at = self._loop.time()
        try:
            self._take_replies()
        except Error as error:
            self._lose(error)
        else:
            if not self.closed:
                self._answered()

    def _take_replies(self) -> None:
        """Everything complete in the stream."""
        if self._fill:
            return
        if self._filled is not None:
            self._end_chunk(self._filled)
            self._filled = None
        stream = self._stream
        data = stream.memory.data
        parse = transmission.parse_reply
        self._need = 1
        while not self.closed:
            start = stream.start
            reply = parse(data, start, stream.end)
            if reply is None:
                return
            if reply.kind is None:
                stream.start = start + transmission.SIMPLE_SIZE
                self._simple(reply)
            elif not self._chunk(reply, start):
                return
            if self._fill:
                return

    def _simple(self, reply: Reply) -> None:
        call = self.calls.get(reply.cookie)
        if call is None:
            raise Error(Kind.PEER_LIED, f"a reply to a request that nobody made ({reply.cookie:#x})")
        if reply.error:
            call.failed(self._error(call, reply.error, ""))
        elif call.command == _READ:
            if self.agreement.structured:
                raise Error(Kind.PEER_LIED, "a simple reply to a read, though structured ones are agreed")
            self._receive(call.take(call.offset, call.length), call.length)
            if self._fill:
                self._filled = reply
                return
        self._finish(reply.cookie, call)

    def _chunk(self, reply: Reply, start: int) -> bool:
        """Take a chunk of a structured reply; False: more of it is needed."""
        call = self.calls.get(reply.cookie)
        if call is None or not self.agreement.structured:
            raise Error(Kind.PEER_LIED, f"a structured reply that nobody asked for ({reply.cookie:#x})")
        kind, length = reply.kind, reply.length
        assert kind is not None
        stream = self._stream
        body = start + transmission.STRUCTURED_SIZE
        whole = transmission.DATA_PREFIX if kind == Chunk.OFFSET_DATA else length
        if stream.end - body < whole:
            self._need = transmission.STRUCTURED_SIZE + whole
            return False
        stream.start = body + whole
        payload = stream.memory.view[body : body + whole]
        if kind == Chunk.OFFSET_DATA:
            (offset,) = protocol.CHUNK_OFFSET.unpack(payload)
            length -= transmission.DATA_PREFIX
            self._receive(call.take(offset, length), length)
            if self._fill:
                self._filled = reply
                return True
        elif kind == Chunk.OFFSET_HOLE:
            for view in call.take(*transmission.parse_hole_chunk(payload)):
                view[:] = bytes(len(view))
        elif kind == Chunk.BLOCK_STATUS and call.command == Command.BLOCK_STATUS:
            call.extents = transmission.parse_status_chunk(payload, self.agreement.allocation_id)
        elif kind & protocol.CHUNK_ERROR_BIT:
            call.failed(self._error(call, *transmission.parse_error_chunk(kind, payload)))
        elif kind != Chunk.NONE or length or not reply.done:
            raise Error(Kind.PEER_LIED, f"a chunk of type {kind}, {length} bytes, to {call.command.name}")
        self._end_chunk(reply)
        return True

    def _end_chunk(self, reply: Reply) -> None:
        if reply.done:
            self._finish(reply.cookie, self.calls[reply.cookie])

    def _finish(self, cookie: int, call: Call) -> None:
        call.check()
        del self.calls[cookie]
        call.ended(call.error)

    def _receive(self, targets: list[memoryview], length: int) -> None:
        """Move `length` payload bytes to `targets`: what is in by copy, what is to come without one."""
        stream = self._stream
        view = stream.memory.view
        for index, target in enumerate(targets):
            count = min(len(target), stream.end - stream.start)
            target[:count] = view[stream.start : stream.start + count]
            stream.start += count
            if count < len(target):
                self._fill.append(target[count:])
                self._fill.extend(targets[index + 1 :])
                return

    def _error(self, call: Call, error: int, text: str) -> Error:
        kind = protocol.kind_of_error(error)
        name = protocol.error_name(error)
        said = f"the NBD server answered {call.command.name} with {name}{': ' + text if text else ''}"
        return Error(kind, said, offset=call.offset, length=call.length)
