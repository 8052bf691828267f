"""What a server says to our client before it has the export.

byte 0      bit 0: the client wants TLS
byte 1      bytes of a piece, 0 for all at once
the rest    from the greeting on
"""

from __future__ import annotations

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.handshake_client import Agreement, ClientHandshake
from tests.fuzz.script import Script, pieces, told

_REPLY = protocol.OPTION_REPLY_MAGIC.to_bytes(8)
WORDS = (
    b"NBDMAGICIHAVEOPT\0\3",
    *(_REPLY + number.to_bytes(4) for number in (3, 5, 7, 8, 10)),
    *(kind.to_bytes(4) for kind in protocol.OptionReply),
    b"\0\0\0\x13\0\0\0\1base:allocation",
)
MAX_LENGTH = 2048


def check(data: bytes) -> None:
    """It ends in an agreement that makes sense, in a told error, or asks for more; in any pieces alike."""
    script = Script(data)
    tls, step = bool(script.number() & 1), script.number()
    said = script.rest()
    whole, cut = _shake(said, 0, tls), _shake(said, step, tls)
    # What comes behind the answer to STARTTLS at once is a lie, what comes later is TLS.
    assert tls or whole == cut, "what arrives in pieces is understood in another way"


def _shake(data: bytes, step: int, tls: bool) -> tuple[Agreement | None, Kind | None, bytes]:
    handshake = ClientHandshake("disk0", tls=tls)
    rest = b""
    try:
        for piece in pieces(data, step):
            if handshake.agreed is not None:
                rest += piece
                continue
            if handshake.wants_tls:
                handshake.secured()
            said = handshake.receive(piece)
            assert len(said) < 200 + len(piece) * 8
    except Error as error:
        told(error, Kind.PEER_LIED, Kind.NOT_FOUND, Kind.PERMISSION, Kind.UNSUPPORTED)
        return None, error.kind, b""
    agreed = handshake.agreed
    if agreed is not None:
        assert 0 <= agreed.length < 1 << 63
        assert 1 <= agreed.minimum <= agreed.maximum <= protocol.MAX_REQUEST
        assert agreed.maximum % agreed.minimum == 0
        assert agreed.allocation_id is None or agreed.structured
        return agreed, None, handshake.rest + rest
    assert len(handshake.rest) <= protocol.OPTION_REPLY.size + protocol.MAX_OPTION
    return None, None, b""
