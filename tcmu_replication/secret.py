"""The shared secret of a link: each end proves to the other that it knows it, before anything else is said.

    both           MAGIC, nonce                        at once, on the TCP connection, before TLS and any greeting
    client         HMAC of both nonces as "client"
    server         1, HMAC of both nonces as "server"   or 0: it does not believe the client

The MAC (HMAC-SHA-256, RFC 2104) covers who says it, the port's purpose and the resource's name, so that no proof is
good for the other direction, the other port or another disk; and a nonce of each end, so that none is good twice.
Whoever does not know the secret gets nothing that was made with it from the server.

What follows is not encrypted. That, and that nobody on the way takes the connection over, takes TLS.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tcmu_replication.errors import Error, Kind

MAGIC = b"TCMUKEY\1"
"""The last byte is the version."""
NONCE = 32
MAC = 32
HELLO = len(MAGIC) + NONCE
_YES, _NO = b"\1", b"\0"

MISSING_HERE = (
    "it asks for a shared secret, and this end has none: set `secret` in [link] of the resource file here"
)
MISSING_THERE = (
    "it knows of no shared secret, and this end has one: set `secret` in [link] of the resource file there"
)
DIFFERENT = (
    "the shared secrets of the two ends differ, or the resource's names; `secret` in [link] is the file"
)


Port = Literal["nbd", "control"]
Role = Literal["client", "server"]


@dataclass(frozen=True)
class Secret:
    """The secret of resource `resource` for one of its ports. `read` gives it, anew for each connection."""

    read: Callable[[], bytes]
    resource: str
    port: Port

    def proof(self, role: Role, nonce: bytes | None = None) -> Proof:
        """This end's half for one connection; `nonce` is for tests. Raises what `read` does."""
        made = secrets.token_bytes(NONCE) if nonce is None else nonce
        return Proof(self.read(), self.resource, self.port, role, made)


class Proof:
    """One end's half: send `hello`, then feed `receive` with at most `wanted` bytes and send what it returns.

    It is over when `wanted` is 0: the other end knows the secret, or `failed` says what is wrong.
    """

    def __init__(self, key: bytes, resource: str, port: Port, role: Role, nonce: bytes) -> None:
        assert len(nonce) == NONCE
        self._key = key
        self._about = f"{port}\0{resource}\0".encode()
        self._role = role
        self._nonce = nonce
        self._theirs = b""
        self._received = b""
        self.hello = MAGIC + nonce
        self.wanted = HELLO
        self.failed: Error | None = None

    def receive(self, data: bytes) -> bytes:
        """Take bytes of the other end, b"" if it has hung up; returns what to send, even if it has `failed`."""
        assert self.wanted > 0
        assert len(data) <= self.wanted
        if not data:
            return self._fail(Kind.PEER_LOST, self._hung_up())
        self._received += data
        self.wanted -= len(data)
        if not self._theirs and not MAGIC.startswith(self._received[: len(MAGIC)]):
            return self._fail(Kind.PERMISSION, _other_language(self._received))
        if self._role == "client" and self._theirs and self._received[:1] != _YES:
            return self._fail(Kind.PERMISSION, DIFFERENT)
        if self.wanted:
            return b""
        received, self._received = self._received, b""
        if not self._theirs:
            return self._meet(received[len(MAGIC) :])
        if self._role == "client":
            return self._check_server(received[1:])
        return self._check_client(received)

    def _meet(self, nonce: bytes) -> bytes:
        self._theirs = nonce
        if self._role == "server":
            self.wanted = MAC
            return b""
        self.wanted = 1 + MAC
        return self._mac("client")

    def _check_client(self, mac: bytes) -> bytes:
        if hmac.compare_digest(mac, self._mac("client")):
            return _YES + self._mac("server")
        return _NO + self._fail(Kind.PERMISSION, DIFFERENT)

    def _check_server(self, mac: bytes) -> bytes:
        if hmac.compare_digest(mac, self._mac("server")):
            return b""
        return self._fail(Kind.PERMISSION, DIFFERENT)

    def _mac(self, role: Role) -> bytes:
        client, server = (
            (self._nonce, self._theirs) if self._role == "client" else (self._theirs, self._nonce)
        )
        # The words have no NUL and the nonces one length: no two ways to read it.
        return hmac.digest(self._key, MAGIC + f"{role}\0".encode() + self._about + client + server, "sha256")

    def _fail(self, kind: Kind, why: str) -> bytes:
        self.failed = Error(kind, why)
        self.wanted = 0
        return b""

    def _hung_up(self) -> str:
        if not self._theirs and not self._received:
            return (
                "it hung up instead of proving that it knows the shared secret; `secret` may be missing there"
            )
        return "it hung up before it had proved that it knows the shared secret"


def refuse_if_asked(greeting: bytes) -> None:
    """Raise PERMISSION if `greeting`, the first bytes of a server, asks for a secret, and this end has none."""
    if greeting.startswith(MAGIC):
        raise Error(Kind.PERMISSION, MISSING_HERE)


_LANGUAGES = (b"NBDMAGIC", b'{"QMP"', b'{"execute"', b"\x15\3", b"\x16\3")
"""How those begin who know of no secret: NBD's and QMP's greetings, a QMP client, TLS's alert and handshake."""


def _other_language(received: bytes) -> str:
    head = received[:8]
    if any(head.startswith(word) or word.startswith(head) for word in _LANGUAGES):
        return MISSING_THERE
    return f"it began with {head!r}, which is no proof of a shared secret"
