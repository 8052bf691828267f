"""A process's control server: a unix socket for root, and a TCP port for the peer.

    server = Server({"query-status": self.query_status, ...})
    await server.listen_unix(run / "disk0.sock")
    await server.listen_tcp("192.0.2.2", 10810, peer="192.0.2.1", secret=secret)
    server.emit("REPLICATION_STAGE", StageChanged(stage="running", epoch=1))
    await server.close()

A handler is `async (arguments, session) -> result`, with arguments and result
as the schema says; it raises `Error` to refuse. Commands of one connection run
one after the other, those of different connections at the same time; what may
be given out of band runs at once. Whoever breaks the protocol loses that
connection, with a line in the log, and nothing else happens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tcmu_replication.control import framing, lock
from tcmu_replication.control.command import Command, Document, Privilege
from tcmu_replication.control.schema import COMMANDS, EVENTS
from tcmu_replication.control.session import Call, Session
from tcmu_replication.control.throttle import Throttle
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.listener import Listener, plain_host
from tcmu_replication.prove import prove
from tcmu_replication.secret import Secret

Handler = Callable[[Any, Session], Awaitable[Any]]
Emit = Callable[[str, Document], None]
Names = Callable[[Mapping[str, Handler], Emit], Mapping[str, Handler]]
"""Handlers in terms of others: of those that there are, and of what sends an event."""

log = logging.getLogger(__name__)

NEGOTIATION_S = 10.0
"""A connection that has not negotiated by then is closed."""
MAX_CONNECTIONS = 64
"""Of operators, on the unix socket."""
MAX_PEERS = 8
"""The peer needs one. Of more than these the oldest makes way: it may be one that the peer has lost long ago."""
MAX_QUEUED = 8
"""Commands of one connection that wait for their turn, as in QEMU; then it is not read any more."""
MAX_UNSENT = 1 << 20
"""Bytes of events and replies that a client may leave unread before it is cut off."""
_UCRED = struct.Struct("3i")


class Server:
    """Serves `handlers`, each a row of `table`, and what `names` makes of them; without listen_* it serves nobody.

    `events` are those that it sends.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        table: Mapping[str, Command] = COMMANDS,
        events: Mapping[str, type[Document]] = EVENTS,
        names: Names = lambda handlers, emit: {},
    ) -> None:
        self._handlers = {**handlers, **names(handlers, self.emit)}
        unknown = set(self._handlers) - set(table)
        assert not unknown, f"handlers without a row in the command table: {unknown}"
        self._table = table
        self._events = events
        self._names = names
        for name in self._handlers:
            table[name].prepare()
        self._listeners: list[Listener] = []
        self._operators: Listener | None = None
        self._tcp_port = 0
        self._clients: dict[asyncio.Task[None], tuple[Session, asyncio.StreamWriter]] = {}
        self._throttle = Throttle()
        self._lock: int | None = None

    async def listen_unix(self, path: Path) -> None:
        """Listen at `path`, mode 0600 in a directory 0755 that is made if it is missing.

        Takes the lock beside the socket first and holds it until `close`:
        raises CONFLICT if another process serves here. A socket that a dead
        process left is replaced.
        """
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock = lock.hold(path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise from_os(error, f"listen at {path}") from error
        self._operators = self._operators_listener()
        await self._operators.listen_unix(str(path))

    def stand_in(self, handlers: Mapping[str, Handler]) -> Server:
        """One that speaks as this one does, on a loop of its own, where this one's is stuck.

        It takes this one's operators until its `close`. Raises OSError.
        """
        server = Server(handlers, self._table, self._events, self._names)
        assert self._operators is not None
        server._operators_listener().listen_beside(self._operators)
        return server

    def _operators_listener(self) -> Listener:
        listener = Listener("control", lambda sock, name: self._meet_operator(listener, sock))
        self._listeners.append(listener)
        return listener

    async def listen_tcp(
        self,
        address: str,
        port: int,
        peer: str,
        tls: ssl.SSLContext | None = None,
        secret: Secret | None = None,
    ) -> None:
        """Listen on `address` and take connections from the address `peer` only, for peer commands only.

        With `secret` a client first proves that it knows it; with `tls` the next byte is TLS's, and
        the context decides on the peer's certificate.
        """
        allowed = plain_host(peer)

        def meet(sock: socket.socket, name: str) -> Coroutine[Any, Any, None]:
            return self._meet_peer(listener, sock, name, tls, secret)

        listener = Listener("control", meet, allow=lambda host: host == allowed)
        self._tcp_port = await listener.listen_tcp(address, port)
        self._listeners.append(listener)

    @property
    def tcp_port(self) -> int:
        """The port of the TCP listener (for port 0)."""
        return self._tcp_port

    def emit(self, name: str, data: Document) -> None:
        """Send an event to every operator that has negotiated. Never blocks, never raises."""
        assert isinstance(data, self._events[name]), f"{name} carries {self._events[name].__name__}"
        self._throttle.pass_on(name, data, self._emit)

    def _emit(self, name: str, data: Document) -> None:
        line = framing.event(name, msgspec.to_builtins(data), time.time())
        for session, writer in list(self._clients.values()):
            if session.negotiated and session.privilege is Privilege.OPERATOR:
                self._send(session, writer, line)

    async def close(self) -> None:
        """Stop listening, end the connections (a handler under way is cancelled), give the lock up."""
        self._throttle.close()
        for listener in self._listeners:
            listener.stop()
        for listener in self._listeners:
            await listener.close()
        self._listeners.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _meet_operator(self, listener: Listener, sock: socket.socket) -> None:
        pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        if uid not in (0, os.geteuid()):
            log.warning("control: refused a connection from process %d of user %d; only root may", pid, uid)
            sock.close()
            return
        if self._count(Privilege.OPERATOR) >= MAX_CONNECTIONS:
            log.warning("control: refused process %d: %d connections are open", pid, MAX_CONNECTIONS)
            sock.close()
            return
        listener.known()
        await self._serve(listener, await _streams(sock, None), Privilege.OPERATOR, f"process {pid}")

    async def _meet_peer(
        self,
        listener: Listener,
        sock: socket.socket,
        host: str,
        tls: ssl.SSLContext | None,
        secret: Secret | None,
    ) -> None:
        """Let the peer show who it is, then serve it."""
        try:
            async with asyncio.timeout(NEGOTIATION_S):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if secret is not None:
                    await prove(sock, secret.proof("server"))
                    listener.known()
                streams = await _streams(sock, tls)
                if tls is not None:
                    listener.known()
        except TimeoutError:
            log.warning("control: hung up on %s: it did not show who it is in %g s", host, NEGOTIATION_S)
        except Error as error:
            log.warning("control: hung up on %s: %s", host, error)
        except OSError as error:  # SSLError too, which its context tells of
            log.info("control: %s left before it had shown who it is: %s", host, error)
        else:
            await self._serve(listener, streams, Privilege.PEER, f"peer {host}")
            return
        sock.close()

    async def _serve(self, listener: Listener, streams: Streams, privilege: Privilege, peer: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        reader, writer = streams
        session = Session(self._table, self._handlers, privilege, peer, self._events)
        self._clients[task] = session, writer
        if self._count(Privilege.PEER) > MAX_PEERS:
            self._hang_up_on_the_oldest_peer()
        try:
            await self._converse(listener, session, reader, writer)
        except Error as error:
            log.warning("control: ended the connection of %s: %s", peer, error)
        except (ConnectionError, asyncio.CancelledError):
            pass  # they went, or we go: nobody is left to tell
        except OSError as error:  # the network went: EHOSTUNREACH, ETIMEDOUT
            log.warning("control: lost the connection of %s: %s", peer, error)
        finally:
            del self._clients[task]
            writer.close()

    def _count(self, privilege: Privilege) -> int:
        return sum(session.privilege is privilege for session, _ in self._clients.values())

    def _hang_up_on_the_oldest_peer(self) -> None:
        """As if it had gone itself: what it has asked is carried out."""
        for session, writer in self._clients.values():
            if session.privilege is Privilege.PEER and not writer.is_closing():
                log.warning("control: hung up on the oldest connection of %s", session.peer)
                writer.close()
                return

    async def _converse(
        self,
        listener: Listener,
        session: Session,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Until the client goes; what it has asked by then is carried out."""
        writer.write(framing.greeting())
        queue: asyncio.Queue[Call | bytes] = asyncio.Queue(MAX_QUEUED)
        runner = asyncio.create_task(self._answer(session, queue, writer))
        ended: Exception | None = None
        try:
            try:
                await self._listen(listener, session, reader, writer, queue)
            except (Error, OSError) as error:
                ended = error
            await queue.join()
        finally:
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)
        if ended is not None:
            raise ended

    async def _listen(
        self,
        listener: Listener,
        session: Session,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        queue: asyncio.Queue[Call | bytes],
    ) -> None:
        """Read requests into the queue; those out of band are answered here."""
        objects = framing.Objects()
        deadline = asyncio.get_running_loop().time() + NEGOTIATION_S
        while True:
            try:
                async with asyncio.timeout_at(None if session.negotiated else deadline):
                    data = await reader.read(framing.MAX_LENGTH)
            except TimeoutError as error:
                if session.negotiated:
                    raise
                raise Error(Kind.TIMED_OUT, f"no negotiation in {NEGOTIATION_S:g} s") from error
            if not data:
                return
            for message in objects.feed(data):
                asked = session.receive(message)
                if isinstance(asked, Call) and asked.request.oob:
                    self._send(session, writer, await self._run(session, asked))
                else:
                    await queue.put(asked)
            if session.negotiated:
                listener.known()

    async def _answer(
        self, session: Session, queue: asyncio.Queue[Call | bytes], writer: asyncio.StreamWriter
    ) -> None:
        """Carry the queue out, one after the other."""
        while True:
            asked = await queue.get()
            reply = await self._run(session, asked) if isinstance(asked, Call) else asked
            self._send(session, writer, reply)
            queue.task_done()
            with suppress(OSError):
                await writer.drain()

    async def _run(self, session: Session, call: Call) -> bytes:
        """Carry a call out. A handler that breaks is a bug: the log has the trace, the client an error."""
        try:
            result = await self._handlers[call.command.name](call.arguments, session)
            return session.succeed(call, result)
        except Error as error:
            return session.fail(call, error)
        except Exception as error:
            log.exception("control: '%s' failed unexpectedly", call.command.name)
            return session.fail(call, Error(Kind.IO, f"Internal error in '{call.command.name}': {error!r}"))

    def _send(self, session: Session, writer: asyncio.StreamWriter, line: bytes) -> None:
        if writer.transport.is_closing():
            return  # asyncio would complain of each line
        writer.write(line)
        if writer.transport.get_write_buffer_size() > MAX_UNSENT:
            log.warning("control: ended the connection of %s: it does not read", session.peer)
            writer.transport.abort()


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _streams(sock: socket.socket, tls: ssl.SSLContext | None) -> Streams:
    """A connected socket's streams, inside of TLS if it is wanted. Raises OSError (SSLError among them)."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
