"""What an end says that is to prove the shared secret of a link.

byte 0      bit 0: we are the client; bit 1: the secret is not known to whoever speaks
byte 1      bytes of a piece, 0 for all at once
the rest    from the hello on
"""

from __future__ import annotations

from tcmu_replication.errors import Kind
from tcmu_replication.secret import HELLO, MAC, MAGIC, Proof, Secret
from tests.fuzz.script import Script, pieces, told

KNOWN = b"k" * 32
NONCE = {"client": b"c" * 32, "server": b"s" * 32}
_THERE = Secret(lambda: KNOWN, "disk0", "nbd")


def rest_of(role: str) -> bytes:
    """What a good peer of `role` says, whole."""
    client, server = _THERE.proof("client", NONCE["client"]), _THERE.proof("server", NONCE["server"])
    mac = client.receive(server.hello)
    server.receive(client.hello)
    return client.hello + mac if role == "client" else server.hello + server.receive(mac)


WORDS = (
    MAGIC,
    MAGIC + NONCE["client"],
    rest_of("client"),
    rest_of("server"),
    b"NBDMAGIC",
    b'{"QMP"',
    b"\x15\3",
)
MAX_LENGTH = 256


def check(data: bytes) -> None:
    """It wants no more than a proof has, ends in a told error unless every byte is right, in any pieces alike."""
    script = Script(data)
    flags, step = script.number(), script.number()
    said = script.rest()
    role, theirs = ("client", "server") if flags & 1 else ("server", "client")
    known = not flags & 2
    whole, cut = _feed(said, 0, role, known), _feed(said, step, role, known)
    assert whole[:2] == cut[:2], "what arrives in pieces is understood in another way"
    right = rest_of(theirs)
    believed = whole[:2] == (True, None)
    assert believed == (known and said.startswith(right)), "who does not know the secret is believed"


def _feed(said: bytes, step: int, role: str, known: bool) -> tuple[bool, Kind | None, int]:
    """Whether it is over, with which error, and how much was answered."""
    key = KNOWN if known else b"another" * 3
    proof = Proof(key, "disk0", "nbd", "client" if role == "client" else "server", NONCE[role])
    answered = 0
    for piece in pieces(said, step):
        while piece and proof.wanted:
            assert proof.wanted <= max(HELLO, 1 + MAC)
            now, piece = piece[: proof.wanted], piece[proof.wanted :]
            answered += len(proof.receive(now))
    assert answered <= 1 + MAC
    if proof.failed is not None:
        assert not proof.wanted
        told(proof.failed, Kind.PERMISSION)
        if role == "server":
            assert answered <= 1, "a stranger got something that was made with the secret"
    return not proof.wanted, proof.failed.kind if proof.failed else None, answered
