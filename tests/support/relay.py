"""A relay between the primary and a TCP port of the secondary: it passes bytes on, or keeps them back."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from tests.support.processes import free_port

CHUNK = 1 << 16


class Relay:
    """Listens on `address`, and connects to `target` from `source`; use as a context.

    `hold(marker)`: of a connection whose client sends `marker`, keep that and all that it sends from then on,
    until `release`, which passes it on even if the client has gone by then, as a network may.
    """

    def __init__(self, address: str, target: tuple[str, int], source: str) -> None:
        self.port = free_port()
        self.held = threading.Event()
        """Set once something is kept back."""
        self._listener = socket.create_server((address, self.port))
        self._target = target
        self._source = source
        self._marker: bytes | None = None
        self._go = threading.Event()
        self._sockets: list[socket.socket] = []

    def hold(self, marker: bytes) -> None:
        """Keep back, once, what begins with the bytes that have `marker`."""
        self.held.clear()
        self._go.clear()
        self._marker = marker

    def release(self) -> None:
        """Pass on what was kept."""
        self._go.set()

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._go.set()
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target, source_address=(self._source, 0))
                self._sockets += [client, server]
                for pair in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if asks and self._marker is not None and self._marker in data:
                    self._marker = None
                    self.held.set()
                    self._go.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
