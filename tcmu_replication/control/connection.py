"""A control connection inside an event loop: a worker's to its peer, the manager's to its workers.

peer = await Connection.tcp("192.0.2.2", 10810, local="192.0.2.1", timeout=5.0)
state = await peer.execute("peer-hello", {"resource": "disk0", "protocol": 1}, timeout=5.0)
peer.lost.add_done_callback(...)      # a future that ends with the connection; its result is the reason
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcmu_replication.control import framing
from tcmu_replication.dial import dial
from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.prove import prove
from tcmu_replication.secret import Secret, refuse_if_asked
from tcmu_replication.tls import sentence


class Connection(asyncio.Protocol):
    """A negotiated connection, made by `tcp` or `unix`. Commands may be given at the same time.

    `lost` is done when the connection has ended, with the reason as its result.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = loop.create_future()
        self._greeted: asyncio.Future[None] = loop.create_future()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_id = 0
        self._objects = framing.Objects()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def tcp(
        cls,
        host: str,
        port: int,
        *,
        local: str | None,
        timeout: float,
        tls: ssl.SSLContext | None = None,
        secret: Secret | None = None,
    ) -> Connection:
        """Connect and negotiate within `timeout` seconds, from the address `local` (the peer checks it).

        With `secret` each end proves that it knows it before anything else. Raises PEER_LOST, TIMED_OUT
        or, if one end does not accept the other's certificate or proof, PERMISSION.
        """
        return await _open(cls._tcp(host, port, local, tls, secret), f"{host}:{port}", timeout)

    @classmethod
    async def _tcp(
        cls, host: str, port: int, local: str | None, tls: ssl.SSLContext | None, secret: Secret | None
    ) -> tuple[asyncio.BaseTransport, Connection]:
        loop = asyncio.get_running_loop()
        sock = await dial(host, port, local)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secret is not None:
                await prove(sock, secret.proof("client"))
            name = None if tls is None else ""
            return await loop.create_connection(cls, sock=sock, ssl=tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise

    @classmethod
    async def unix(cls, path: Path, *, timeout: float) -> Connection:
        """Connect to a control socket and negotiate within `timeout` seconds. Raises as `tcp`."""
        loop = asyncio.get_running_loop()
        return await _open(loop.create_unix_connection(cls, str(path)), str(path), timeout)

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """Run a command and return its result.

        Raises the server's error; TIMED_OUT after `timeout` seconds (the reply
        is then ignored); PEER_LOST if the connection ends or had ended.
        """
        if self._transport is None or self.lost.done():
            raise Error(Kind.PEER_LOST, "the control connection has ended")
        self._next_id += 1
        id = self._next_id
        reply = self._calls[id] = asyncio.get_running_loop().create_future()
        self._transport.write(framing.request(command, dict(arguments or {}), id))
        try:
            async with asyncio.timeout(timeout):
                return await reply
        except TimeoutError as error:
            raise Error(Kind.TIMED_OUT, f"no answer to '{command}' in {timeout:g} s") from error
        finally:
            self._calls.pop(id, None)

    def close(self) -> None:
        """End the connection; calls under way fail with PEER_LOST."""
        self._end("closed")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            if not self._greeted.done():
                refuse_if_asked(data)
            for message in self._objects.feed(data):
                self._message(framing.decode(message))
        except Error as error:
            if error.kind is Kind.PERMISSION:
                self._end(str(error), error.kind)
            else:
                self._end(f"the peer broke the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if isinstance(exc, ssl.SSLError):  # with TLS 1.3 a server refuses only after the handshake
            self._end(sentence(exc), Kind.PERMISSION)
        else:
            inside = self._transport is not None and self._transport.get_extra_info("ssl_object") is not None
            hint = "; it may not accept our certificate" if inside and not self._greeted.done() else ""
            self._end((str(exc) if exc else "the peer closed it") + hint)

    def _message(self, message: dict[str, Any]) -> None:
        if "QMP" in message:
            if not self._greeted.done():
                self._greeted.set_result(None)
            return
        reply = self._calls.get(message["id"]) if isinstance(message.get("id"), int) else None
        if reply is None or reply.done():
            return  # an event, or the answer to a call that gave up
        if "return" in message:
            reply.set_result(message["return"])
        else:
            said = framing.error_of(message.get("error"))
            text = one_line(said.detail)  # it goes to a log and to an operator's terminal
            reply.set_exception(Error(said.kind, text, offset=said.offset, length=said.length))

    def _end(self, reason: str, kind: Kind = Kind.PEER_LOST) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        lost = Error(kind, f"the control connection ended: {reason}")
        if not self._greeted.done():
            self._greeted.set_exception(lost)
            self._greeted.exception()  # seen: nobody may be waiting for it
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(lost)
        if self._transport is not None:
            self._transport.abort()

    async def _negotiate(self) -> None:
        await self._greeted
        await self.execute("qmp_capabilities")


async def _open(connecting: Any, where: str, timeout: float) -> Connection:
    connection: Connection | None = None
    try:
        async with asyncio.timeout(timeout):
            _, connection = await connecting
            await connection._negotiate()
    except TimeoutError as error:
        # As a server does that waits for TLS, or a QEMU whose QMP socket somebody else uses.
        silent = "" if connection is None else ": it took the connection and says nothing"
        _drop(connection)
        raise Error(Kind.TIMED_OUT, f"no control connection to {where} in {timeout:g} s{silent}") from error
    except ssl.SSLError as error:
        # A server that asks for a secret before TLS says what is no TLS.
        hint = ", or asks for a shared secret first" if _no_tls(error) else ""
        raise Error(Kind.PERMISSION, f"no control connection to {where}: {sentence(error)}{hint}") from error
    except Error as error:
        _drop(connection)
        if connection is None:
            raise Error(error.kind, f"no control connection to {where}: {error}") from error
        raise
    except OSError as error:
        raise Error(Kind.PEER_LOST, f"no control connection to {where}: {error.strerror or error}") from error
    except BaseException:
        _drop(connection)
        raise
    return connection


def _no_tls(error: ssl.SSLError) -> bool:
    return getattr(error, "reason", None) == "WRONG_VERSION_NUMBER"


def _drop(connection: Connection | None) -> None:
    if connection is not None:
        connection.close()
