"""The manager's end of sd_notify(3): what workers tell about themselves, by process."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

_UCRED = struct.Struct("3i")
_MOST = 4096


class Notices:
    """A datagram socket at `path` that only root may write to; the kernel says who wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(previous)

    def fileno(self) -> int:
        """Readable when notices wait."""
        return self._socket.fileno()

    def take(self) -> list[tuple[int, dict[str, str]]]:
        """The notices that wait: the process and its assignments. What is no assignment is left out."""
        found: list[tuple[int, dict[str, str]]] = []
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_MOST, socket.CMSG_SPACE(_UCRED.size))
            except BlockingIOError:
                return found
            for level, kind, value in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    found.append((_UCRED.unpack(value)[0], _assignments(data)))

    def close(self) -> None:
        """Close and remove the socket. Twice is fine."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self.path.unlink(missing_ok=True)


def _assignments(data: bytes) -> dict[str, str]:
    lines = data.decode("utf-8", "replace").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
