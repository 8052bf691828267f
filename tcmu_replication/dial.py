"""Connect to a TCP port, or say in words why not."""

from __future__ import annotations

import asyncio
import errno
import os
import socket

HINTS = {errno.ECONNREFUSED: ": nobody listens there"}
"""What the system's words mean here."""


async def dial(host: str, port: int, local: str | None = None) -> socket.socket:
    """A connected socket to the first address of `host` that takes us, from our address `local` if it is given.

    Raises OSError, with `strerror` as words for a person; the caller knows which port they are about.
    """
    loop = asyncio.get_running_loop()
    refused = OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
    for family, kind, proto, _, target in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            if local is not None:
                sock.bind((local, 0))
            await connected(sock, target)
            return sock
        except OSError as error:
            sock.close()
            refused = error
        except BaseException:
            sock.close()
            raise
    raise refused


async def connected(sock: socket.socket, target: str | tuple[object, ...]) -> None:
    """Connect `sock`. Raises OSError as `dial` does: asyncio's own text repeats the address and not the reason."""
    try:
        await asyncio.get_running_loop().sock_connect(sock, target)
    except OSError as error:
        if error.errno is None:
            raise
        words = os.strerror(error.errno) + HINTS.get(error.errno, "")
        raise OSError(error.errno, words) from error
