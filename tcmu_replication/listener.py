"""Listening sockets, and who is let in: the same for NBD and for control connections.

    kernel -> accept -> address -> a stranger, with its task `meet` -> known -> whoever serves it
                          |             |
                       hung up       one too many: the oldest stranger of the busiest address makes way

The address and the count are looked at before a byte is read and before TLS. A stranger costs a descriptor and a
task, and there are never more than MAX_STRANGERS; who has shown who it is (`known`) is not one any more. So strangers
can neither exhaust the descriptors nor keep the peer out: it needs a few round trips, and for that long it is among
the newest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ipaddress
import logging
import os
import socket
import stat
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from tcmu_replication.errors import Error, Kind, from_os

log = logging.getLogger(__name__)

MAX_STRANGERS = 64
"""Of one listener, at a time."""
BACKLOG = 128
"""Connections that the kernel keeps until we take them."""
PAUSE_S = 1.0
"""So long nobody is taken when descriptors or memory are out."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
UNIX = "on a unix socket"
"""The name of a client that has no address."""

Meet = Callable[[socket.socket, str], Coroutine[Any, Any, None]]


class Listener:
    """Takes clients for `meet(sock, name)`, a coroutine that owns the socket and is cancelled if it has to make way.

    `what` names us in the log ("NBD"); `name` is the client's address, or UNIX. Over TCP only those come in whose
    address `allow` likes. The loop's thread only.
    """

    def __init__(self, what: str, meet: Meet, *, allow: Callable[[str], bool] | None = None) -> None:
        self._what = what
        self._meet = meet
        self._allow = allow
        self._sockets: dict[socket.socket, str | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], str] = {}
        self._pauses: set[asyncio.TimerHandle] = set()

    @property
    def strangers(self) -> int:
        """Clients that have not shown yet who they are."""
        return len(self._strangers)

    def known(self) -> None:
        """The client whose `meet` is running has shown who it is: it never has to make way. Twice is fine."""
        task = asyncio.current_task()
        if task is not None:
            self._strangers.pop(task, None)

    async def listen_tcp(self, host: str, port: int) -> int:
        """Listen on every address of `host` ("" for all); returns the port (of the first, with port 0).

        Raises Error BAD_CONFIG (no such host), CONFLICT (in use) and what else the kernel says.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise Error(Kind.BAD_CONFIG, f"listen on {host}: {error.strerror}") from error
        opened: list[socket.socket] = []
        try:
            for family, kind, proto, _, address in dict.fromkeys(found):
                if port == 0 and opened:
                    address = (address[0], opened[0].getsockname()[1], *address[2:])
                opened.append(_bind(socket.socket(family, kind, proto), address))
        except OSError as error:
            for sock in opened:
                sock.close()
            raise from_os(error, f"listen on {host or '*'} port {port}") from error
        for sock in opened:
            self._listen(sock, None)
        return int(opened[0].getsockname()[1])

    async def listen_unix(self, path: str) -> None:
        """Listen on a socket at `path`, mode 0600; a dead socket that lies there is replaced. Raises Error."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_dead_socket(path)
            mask = os.umask(0o177)
            try:
                _bind(sock, path)
            finally:
                os.umask(mask)
        except OSError as error:
            sock.close()
            raise from_os(error, f"listen on {path}") from error
        self._listen(sock, path)

    def listen_beside(self, other: Listener) -> None:
        """Take clients of the other's sockets too, on this loop; that of `other` may be stuck. Raises OSError."""
        for sock in list(other._sockets):
            self._listen(sock.dup(), None)

    def stop(self) -> None:
        """Take no more clients; those that are here stay."""
        for pause in self._pauses:
            pause.cancel()
        self._pauses.clear()
        for sock, path in self._sockets.items():
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
            if path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        self._sockets.clear()

    async def close(self) -> None:
        """`stop`, and end every `meet` but the one that calls."""
        self.stop()
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _listen(self, sock: socket.socket, path: str | None) -> None:
        sock.setblocking(False)
        self._sockets[sock] = path
        asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._pause(listener, error)
            elif not isinstance(error, BlockingIOError):
                log.warning("%s: accept: %s", self._what, error.strerror)
            return
        sock.setblocking(False)
        name = UNIX if listener.family == socket.AF_UNIX else plain_host(address[0])
        if name is not UNIX and self._allow is not None and not self._allow(name):
            log.warning("%s client %s is not allowed here; hung up", self._what, name)
            sock.close()
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self._make_way()
        task = asyncio.get_running_loop().create_task(self._meet(sock, name))
        self._tasks.add(task)
        self._strangers[task] = name
        task.add_done_callback(functools.partial(self._ended, sock))

    def _ended(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._strangers.pop(task, None)
        if task.cancelled():
            sock.close()  # it may not even have begun

    def _make_way(self) -> None:
        """Hang up on the oldest stranger of the address that has most of them."""
        (busiest, _), *_ = Counter(self._strangers.values()).most_common(1)
        oldest = next(task for task, name in self._strangers.items() if name == busiest)
        log.warning(
            "%s client %s hung up on: %d are waiting to show who they are", self._what, busiest, MAX_STRANGERS
        )
        del self._strangers[oldest]
        oldest.cancel()

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        """Without descriptors the waiting client would be reported to us for ever, and nothing else be done."""
        log.warning("%s: accept: %s; no new clients for %g s", self._what, error.strerror, PAUSE_S)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)

        def go_on() -> None:
            self._pauses.discard(pause)
            loop.add_reader(listener, self._accept, listener)

        pause = loop.call_later(PAUSE_S, go_on)
        self._pauses.add(pause)


def _bind(sock: socket.socket, address: object) -> socket.socket:
    try:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)  # type: ignore[arg-type]
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _remove_dead_socket(path: str) -> None:
    """Remove a socket that nobody listens on any more; anything else stays and makes bind fail."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except BlockingIOError:
            pass  # somebody listens and is busy


def plain_host(host: str) -> str:
    """An address without a scope; an IPv4 client of an IPv6 socket is named by its IPv4 address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
