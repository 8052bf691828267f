"""An NBD server: nodes under names, over TCP and unix sockets.

Accepting and the handshake are coroutines with a deadline; afterwards a
`Connection` serves the client in plain calls. An export may be used by several
clients at once: they share the node, so a flush on one connection covers what
was written through another (CAN_MULTI_CONN). An exclusive export has one.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tcmu_replication.block.node import Node
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd_connection import Connection
from tcmu_replication.listener import Listener
from tcmu_replication.nbd.handshake import Agreed, Offer, ServerHandshake
from tcmu_replication.nbd.protocol import MAX_STRING, TransmissionFlag
from tcmu_replication.nbd.tls_socket import Socket, TlsSocket, receive, send_all
from tcmu_replication.prove import prove
from tcmu_replication.secret import Secret
from tcmu_replication.tls import Context, sentence
from tcmu_replication.units import MiB

log = logging.getLogger(__name__)

HANDSHAKE_LIMIT_S = 10.0
"""As QEMU's server."""
MAX_CONNECTIONS = 100
"""As QEMU's server. Those that still shake hands are counted apart (listener.py)."""
SOCKET_BUFFER = 1 * MiB
"""What we ask of the kernel for replies on a unix socket (TCP sizes itself); it gives what it allows."""

_FLAGS = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.SEND_DF
)


@dataclass(frozen=True)
class Export:
    """A node under a name. It is writable only if the node is too.

    `exclusive` is for a client that comes back after a lost connection and sends
    again what was not answered: a new client takes the place of the one before,
    and is served when the node has ended all that the old one had asked. Without
    it a write of the old connection could overtake, or overwrite, newer ones.
    """

    name: str
    node: Node
    description: str = ""
    read_only: bool = False
    exclusive: bool = False

    def offer(self) -> Offer:
        """What a client is told."""
        flags = _FLAGS
        if self.is_read_only:
            flags |= TransmissionFlag.READ_ONLY
        if not self.exclusive:
            flags |= TransmissionFlag.CAN_MULTI_CONN
        return Offer(self.name, self.node.length, flags, self.description)

    @property
    def is_read_only(self) -> bool:
        """Whether writes are refused."""
        return self.read_only or self.node.read_only


