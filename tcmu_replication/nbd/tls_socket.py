"""A non-blocking socket inside of TLS, with the calls of a plain one that the NBD data path makes.

    socket --recv--> cipher text --> incoming BIO --decrypt--> the caller's memory
    caller's memory --join, encrypt--> outgoing BIO --send--> socket

The shape of a batch is kept: one recv takes what many records hold, one send
carries many. The cost against a plain socket is the cipher and three copies:
cipher text in, cipher text out, and small buffers joined, since there is no
sendmsg in TLS.

What has been taken from the socket can be more than the caller had room for,
and what the caller gave can be more than the socket took. So the events are
this object's: `add_reader` and the other three stand in for the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence

from tcmu_replication.errors import Error, Kind
from tcmu_replication.tls import Context, sentence
from tcmu_replication.units import KiB

PIECE = 256 * KiB
"""Taken from the socket, or encrypted, at a time."""

Callback = Callable[[], object]


class TlsSocket:
    """`sock` after the TLS handshake that `wrap` has made. The loop's thread only."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        self._sock = sock
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._loop = asyncio.get_running_loop()
        self._received = memoryview(bytearray(PIECE))
        self._unsent = memoryview(b"")
        self._ended = False
        self._reader: Callback | None = None
        self._writer: Callback | None = None
        self._watching = False

    @classmethod
    async def wrap(cls, sock: socket.socket, context: Context, *, server_side: bool) -> TlsSocket:
        """Shake hands on a connected non-blocking socket. Raises Error PERMISSION, or OSError if it is lost."""
        loop = asyncio.get_running_loop()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=server_side)
        while True:
            failed, done = None, True
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                done = False
            except ssl.SSLError as error:
                failed = error
            if outgoing.pending:  # a refusal is told too
                await loop.sock_sendall(sock, outgoing.read())
            if failed is not None:
                raise Error(Kind.PERMISSION, sentence(failed)) from failed
            if done:
                return cls(sock, tls, incoming, outgoing)
            received = await loop.sock_recv(sock, PIECE)
            if not received:
                raise Error(Kind.PERMISSION, "it hung up in the TLS handshake")
            incoming.write(received)

    async def receive(self) -> bytes:
        """Some bytes, b"" at the end; before there is a reader."""
        room = memoryview(bytearray(4 * KiB))
        while True:
            try:
                return bytes(room[: self.recv_into(room)])
            except BlockingIOError:
                received = await self._loop.sock_recv(self._sock, PIECE)
            self._ended = not received
            self._incoming.write(received)

    async def send_all(self, data: bytes) -> None:
        """Send all; before there is a writer."""
        self._encrypt(memoryview(data))
        await self._loop.sock_sendall(self._sock, self._outgoing.read())

    # The calls of a socket

    def fileno(self) -> int:
        """See `socket.fileno`."""
        return self._sock.fileno()

    def recv_into(self, room: memoryview) -> int:
        """See `socket.recv_into`."""
        return self.recvmsg_into([room])[0]

    def recvmsg_into(self, rooms: Sequence[memoryview]) -> tuple[int]:
        """See `socket.recvmsg_into`; the count only. SSLError, where cipher text is wrong, is an OSError."""
        count = self._decrypt(rooms, 0)
        wanted = sum(map(len, rooms))
        if count < wanted and not self._ended and self._take():
            count += self._decrypt(rooms, count)
        if not count and not self._ended:
            raise BlockingIOError
        if count and self._has_more():
            self._loop.call_soon(self._read_more)
        return (count,)

    def send(self, data: bytes | memoryview) -> int:
        """See `socket.send`."""
        return self.sendmsg([data])

    def sendmsg(self, buffers: Iterable[bytes | memoryview]) -> int:
        """See `socket.sendmsg`: what was taken is on its way, or will be sent without the caller."""
        self._flush()
        if self._unsent:
            raise BlockingIOError
        pieces = []
        count = 0
        for buffer in buffers:
            piece = buffer if len(buffer) <= PIECE - count else buffer[: PIECE - count]
            pieces.append(piece)
            count += len(piece)
            if count == PIECE:
                break
        self._encrypt(memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces)))
        self._flush()
        return count

    def close(self) -> None:
        """Say goodbye if the socket takes it, and close."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()
        self._reader = self._writer = None
        if self._watching:
            self._loop.remove_writer(self._sock)
        self._sock.close()

    # The calls of a loop

    def add_reader(self, _: object, callback: Callback) -> None:
        """See `asyncio.loop.add_reader`, for this socket."""
        self._reader = callback
        self._loop.add_reader(self._sock, callback)
        if self._has_more():
            self._loop.call_soon(self._read_more)

    def remove_reader(self, _: object) -> None:
        """See `asyncio.loop.remove_reader`."""
        self._reader = None
        self._loop.remove_reader(self._sock)

    def add_writer(self, _: object, callback: Callback) -> None:
        """See `asyncio.loop.add_writer`."""
        self._writer = callback
        self._watch()

    def remove_writer(self, _: object) -> None:
        """See `asyncio.loop.remove_writer`."""
        self._writer = None
        self._watch()

    # In between

    def _has_more(self) -> bool:
        """Whether something came that no event will tell of: only a look at it shows how much it is."""
        return self._ended or bool(self._tls.pending() or self._incoming.pending)

    def _read_more(self) -> None:
        if self._reader is not None:
            self._reader()

    def _take(self) -> bool:
        """Take cipher text from the socket; False if there is none now."""
        try:
            count = self._sock.recv_into(self._received)
        except (BlockingIOError, InterruptedError):
            return False
        self._ended = not count
        self._incoming.write(self._received[:count])
        return True

    def _decrypt(self, rooms: Sequence[memoryview], skip: int) -> int:
        """Fill `rooms` behind the first `skip` bytes, as far as what was taken goes; how much it was."""
        count = 0
        for room in rooms:
            start = min(skip, len(room))
            skip -= start
            while start < len(room) and (self._incoming.pending or self._tls.pending()):
                try:
                    # With memory to fill it returns a count, whatever its stub says.
                    got: int = self._tls.read(len(room) - start, room[start:])  # type: ignore
                except ssl.SSLWantReadError:  # the rest of a record is still to come
                    return count
                if not got:  # the peer's goodbye
                    self._ended = True
                    return count
                start += got
                count += got
        return count

    def _encrypt(self, data: memoryview) -> None:
        while data:
            data = data[self._tls.write(data) :]

    def _flush(self) -> None:
        """Send cipher text as far as the socket takes it, and the rest when it takes more."""
        try:
            while self._unsent or self._outgoing.pending:
                if not self._unsent:
                    self._unsent = memoryview(self._outgoing.read())
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
        except (BlockingIOError, InterruptedError):
            pass
        self._watch()

    def _watch(self) -> None:
        wanted = bool(self._unsent) or self._writer is not None
        if wanted and not self._watching:
            self._loop.add_writer(self._sock, self._writable)
        elif self._watching and not wanted:
            self._loop.remove_writer(self._sock)
        self._watching = wanted

    def _writable(self) -> None:
        try:
            self._flush()
        except OSError:  # whoever reads or writes next will meet it too
            self._unsent = memoryview(b"")
            self._watch()
        if not self._unsent and self._writer is not None:
            self._writer()


Socket = socket.socket | TlsSocket


async def receive(sock: Socket) -> bytes:
    """Some bytes of a handshake, b"" at the end."""
    if isinstance(sock, TlsSocket):
        return await sock.receive()
    return await asyncio.get_running_loop().sock_recv(sock, 4 * KiB)


async def send_all(sock: Socket, data: bytes) -> None:
    """Send bytes of a handshake."""
    if isinstance(sock, TlsSocket):
        await sock.send_all(data)
    else:
        await asyncio.get_running_loop().sock_sendall(sock, data)


def events_of(sock: Socket) -> asyncio.AbstractEventLoop | TlsSocket:
    """Who tells when `sock` can be read or written: it has the loop's four calls."""
    return sock if isinstance(sock, TlsSocket) else asyncio.get_running_loop()
