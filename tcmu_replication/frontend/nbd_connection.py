"""The transmission phase of one NBD client: a socket on one side, a node on the other.

Everything complete in the receive buffer is run against the node in plain
calls, then the node is unplugged once. Replies leave together, those of a large
batch in a few parts, so that the client works on the first while we do the rest.
Write data is used where it was received, read data is sent from where the node
put it.

A client that does not read its replies, or asks for more than the node can do,
is not read from until it has less than MAX_OWED bytes and MAX_IN_FLIGHT
requests with us. A client that breaks the protocol is hung up on, with one
line in the log. What the node was asked before a connection ended, goes on.

An exception that is no `Error` is a defect, and goes to the loop's exception
handler, which should end the process: to hang up and live on would leave the
nodes below half done, with requests that wait for ever.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
from collections.abc import Callable

from tcmu_replication.block.node import Extent, Node
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol, transmission
from tcmu_replication.nbd.handshake import CONTEXT_ID
from tcmu_replication.nbd.outbox import Outbox
from tcmu_replication.nbd.protocol import Chunk, Command, CommandFlag, ExtentState
from tcmu_replication.nbd.stream import Memory, Stream
from tcmu_replication.nbd.tls_socket import Socket, events_of
from tcmu_replication.units import KiB, MiB

log = logging.getLogger(__name__)

MAX_OWED = 8 * MiB
"""A connection with more than this in replies and in writes under way is not read from."""
MAX_IN_FLIGHT = 256
"""Nor is one with so many requests under way."""
TURN = 64 * MiB
"""Requests of this many bytes are run in one turn of the loop; then others have theirs. Reads of what is zero,
zeroes and trims ask for gigabytes with a few bytes, thousands of times in one buffer."""
SPARSE_FROM = 64 * KiB
"""A read of this length or more that is all zero is answered with a hole. (Asking for the extents before
every read costs more than it saves: finding the next hole of a full file on tmpfs takes 10 ms a GiB.)"""
EARLY = 64 * KiB
"""Replies leave when so much has been read and written, before the rest of the batch is done: the client
goes on meanwhile. Smaller parts cost more system calls than they gain."""
BUSY = 4
"""A connection that brings so many requests at once is busy."""
LOOKS = 50
"""So often a busy connection is looked at again before the loop goes to sleep: some 30 microseconds. To be woken takes
longer than these requests took. (QEMU's event loops poll for 32 microseconds, `poll-max-ns` of util/aio-posix.c.)"""
ROUNDS = 32
"""So often in a row it may find more; then others have their turn."""
STATUS_SPAN = 256 * MiB
"""A block status tells about this much at most, to bound its time; clients ask again for the rest."""

_FUA = int(CommandFlag.FUA)
_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_HEAD = transmission.REQUEST_SIZE
_SIMPLE = transmission.SIMPLE_SIZE
_DATA_HEAD = protocol.DATA_HEAD.size
_unpack_request = protocol.REQUEST.unpack_from
_pack_simple = protocol.SIMPLE_REPLY.pack_into
_pack_data_head = protocol.DATA_HEAD.pack_into
_ZEROES = bytes(64 * KiB)


class Connection:
    """Serves `node` on `sock` (non-blocking, handshake done) until either side ends it.

    `received` are bytes that came behind the handshake. `ended(self)` is called
    once, when the socket is closed and the node has ended all that came through it.
    All calls on the loop's thread.
    """

    def __init__(
        self,
        sock: Socket,
        node: Node,
        *,
        peer: str,
        read_only: bool = False,
        structured: bool = False,
        allocation: bool = False,
        received: bytes = b"",
        ended: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        self.node = node
        self.peer = peer
        self.in_flight = 0
        self.closed = False
        self._sock = sock
        self._read_only = read_only
        self._structured = structured
        self._read_head = _DATA_HEAD if structured else _SIMPLE
        self._allocation = allocation
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._events = events_of(sock)
        self._stream = Stream(received)
        self._need = transmission.REQUEST_SIZE
        self._out = Outbox()
        self._held_bytes = 0
        self._reading = self._writing = False
        self._leaving = False
        self._paused = False
        self._resuming = False
        self._ran = 0
        self._looks = LOOKS
        self._arrived: select.poll | None = None
        if isinstance(sock, socket.socket):  # TLS may have in its own buffers what poll(2) does not see
            self._arrived = select.poll()
            self._arrived.register(sock, select.POLLIN)
        self._set_reading(True)
        if received:
            self._resume_soon()

    # The socket

    def _readable(self) -> None:
        """Serve what has arrived, and while there is much of it what arrives meanwhile."""
        self._ran = 0
        self._receive()
        for _ in range(ROUNDS):
            if self._ran < BUSY or self.in_flight or self._writing or not self._reading or not self._look():
                return
            self._receive()

    def _look(self) -> bool:
        """Whether more comes at once. Who looked in vain looks for half as long the next time."""
        if self._arrived is None:
            return False
        for _ in range(self._looks):
            if self._arrived.poll(0):
                self._looks = LOOKS
                return True
        self._looks = max(self._looks * 3 // 4, LOOKS // 3)
        return False

    def _receive(self) -> None:
        try:
            count = self._sock.recv_into(self._stream.room(self._need))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        if count:
            self._stream.end += count
        else:
            self._leave()
        self._serve()

    def _serve(self) -> None:
        """Run what is complete, then answer."""
        try:
            self._run()
        except Error as error:
            log.warning("NBD client %s: %s; hung up", self.peer, error)
            self.abort()
        if not self.closed:
            self._send()
        if self._paused and self._has_room():
            self._resume_soon()

    def _send(self) -> None:
        """Send what is ready; what the socket does not take now goes when it does."""
        try:
            gone = self._out.send(self._sock)
        except OSError:
            self.abort()
            return
        if gone and self._leaving and not self._paused and not self.in_flight:
            self.abort()
            return
        if gone == self._writing:
            self._writing = not gone
            if gone:
                self._events.remove_writer(self._sock)
            else:
                self._events.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        self._send()
        if self._paused and self._has_room():
            self._serve()

    def _has_room(self) -> bool:
        """Whether this client may have more done now."""
        return (
            self.in_flight < MAX_IN_FLIGHT
            and self._out.size + self._held_bytes < MAX_OWED
            and not self.closed
        )

    def _set_reading(self, wanted: bool) -> None:
        if wanted != self._reading and not self.closed:
            self._reading = wanted
            if wanted:
                self._events.add_reader(self._sock, self._readable)
            else:
                self._events.remove_reader(self._sock)

    def _leave(self) -> None:
        """The client says nothing more: answer what is under way, then close."""
        self._leaving = True
        self._set_reading(False)

    def abort(self) -> None:
        """Close the socket now; twice is fine. `ended` waits for what the node still does."""
        if self.closed:
            return
        self._set_reading(False)
        self.closed = True
        if self._writing:
            self._events.remove_writer(self._sock)
        self._sock.close()
        if not self.in_flight:
            self._ended(self)

    # Requests

    def _run(self) -> None:
        stream = self._stream
        memory = stream.memory
        data = memory.data
        start, end = stream.start, stream.end
        first = start
        parse = transmission.parse_request
        left = TURN
        self._paused = False
        try:
            while left > 0 and self._has_room():
                start = self._plain(memory, start, end)
                if not self._has_room():
                    break
                request = parse(data, start, end)
                if request is None:
                    self._need = transmission.REQUEST_SIZE
                    return
                flags, command, cookie, offset, length = request
                left -= length
                body = start + transmission.REQUEST_SIZE
                if command == _WRITE:
                    if body + length > end:
                        self._need = transmission.REQUEST_SIZE + length
                        return
                    start = body + length
                    self._write(flags, cookie, offset, length, memory, body)
                    continue
                start = body
                if command == Command.DISC:
                    self._leave()
                    start = end
                    return
                self._dispatch(command, flags, cookie, offset, length)
                if self._out.size >= EARLY and not self._writing:
                    self._send()
            self._paused = True
        finally:
            stream.start = start
            self._set_reading(not self._paused and not self._leaving)
            if start != first:
                self.node.unplug()

    def _plain(self, memory: Memory, start: int, end: int) -> int:
        """Run the reads and writes that are complete and in order from `start` on, and say where they end.

        That is nearly all that a client sends. Whatever else a request is, is left to `_run`.
        """
        data, view = memory.data, memory.view
        write, limit, read_only = self.node.write, self.node.length, self._read_only
        written: list[int] = []
        moved = 0
        while end - start >= _HEAD:
            magic, flags, command, cookie, offset, length = _unpack_request(data, start)
            if magic != protocol.REQUEST_MAGIC or flags or not length or offset + length > limit:
                break
            behind = start + _HEAD
            try:
                if command == _WRITE:
                    body, behind = behind, behind + length
                    if behind > end or read_only:
                        break
                    start = behind
                    pending = write(offset, (view[body:behind],))
                    if pending is None:
                        written.append(cookie)
                        moved += length
                        if moved < EARLY:
                            continue
                    else:
                        self._wait_for_write(pending, cookie, length, memory)
                elif (
                    command == _READ and length < SPARSE_FROM
                ):  # longer ones may cost us more than the client
                    start = behind
                    self._fetch(flags, cookie, offset, length)
                    self._ran += 1
                    moved += length
                else:
                    break
            except Error as error:
                self._fail(cookie, error)
            if moved >= EARLY:
                moved = 0
                self._succeed_all(written)
                if not self._writing:
                    self._send()
            if not self._has_room():
                break
        self._succeed_all(written)
        return start

    def _dispatch(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        try:
            handler = _HANDLERS.get(command)
            if handler is None:
                raise Error(Kind.BAD_REQUEST, f"command {command} is not supported")
            if flags & ~transmission.FLAGS_OF_COMMAND[command]:
                raise Error(Kind.BAD_REQUEST, f"{Command(command).name} with flags {flags:#x}")
            handler(self, flags, cookie, offset, length)
        except Error as error:
            self._fail(cookie, error)

    def _check(self, offset: int, length: int, *, writes: bool = False) -> None:
        if writes and self._read_only:
            raise Error(Kind.READ_ONLY, "the export is read-only")
        if not length:
            raise Error(Kind.BAD_REQUEST, "a request for no bytes")
        if offset + length > self.node.length:
            # The specification's errors: no space for what writes, an invalid request otherwise.
            kind = Kind.NO_SPACE if writes else Kind.OUT_OF_RANGE
            raise Error(kind, f"beyond the end of {self.node.length} bytes", offset=offset, length=length)

    def _write(self, flags: int, cookie: int, offset: int, length: int, memory: Memory, at: int) -> None:
        try:
            if flags & ~_FUA:
                raise Error(Kind.BAD_REQUEST, f"WRITE with flags {flags:#x}")
            self._check(offset, length, writes=True)
            pending = self.node.write(offset, [memory.view[at : at + length]], bool(flags))
        except Error as error:
            self._fail(cookie, error)
            return
        if pending is None:
            self._succeed(cookie)
            return
        self._wait_for_write(pending, cookie, length, memory)

    def _wait_for_write(self, pending: Pending, cookie: int, length: int, memory: Memory) -> None:
        """Keep the data of a write where it is until the node is through with it, then answer."""
        memory.held += 1
        self._held_bytes += length

        def ended(pending: Pending) -> None:
            memory.held -= 1
            self._held_bytes -= length
            self._answer(cookie, pending.error)

        self._wait(pending, ended)

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._check(offset, length)
        if length > protocol.MAX_REQUEST:
            raise Error(Kind.BAD_REQUEST, f"a read of {length} bytes; the limit is {protocol.MAX_REQUEST}")
        self._fetch(flags, cookie, offset, length)

    def _fetch(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """A read whose range is known to be good."""
        out = self._out
        at = out.reserve(self._read_head + length)
        memory = out.memory
        body = at + self._read_head
        try:
            pending = self.node.read(offset, (memory.view[body : body + length],))
        except Error:
            out.cancel(at)
            raise
        sparse = length >= SPARSE_FROM and self._structured and not flags & CommandFlag.DF
        if pending is not None:
            self._wait_for_read(pending, cookie, offset, length, at, sparse)
        elif sparse and is_zero(memory.data, body, body + length):
            out.cancel(at)
            self._put_hole(cookie, offset, length)
        else:
            self._put_head(memory.data, at, cookie, offset, length)

    def _wait_for_read(
        self, pending: Pending, cookie: int, offset: int, length: int, at: int, sparse: bool
    ) -> None:
        """Let the reply that begins at `at` go when the node has read its data; others overtake it."""
        out = self._out
        memory = out.memory
        data, body = memory.data, at + self._read_head
        segment = out.detach(at)

        def ended(pending: Pending) -> None:
            memory.held -= 1
            if pending.error is None and not (sparse and is_zero(data, body, body + length)):
                self._put_head(data, at, cookie, offset, length)
                out.queue(segment)
                return
            out.drop(segment)
            if pending.error is None:
                self._put_hole(cookie, offset, length)
            else:
                self._fail(cookie, pending.error)

        self._wait(pending, ended)

    def _put_head(self, data: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
        """What precedes the data of a read."""
        if self._structured:
            _pack_data_head(
                data,
                at,
                protocol.STRUCTURED_REPLY_MAGIC,
                protocol.CHUNK_DONE,
                Chunk.OFFSET_DATA,
                cookie,
                transmission.DATA_PREFIX + length,
                offset,
            )
        else:
            _pack_simple(data, at, protocol.SIMPLE_REPLY_MAGIC, 0, cookie)

    def _put_hole(self, cookie: int, offset: int, length: int) -> None:
        self._put(transmission.chunk(cookie, Chunk.OFFSET_HOLE, protocol.CHUNK_HOLE.pack(offset, length)))

    def _flush(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._finish(cookie, self.node.flush())

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._check(offset, length, writes=True)
        pending = self.node.discard(offset, length)
        if not flags & _FUA:
            self._finish(cookie, pending)
        elif pending is None:
            self._finish(cookie, self.node.flush())
        else:
            self._wait(pending, lambda done: self._flush_after(cookie, done))

    def _flush_after(self, cookie: int, done: Pending) -> None:
        if done.error is not None:
            self._fail(cookie, done.error)
            return
        self._dispatch(Command.FLUSH, 0, cookie, 0, 0)
        self.node.unplug()

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._check(offset, length, writes=True)
        unmap = not flags & CommandFlag.NO_HOLE
        self._finish(cookie, self.node.zero(offset, length, bool(flags & _FUA), unmap))

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not self._allocation:
            raise Error(Kind.BAD_REQUEST, "block status without an agreed context")
        self._check(offset, length)
        extents = self.node.extents(offset, min(length, STATUS_SPAN))
        if flags & CommandFlag.REQ_ONE:
            del extents[1:]
        states = [(extent.length, status_of(extent)) for extent in extents]
        self._put(transmission.status_chunk(cookie, CONTEXT_ID, states))

    # Answers

    def _wait(self, pending: Pending, ended: Callable[[Pending], None]) -> None:
        """Call `ended` at the request's end, and go on then."""
        self.in_flight += 1

        def over(pending: Pending) -> None:
            self.in_flight -= 1
            if not self.closed:
                ended(pending)
                self._resume_soon()
            elif not self.in_flight:
                self._ended(self)

        pending.then(over)

    def _resume_soon(self) -> None:
        """Once per turn of the loop, however many requests have ended in it."""
        if not self._resuming:
            self._resuming = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        if not self.closed:
            self._serve()

    def _finish(self, cookie: int, pending: Pending | None) -> None:
        if pending is None:
            self._succeed(cookie)
        else:
            self._wait(pending, lambda done: self._answer(cookie, done.error))

    def _answer(self, cookie: int, error: Error | None) -> None:
        if error is None:
            self._succeed(cookie)
        else:
            self._fail(cookie, error)

    def _succeed(self, cookie: int) -> None:
        # A simple reply is right for everything but a read, with structured replies too.
        at = self._out.reserve(_SIMPLE)
        _pack_simple(self._out.memory.data, at, protocol.SIMPLE_REPLY_MAGIC, 0, cookie)

    def _succeed_all(self, written: list[int]) -> None:
        """As `_succeed`, for the writes of these cookies; the list is empty then."""
        if not written:
            return
        self._ran += len(written)
        at = self._out.reserve(_SIMPLE * len(written))
        data = self._out.memory.data
        for cookie in written:
            _pack_simple(data, at, protocol.SIMPLE_REPLY_MAGIC, 0, cookie)
            at += _SIMPLE
        written.clear()

    def _fail(self, cookie: int, error: Error) -> None:
        number = protocol.ERROR_OF_KIND[error.kind]
        if self._structured:
            self._put(transmission.error_chunk(cookie, number, str(error)))
        else:
            self._put(transmission.simple_reply(cookie, number))

    def _put(self, reply: bytes) -> None:
        at = self._out.reserve(len(reply))
        self._out.memory.data[at : at + len(reply)] = reply


_HANDLERS: dict[int, Callable[[Connection, int, int, int, int], None]] = {
    Command.READ: Connection._read,
    Command.FLUSH: Connection._flush,
    Command.TRIM: Connection._trim,
    Command.WRITE_ZEROES: Connection._write_zeroes,
    Command.BLOCK_STATUS: Connection._block_status,
}


def status_of(extent: Extent) -> int:
    """The base:allocation state of an extent."""
    return (0 if extent.allocated else ExtentState.HOLE) | (ExtentState.ZERO if extent.zero else 0)


def is_zero(data: bytearray, start: int, end: int) -> bool:
    """Whether the bytes are all zero; looks no further than the first that is not."""
    return all(data.startswith(_ZEROES[: end - at], at) for at in range(start, end, len(_ZEROES)))
