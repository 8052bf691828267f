"""A process's control server: a unix socket for root, and a TCP port for the peer.

    server = Server({"query-status": self.query_status, ...})
    await server.listen_unix(run / "disk0.sock")
    await server.listen_tcp("192.0.2.2", 10810, peer="192.0.2.1")
    server.emit("REPLICATION_STAGE", StageChanged(stage="running", epoch=1))
    await server.close()

A handler is `async (arguments, session) -> result`, with arguments and result
as the schema says; it raises `Error` to refuse. Commands of one connection run
one after the other, those of different connections at the same time; what may
be given out of band runs at once. A worker with a resource's commands answers
to QEMU's names for them too. Whoever breaks the protocol loses that connection,
with a line in the log, and nothing else happens.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tcmu_replication.control import framing, lock, qemu
from tcmu_replication.control.command import Command, Document, Privilege
from tcmu_replication.control.schema import COMMANDS, EVENTS
from tcmu_replication.control.session import Call, Session
from tcmu_replication.control.throttle import Throttle
from tcmu_replication.errors import Error, Kind, from_os

Handler = Callable[[Any, Session], Awaitable[Any]]

log = logging.getLogger(__name__)

NEGOTIATION_S = 10.0
"""A connection that has not negotiated by then is closed."""
MAX_CONNECTIONS = 64
MAX_QUEUED = 8
"""Commands of one connection that wait for their turn, as in QEMU; then it is not read any more."""
MAX_UNSENT = 1 << 20
"""Bytes of events and replies that a client may leave unread before it is cut off."""
_UCRED = struct.Struct("3i")


class Server:
    """Serves `handlers`, each a row of `table`; without listen_* it serves nobody."""

    def __init__(self, handlers: Mapping[str, Handler], table: Mapping[str, Command] = COMMANDS) -> None:
        unknown = set(handlers) - set(table)
        assert not unknown, f"handlers without a row in the command table: {unknown}"
        self._handlers = {**handlers, **qemu.names(handlers, self.emit)}
        self._table = table
        for name in self._handlers:
            table[name].prepare()
        self._listeners: list[asyncio.Server] = []
        self._clients: dict[asyncio.Task[None], tuple[Session, asyncio.StreamWriter]] = {}
        self._throttle = Throttle()
        self._lock: int | None = None
        self._path: Path | None = None

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
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            previous = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(previous)
        except OSError as error:
            raise from_os(error, f"listen at {path}") from error
        self._path = path
        self._listeners.append(await asyncio.start_unix_server(self._accept_unix, sock=listener))

    async def listen_tcp(self, address: str, port: int, peer: str, tls: ssl.SSLContext | None = None) -> None:
        """Listen on `address` and take connections from the address `peer` only, for peer commands only.

        With `tls` the first byte is TLS's, and the context decides on the peer's certificate.
        """
        allowed = _plain(peer)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            name = writer.get_extra_info("peername")
            if not name or _plain(name[0]) != allowed:
                log.warning("control: refused a connection from %s; the peer is %s", name and name[0], peer)
                writer.close()
                return
            with suppress(OSError):
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await self._serve(reader, writer, Privilege.PEER, f"peer {name[0]}")

        try:
            self._listeners.append(
                await asyncio.start_server(
                    accept,
                    address,
                    port,
                    reuse_address=True,
                    ssl=tls,
                    ssl_handshake_timeout=None if tls is None else NEGOTIATION_S,
                )
            )
        except OSError as error:
            raise from_os(error, f"listen on {address} port {port}") from error

    @property
    def tcp_port(self) -> int:
        """The port of the TCP listener (for port 0)."""
        return int(self._listeners[-1].sockets[0].getsockname()[1])

    def emit(self, name: str, data: Document) -> None:
        """Send an event to every operator that has negotiated. Never blocks, never raises."""
        assert isinstance(data, EVENTS[name]), f"{name} carries {EVENTS[name].__name__}"
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
            listener.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        current = asyncio.current_task()
        tasks = [task for task in self._clients if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listeners.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _accept_unix(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(credentials)
        if uid not in (0, os.geteuid()):
            log.warning("control: refused a connection from process %d of user %d; only root may", pid, uid)
            writer.close()
            return
        await self._serve(reader, writer, Privilege.OPERATOR, f"process {pid}")

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, privilege: Privilege, peer: str
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= MAX_CONNECTIONS:
            log.warning("control: refused %s: %d connections are open", peer, MAX_CONNECTIONS)
            writer.close()
            return
        session = Session(self._table, self._handlers, privilege, peer)
        self._clients[task] = session, writer
        try:
            await self._converse(session, reader, writer)
        except Error as error:
            log.warning("control: ended the connection of %s: %s", peer, error)
        except (ConnectionError, asyncio.CancelledError):
            pass  # they went, or we go: nobody is left to tell
        except OSError as error:  # the network went: EHOSTUNREACH, ETIMEDOUT
            log.warning("control: lost the connection of %s: %s", peer, error)
        finally:
            del self._clients[task]
            writer.close()

    async def _converse(
        self, session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until the client goes; what it has asked by then is carried out."""
        writer.write(framing.greeting())
        queue: asyncio.Queue[Call | bytes] = asyncio.Queue(MAX_QUEUED)
        runner = asyncio.create_task(self._answer(session, queue, writer))
        ended: Exception | None = None
        try:
            try:
                await self._listen(session, reader, writer, queue)
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


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address without a scope and without the IPv6 disguise of an IPv4 one."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return getattr(parsed, "ipv4_mapped", None) or parsed
