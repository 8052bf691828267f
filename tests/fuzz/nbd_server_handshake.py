"""What a client says to our server before it has an export.

byte 0      bit 0: the listener has TLS; bit 1: it has one export
byte 1      bytes of a piece, 0 for all at once
the rest    from the client's flags on
"""

from __future__ import annotations

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.handshake import Offer, ServerHandshake
from tests.fuzz.script import Script, pieces, told

WORDS = (
    b"\0\0\0\3IHAVEOPT",
    *(b"IHAVEOPT" + number.to_bytes(4) for number in range(1, 12)),
    b"\0\0\0\5disk0",
    b"\0\0\0\x0fbase:allocation",
    b"\0\0\0\5base:",
)
MAX_LENGTH = 2048

_OFFERS = {
    "disk0": Offer("disk0", 1 << 30, 0x16D, "first"),
    "disk1": Offer("disk1", 512, 0x16F),
}
_LONGEST_REPLY = 24 + protocol.MAX_STRING
_REPLIES_TO_ONE = 8


def check(data: bytes) -> None:
    """Every option is answered, in any pieces alike, or the handshake ends; before TLS nothing is told."""
    script = Script(data)
    flags, step = script.number(), script.number()
    said = script.rest()
    whole, cut = _shake(said, 0, flags), _shake(said, step, flags)
    # What comes behind STARTTLS at once is a lie, what comes later is TLS.
    assert flags & 1 or whole == cut, "what arrives in pieces is answered in another way"


def _shake(data: bytes, step: int, flags: int) -> tuple[bytes, bool, bytes]:
    """What was answered, whether it was an error that ended it, and what was left for transmission."""
    tls = bool(flags & 1)
    offers = {"disk0": _OFFERS["disk0"]} if flags & 2 else _OFFERS
    handshake = ServerHandshake(lambda: offers, tls=tls)
    answers = bytearray()
    rest = b""
    failed = False
    try:
        for piece in pieces(data, step):
            if handshake.over:
                rest += piece
                continue
            answer = handshake.receive(piece)
            assert len(answer) <= (1 + len(piece) // protocol.OPTION.size) * _REPLIES_TO_ONE * _LONGEST_REPLY
            answers += answer
            assert len(handshake.rest) <= protocol.OPTION.size + protocol.MAX_OPTION + len(piece)
    except Error as error:
        told(error, Kind.PEER_LIED, Kind.PERMISSION if tls else Kind.NOT_FOUND)
        failed = True
    if tls:
        assert handshake.agreed is None
        assert b"disk1" not in answers or b"disk1" in data
    assert not handshake.over or not failed
    if failed:
        # How much was answered before the lie depends on the pieces.
        return b"", True, b""
    if handshake.wants_tls:
        inside = handshake.secured()
        try:
            inside.receive(rest)
        except Error as error:
            told(error, Kind.PEER_LIED, Kind.NOT_FOUND)
        assert not inside.wants_tls
    _well_formed(answers, handshake)
    return bytes(answers), False, handshake.rest + rest


def _well_formed(answers: bytearray, handshake: ServerHandshake) -> None:
    """The answers are option replies, until an EXPORT_NAME's."""
    at = 0
    while at < len(answers):
        magic, _, _, length = protocol.OPTION_REPLY.unpack_from(answers.ljust(at + 20, b"\0"), at)
        if magic != protocol.OPTION_REPLY_MAGIC:
            assert handshake.agreed is not None
            assert len(answers) - at in (10, 134)
            return
        assert length <= protocol.MAX_STRING
        at += protocol.OPTION_REPLY.size + length
    assert at == len(answers)