class Server:
    """Serves exports until `close`. `allow(host)` decides on TCP clients by their address;
    a unix socket is guarded by its file's mode, 0600. With `secret` every client, on either,
    must prove that it knows it, and with `tls` shake hands in TLS.
    """

    def __init__(
        self,
        exports: Iterable[Export] = (),
        *,
        allow: Callable[[str], bool] | None = None,
        tls: Context | None = None,
        secret: Secret | None = None,
        max_connections: int = MAX_CONNECTIONS,
        handshake_limit_s: float = HANDSHAKE_LIMIT_S,
    ) -> None:
        self._exports: dict[str, Export] = {}
        self._connections: dict[Connection, str] = {}
        self._listener = Listener("NBD", self._shake_hands, allow=allow)
        self._tls = tls
        self._secret = secret
        self._max_connections = max_connections
        self._handshake_limit_s = handshake_limit_s
        self._changed = asyncio.Event()
        for export in exports:
            self.add(export)

    @property
    def exports(self) -> tuple[str, ...]:
        """The names of what is exported now."""
        return tuple(self._exports)

    @property
    def connections(self) -> int:
        """Clients connected now, without those that still shake hands."""
        return sum(not connection.closed for connection in self._connections)

    @property
    def in_flight(self) -> int:
        """Requests that nodes have not answered yet."""
        return sum(connection.in_flight for connection in self._connections)

    def add(self, export: Export) -> None:
        """Export a node. Raises Error CONFLICT (name taken) or BAD_CONFIG (name or description too long)."""
        if export.name in self._exports:
            raise Error(Kind.CONFLICT, f"an export named {export.name!r} exists already")
        for text in (export.name, export.description):
            if len(text.encode()) > MAX_STRING:
                raise Error(Kind.BAD_CONFIG, f"{text[:32]!r}... is longer than NBD's {MAX_STRING} bytes")
        self._exports[export.name] = export

    async def remove(self, name: str, hard: bool = True) -> None:
        """Stop exporting: at once no new clients; then `hard` hangs up on the present ones, else they are
        waited for. On return the node has ended every request that came through this export and gets no more.
        Raises Error NOT_FOUND.
        """
        if self._exports.pop(name, None) is None:
            raise Error(Kind.NOT_FOUND, f"no export is named {name!r}")
        clients = self._clients(name)
        if hard:
            for connection in clients:
                connection.abort()
        while any(connection in self._connections for connection in clients):
            self._changed.clear()
            await self._changed.wait()

    def clients(self, name: str) -> int:
        """Clients of an export that have agreed on it."""
        return len(self._clients(name))

    def _clients(self, name: str) -> list[Connection]:
        return [connection for connection, export in self._connections.items() if export == name]

    async def listen_tcp(self, host: str, port: int) -> int:
        """See `Listener.listen_tcp`."""
        return await self._listener.listen_tcp(host, port)

    async def listen_unix(self, path: str) -> None:
        """See `Listener.listen_unix`."""
        await self._listener.listen_unix(path)

    async def close(self) -> None:
        """Stop listening, hang up on every client and wait until the nodes have ended their requests."""
        await self._listener.close()
        for name in self.exports:
            await self.remove(name)

    async def _shake_hands(self, plain: socket.socket, peer: str) -> None:
        """Negotiate, and hand the socket to a Connection; or close it."""
        sock: Socket = plain
        try:
            self._check_room()
            _set_options(plain)
            async with asyncio.timeout(self._handshake_limit_s):
                if self._secret is not None:
                    await prove(plain, self._secret.proof("server"))
                    self._listener.known()
                handshake = await self._negotiate(sock)
                if handshake is not None and handshake.wants_tls and self._tls is not None:
                    sock = await TlsSocket.wrap(plain, self._tls, server_side=True)
                    self._listener.known()
                    handshake = await self._negotiate(sock, handshake.secured())
                if handshake is not None and handshake.agreed is not None:
                    self._listener.known()
                    await self._connect(sock, peer, handshake.agreed, handshake.rest)
                    return
        except TimeoutError:
            log.warning("NBD client %s: no handshake in %g s; hung up", peer, self._handshake_limit_s)
        except Error as error:
            log.warning("NBD client %s: %s; hung up", peer, error)
        except ssl.SSLError as error:
            log.warning("NBD client %s: %s; hung up", peer, sentence(error))
        except OSError as error:
            log.info("NBD client %s left in the handshake: %s", peer, error.strerror)
        except asyncio.CancelledError:
            sock.close()
            raise
        sock.close()

    async def _negotiate(
        self, sock: Socket, secured: ServerHandshake | None = None
    ) -> ServerHandshake | None:
        """The finished handshake, from the greeting or what TLS has `secured`; None if the client hung up."""
        handshake = secured or ServerHandshake(
            lambda: {e.name: e.offer() for e in self._exports.values()}, tls=self._tls is not None
        )
        answer = b"" if secured else handshake.greeting()
        while True:
            await send_all(sock, answer)
            if handshake.over:
                return handshake
            received = await receive(sock)
            if not received:
                return None
            answer = handshake.receive(received)

    async def _connect(self, sock: Socket, peer: str, agreed: Agreed, rest: bytes) -> None:
        name = agreed.offer.name
        if not agreed.offer.flags & TransmissionFlag.CAN_MULTI_CONN:
            while old := self._clients(name):
                for connection in old:
                    connection.abort()
                self._changed.clear()
                if self._clients(name):
                    await self._changed.wait()
        export = self._exports.get(name)
        if export is None or export.offer() != agreed.offer:
            raise Error(Kind.NOT_FOUND, f"export {name!r} was removed during the handshake")
        self._check_room()
        connection = Connection(
            sock,
            export.node,
            peer=f"{peer} (export {export.name})",
            read_only=export.is_read_only,
            structured=agreed.structured,
            allocation=agreed.allocation,
            received=rest,
            ended=self._ended,
        )
        self._connections[connection] = export.name

    def _check_room(self) -> None:
        if self.connections >= self._max_connections:
            raise Error(Kind.CONFLICT, f"it is one too many of {self._max_connections}")

    def _ended(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        self._changed.set()


def _set_options(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
