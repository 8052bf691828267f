"""An NBD client for tests: blocking, small, and independent of ours.

It negotiates with NBD_OPT_EXPORT_NAME and simple replies only, so that it works
with every server and shares no code with what is tested. `start` and `finish`
put many requests in flight at once.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.tools import PATIENCE_S

READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6

_GREETING = struct.Struct(">8sQH")
_OPTION = struct.Struct(">QII")
_AGREED = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")


class NbdError(OSError):
    """The server's answer to a request; `errno` is NBD's, which is Linux's."""


@dataclass
class Request:
    """One request under way; `error` is 0 or an errno once it is `done`."""

    command: int
    offset: int
    length: int
    done: bool = False
    error: int = 0
    data: bytes = b""


Address = str | tuple[str, int]
"""A unix socket's path, or (host, port)."""


class Nbd:
    """One connection to `export` at `address`. Raises OSError if there is no such server or export."""

    def __init__(self, address: Address, export: str, *, timeout: float = PATIENCE_S) -> None:
        if isinstance(address, str):
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._sock.settimeout(timeout)
            self._sock.connect(address)
        else:
            self._sock = socket.create_connection(address, timeout)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._sock.makefile("rb")
        self._flying: dict[int, Request] = {}
        self._handle = 0
        try:
            self.length, self.flags = self._negotiate(export.encode())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Nbd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. Twice is fine."""
        self._file.close()
        self._sock.close()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range. Raises `NbdError`."""
        return self._one(READ, offset, length).data

    def write(self, offset: int, data: bytes) -> None:
        """Raises `NbdError`."""
        self._one(WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> None:
        """Raises `NbdError`."""
        self._one(ZEROES, offset, length)

    def trim(self, offset: int, length: int) -> None:
        """Raises `NbdError`."""
        self._one(TRIM, offset, length)

    def flush(self) -> None:
        """Raises `NbdError`."""
        self._one(FLUSH, 0, 0)

    def start(self, command: int, offset: int, length: int, data: bytes = b"") -> Request:
        """Send a request and do not wait for it."""
        self._handle += 1
        request = self._flying[self._handle] = Request(command, offset, length)
        self._sock.sendall(_REQUEST.pack(0x25609513, 0, command, self._handle, offset, length) + data)
        return request

    def finish(self, requests: Sequence[Request]) -> None:
        """Take answers until every one of `requests` is done. Raises ConnectionError if the server leaves."""
        while not all(request.done for request in requests):
            magic, error, handle = _REPLY.unpack(self._take(_REPLY.size))
            assert magic == 0x67446698, f"not a simple reply: {magic:#x}"
            request = self._flying.pop(handle)
            if request.command == READ and not error:
                request.data = self._take(request.length)
            request.done, request.error = True, error

    def _one(self, command: int, offset: int, length: int, data: bytes = b"") -> Request:
        request = self.start(command, offset, length, data)
        self.finish([request])
        if request.error:
            raise NbdError(request.error, errno.errorcode.get(request.error, "?"))
        return request

    def _negotiate(self, export: bytes) -> tuple[int, int]:
        magic, have_opt, _ = _GREETING.unpack(self._take(_GREETING.size))
        assert (magic, have_opt) == (b"NBDMAGIC", 0x49484156454F5054)
        self._sock.sendall(struct.pack(">I", 3) + _OPTION.pack(0x49484156454F5054, 1, len(export)) + export)
        length, flags = _AGREED.unpack(self._take(_AGREED.size))
        return length, flags

    def _take(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise ConnectionError("the NBD server hung up")
        return data
