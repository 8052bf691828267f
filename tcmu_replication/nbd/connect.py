"""Connect to an NBD server and shake hands."""

from __future__ import annotations

import asyncio
import socket

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.handshake_client import Agreement, ClientHandshake
from tcmu_replication.nbd.uri import Address, Unix


async def connect(
    address: Address, export: str, *, timeout_s: float
) -> tuple[socket.socket, Agreement, bytes]:
    """A connected socket, what was agreed on, and bytes that came behind it, within `timeout_s`.

    Raises Error PEER_LOST (no connection, or it ended in the handshake), PEER_LIED
    (no NBD server), NOT_FOUND (no such export), PERMISSION, UNSUPPORTED.
    """
    loop = asyncio.get_running_loop()
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            sock = await _open_socket(address, timeout_s)
            handshake = ClientHandshake(export)
            while handshake.agreed is None:
                received = await loop.sock_recv(sock, 4096)
                if not received:
                    raise Error(Kind.PEER_LOST, "hung up in the handshake")
                if answer := handshake.receive(received):
                    await loop.sock_sendall(sock, answer)
            return sock, handshake.agreed, handshake.rest
    except BaseException as error:
        if sock is not None:
            sock.close()
        who = f"NBD server {address}"
        if isinstance(error, TimeoutError):
            raise Error(Kind.PEER_LOST, f"{who}: no answer in {timeout_s:g} s") from error
        if isinstance(error, OSError):
            raise Error(Kind.PEER_LOST, f"{who}: {error.strerror or error}") from error
        if isinstance(error, Error):
            raise Error(error.kind, f"{who}: {error.detail}") from error
        raise


async def _open_socket(address: Address, timeout_s: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    if isinstance(address, Unix):
        return await _connected(socket.AF_UNIX, address.path)
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    refused: OSError = OSError(f"{address.host} has no address")
    for family, _, _, _, target in found:
        try:
            sock = await _connected(family, target)
        except OSError as error:
            refused = error
            continue
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
    raise refused


async def _connected(family: int, target: str | tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, target)
    except BaseException:
        sock.close()
        raise
    return sock
