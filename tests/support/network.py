"""A network between two workers of this machine that can be cut, and that can swallow what is sent."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Mapping
from types import TracebackType

_ROOM = 1 << 18
Ports = Mapping[int, int]


class Network:
    """Connections to a port of `ports` at `address` go on to the port that it leads to, from `source`; a context.

    `cut` hangs up on everybody, and whoever comes is hung up on. `hold` lets everything wait, where it is,
    as a network does that loses every packet. After `mend` all goes on.
    """

    def __init__(self, ports: Ports, *, address: str = "127.0.0.2", source: str = "127.0.0.1") -> None:
        self._address, self._source = address, source
        self._selector = selectors.DefaultSelector()
        self._other: dict[socket.socket, socket.socket] = {}
        self._lock = threading.Lock()
        self._cut = self._held = self._ended = False
        for port, behind in ports.items():
            listener = socket.create_server((address, port), backlog=16)
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, behind)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def cut(self) -> None:
        """From now on nobody reaches anybody, and everybody is told."""
        with self._lock:
            self._cut = True
            for sock in list(self._other):
                self._drop(sock)

    def hold(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        with self._lock:
            self._held = True

    def mend(self) -> None:
        """Everything goes on."""
        with self._lock:
            self._cut = self._held = False

    def _run(self) -> None:
        while not self._ended:
            ready = self._selector.select(0.02)
            with self._lock:
                if self._held:
                    ready = []
                for key, _ in ready:
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if key.data is not None:
                        self._accept(sock, key.data)
                    elif sock in self._other:
                        self._pass_on(sock)
            if self._held:
                threading.Event().wait(0.02)

    def _accept(self, listener: socket.socket, behind: int) -> None:
        near, _ = listener.accept()
        if self._cut:
            near.close()
            return
        try:
            far = socket.create_connection((self._address, behind), 5.0, (self._source, 0))
        except OSError:
            near.close()
            return
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_ROOM)
            if data:
                self._other[sock].settimeout(1.0)
                self._other[sock].sendall(data)
                return
        except OSError:
            pass  # it left, or takes nothing any more: a frozen worker, whose peer gives it up the same way
        self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        for end in (sock, self._other.pop(sock, None)):
            if end is not None:
                self._other.pop(end, None)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(end)
                end.close()
