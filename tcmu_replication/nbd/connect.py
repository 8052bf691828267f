"""Connect to an NBD server and shake hands, inside of TLS where that is wanted."""

from __future__ import annotations

import asyncio
import socket
import ssl

from tcmu_replication.dial import connected, dial
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.handshake_client import Agreement, ClientHandshake
from tcmu_replication.nbd.tls_socket import Socket, TlsSocket, receive, send_all
from tcmu_replication.nbd.uri import Address, Unix
from tcmu_replication.prove import prove
from tcmu_replication.secret import Secret, refuse_if_asked
from tcmu_replication.tls import Context, sentence


async def connect(
    address: Address,
    export: str,
    *,
    timeout_s: float,
    tls: Context | None = None,
    secret: Secret | None = None,
) -> tuple[Socket, Agreement, bytes]:
    """A connected socket, what was agreed on, and bytes that came behind it, within `timeout_s`.

    With `tls`, or `secret`, there is no connection without. Raises Error PEER_LOST (no connection, or it
    ended in the handshake), PEER_LIED (no NBD server), NOT_FOUND (no such export), PERMISSION
    (policy, certificates, the secret), UNSUPPORTED.
    """
    sock: Socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            sock = plain = await _open_socket(address, timeout_s)
            if secret is not None:
                await prove(plain, secret.proof("client"))
            handshake = ClientHandshake(export, tls=tls is not None)
            greeted = False
            while handshake.agreed is None:
                received = await receive(sock)
                if not received:
                    raise Error(Kind.PEER_LOST, "hung up in the handshake")
                if not greeted:
                    refuse_if_asked(received)
                    greeted = True
                answer = handshake.receive(received)
                if handshake.wants_tls:
                    assert tls is not None
                    sock = await TlsSocket.wrap(plain, tls, server_side=False)
                    answer = handshake.secured()
                if answer:
                    await send_all(sock, answer)
            return sock, handshake.agreed, handshake.rest
    except BaseException as error:
        if sock is not None:
            sock.close()
        who = f"NBD server {address}"
        if isinstance(error, TimeoutError):
            raise Error(Kind.PEER_LOST, f"{who}: no answer in {timeout_s:g} s") from error
        if isinstance(error, ssl.SSLError):  # with TLS 1.3 a server refuses only now
            raise Error(Kind.PERMISSION, f"{who}: {sentence(error)}") from error
        # With TLS 1.3 a server looks at our certificate when the handshake is over for us, and QEMU's says nothing.
        hint = "; it may not accept our certificate" if isinstance(sock, TlsSocket) else ""
        if isinstance(error, OSError):
            raise Error(Kind.PEER_LOST, f"{who}: {error.strerror or error}{hint}") from error
        if isinstance(error, Error):
            hint = hint if error.kind is Kind.PEER_LOST else ""
            raise Error(error.kind, f"{who}: {error.detail}{hint}") from error
        raise


async def _open_socket(address: Address, timeout_s: float) -> socket.socket:
    if isinstance(address, Unix):
        return await _open_unix(address.path)
    sock = await dial(address.host, address.port, address.local)
    # What a dead host has not acknowledged for timeout_s ends the connection; keep-alive finds
    # one that dies while nothing is under way.
    probe = max(1, int(timeout_s / 4))
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_USER_TIMEOUT, max(1, int(timeout_s * 1000))),
        (socket.TCP_KEEPIDLE, probe),
        (socket.TCP_KEEPINTVL, probe),
        (socket.TCP_KEEPCNT, 3),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


async def _open_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await connected(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock
