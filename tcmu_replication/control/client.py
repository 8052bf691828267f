"""A control client for short programs: one blocking socket, nothing to import but the standard library.

    with Client.unix(run / "disk0.sock") as client:
        client.execute("checkpoint")

It reads bytes, never a text file object: `makefile("rw")` throws away what it
had read ahead at every write and so loses events.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcmu_replication.control import framing
from tcmu_replication.errors import Error, Kind

CONNECT_S = 5.0
"""A worker greets at once; one that has not by then hangs."""


class Client:
    """A negotiated connection. Events met on the way are kept in `events`."""

    def __init__(self, connection: socket.socket) -> None:
        self.events: list[dict[str, Any]] = []
        self._connection = connection
        self._objects = framing.Objects()
        self._waiting: list[bytes] = []
        self._next_id = 0
        while "QMP" not in (first := self._message()):
            self.events.append(first)
        self.execute("qmp_capabilities", timeout=CONNECT_S)

    @classmethod
    def unix(cls, path: Path) -> Client:
        """Connect to a control socket. Raises NOT_FOUND if nobody serves there, PERMISSION, TIMED_OUT."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_S)
        try:
            connection.connect(str(path))
            return cls(connection)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            raise Error(Kind.NOT_FOUND, f"nobody serves at {path}") from error
        except PermissionError as error:
            connection.close()
            raise Error(Kind.PERMISSION, f"{path}: only root may control a resource") from error
        except OSError as error:
            connection.close()
            raise Error(Kind.TIMED_OUT, f"{path}: {error}") from error
        except Error:
            connection.close()
            raise

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> Any:
        """Run a command and return its result.

        Raises the server's error; TIMED_OUT after `timeout` seconds, PEER_LOST
        if the connection ends.
        """
        self._next_id += 1
        self._connection.settimeout(timeout)
        try:
            self._connection.sendall(framing.request(command, dict(arguments or {}), self._next_id))
        except OSError as error:
            raise Error(Kind.PEER_LOST, f"the control connection ended: {error}") from error
        while True:
            message = self._message()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise framing.error_of(message["error"])
            elif message.get("id") == self._next_id and "return" in message:
                return message["return"]
            else:
                raise Error(Kind.PEER_LIED, f"an unexpected message: {message!r:.80}")

    def next_event(self) -> dict[str, Any]:
        """Wait for an event, or take the first that is kept. Raises PEER_LOST if the connection ends."""
        self._connection.settimeout(None)
        while not self.events:
            message = self._message()
            if "event" in message:
                self.events.append(message)
        return self.events.pop(0)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _message(self) -> dict[str, Any]:
        while not self._waiting:
            try:
                data = self._connection.recv(framing.MAX_LENGTH)
            except TimeoutError as error:
                raise Error(Kind.TIMED_OUT, "no answer on the control connection") from error
            except OSError as error:
                raise Error(Kind.PEER_LOST, f"the control connection ended: {error}") from error
            if not data:
                raise Error(Kind.PEER_LOST, "the control connection ended without an answer")
            self._waiting = self._objects.feed(data)
        return framing.decode(self._waiting.pop(0))
