"""The control channel of version 0.1.0, which spoke protocol 2 and knew no greeting, byte for byte.

Recorded between two workers of that version, and written down by hand: nothing here
imports the project, so nothing that changes there changes this. `Secondary` answers as
that version did, and refuses as it did what it did not know; `Primary` asks as it did.
The disk's data goes over NBD beside it, as ever.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

QMP = (
    b'{"QMP":{"version":{"qemu":{"major":0,"minor":1,"micro":0},"package":"tcmu-replication 0.1.0"},'
    b'"capabilities":["oob"]}}\r\n'
)
NEGOTIATE = b'{"execute":"qmp_capabilities","arguments":{},"id":1}\r\n'
NEGOTIATED = b'{"return":{},"id":1}\r\n'

TAKES = {
    "peer-hello": {
        "resource", "protocol", "generation", "settled", "verified", "outdated-since", "reason",
        "missed-bytes", "disk-error",
    },
    "peer-prepare": {"epoch"},
    "peer-checkpoint": {"epoch", "settled", "name"},
    "peer-digests": {"offset", "length", "piece"},
}  # fmt: skip
"""The members that each command took; another was an error."""
STATE = (
    b'{"return":{"stage":"%s","epoch":%d,"generation":"%s","length":%d,"error":null,"checkpoint-name":"%s",'
    b'"paired":%s,"promoted-at":"","settled":%d},"id":%d}\r\n'
)
DONE = b'{"return":{},"id":%d}\r\n'
NOT_FOUND = (
    b'{"error":{"class":"CommandNotFound","desc":"The command %s has not been found","data":{"kind":"unsupported"}},'
    b'"id":%d}\r\n'
)
UNEXPECTED = (
    b'{"error":{"class":"GenericError","desc":"Parameter \'%s\' is unexpected","data":{"kind":"bad-request"}},'
    b'"id":%d}\r\n'
)
WRONG_PROTOCOL = (
    b'{"error":{"class":"GenericError","desc":"protocol %d is not spoken here, only 2; run the same version on both '
    b'hosts","data":{"kind":"unsupported"}},"id":%d}\r\n'
)


class Secondary:
    """The control port of a running secondary of `length` bytes, started and not paired; use as a context.

    `asked` has each command's name and arguments, `refused` what it had to refuse.
    """

    def __init__(self, address: str, port: int, length: int) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.refused: list[bytes] = []
        self._length = length
        self._epoch, self._name, self._settled, self._paired = 1, "", 0, False
        self._generation = "c5ca686c-a0c1-47db-b353-f6a517d23e47"
        self._listener = socket.create_server((address, port))
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Secondary:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    @property
    def hellos(self) -> list[dict[str, Any]]:
        """The arguments of each hello."""
        return [arguments for command, arguments in self.asked if command == "peer-hello"]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(QMP)
            for line in sock.makefile("rb"):
                if line == NEGOTIATE:
                    sock.sendall(NEGOTIATED)
                    continue
                request = json.loads(line)
                answer = self.answer(request["execute"], request["arguments"], request["id"])
                if b'"error":{' in answer:
                    self.refused.append(answer)
                sock.sendall(answer)

    def answer(self, command: str, arguments: dict[str, Any], id: int) -> bytes:
        """What that version answers, as it is sent."""
        self.asked.append((command, arguments))
        if command not in TAKES:
            return NOT_FOUND % (command.encode(), id)
        for name in arguments:
            if name not in TAKES[command]:
                return UNEXPECTED % (name.encode(), id)
        match command:
            case "peer-prepare":
                return DONE % id
            case "peer-digests":
                zero = ",".join(['""'] * -(-arguments["length"] // arguments["piece"]))
                return b'{"return":{"digests":[%s]},"id":%d}\r\n' % (zero.encode(), id)
            case "peer-hello" if arguments["protocol"] != 2:
                return WRONG_PROTOCOL % (arguments["protocol"], id)
            case "peer-hello":
                self._paired = self._paired or "generation" in arguments
                self._settled += arguments.get("settled", False)
            case _:
                self._epoch, self._name = arguments["epoch"] + 1, arguments["name"]
        paired = b"true" if self._paired else b"false"
        state = (
            b"running",
            self._epoch,
            self._generation.encode(),
            self._length,
            self._name.encode(),
            paired,
        )
        return STATE % (*state, self._settled, id)


class Primary:
    """A control connection of a primary, from `source` to the secondary's `address`; use as a context."""

    def __init__(self, source: str, address: str, port: int) -> None:
        self._sock = socket.create_connection((address, port), source_address=(source, 0))
        self._lines = self._sock.makefile("rb")
        self._id = 1
        assert json.loads(self._lines.readline())["QMP"]
        self._sock.sendall(NEGOTIATE)
        assert self._lines.readline() == NEGOTIATED

    def __enter__(self) -> Primary:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        self._sock.close()

    def ask(self, command: str, arguments: str) -> bytes:
        """A command with its arguments as they are sent; the answer as it came, but for the id."""
        self._id += 1
        self._sock.sendall(f'{{"execute":"{command}","arguments":{arguments},"id":{self._id}}}\r\n'.encode())
        line = self._lines.readline()
        assert line.endswith(b',"id":%d}\r\n' % self._id), line
        return line.replace(b',"id":%d}\r\n' % self._id, b"}")
