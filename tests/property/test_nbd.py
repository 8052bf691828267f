"""Nothing that a peer can send makes our NBD code fail in any way but a told one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import transmission
from tcmu_replication.nbd.handshake import ServerHandshake
from tcmu_replication.nbd.handshake_client import ClientHandshake
from tests.unit.nbd.test_handshake import FIXED, OFFERS, option, reply

TOLD = {Kind.PEER_LIED, Kind.NOT_FOUND, Kind.PERMISSION, Kind.UNSUPPORTED}

options = st.builds(option, st.integers(0, 12), st.binary(max_size=40))
replies = st.builds(
    reply,
    st.sampled_from([3, 5, 7, 8, 10]),
    st.sampled_from([1, 2, 3, 4, *range(0x80000001, 0x8000000B)]),
    st.binary(max_size=40),
)
pieces = st.integers(1, 64)


def told(error: Error, kinds: set[Kind]) -> None:
    assert error.kind in kinds
    assert error.detail


@given(st.lists(options | st.binary(max_size=40), max_size=8), pieces, st.booleans())
def test_server_handshake_survives_any_client(parts: list[bytes], step: int, tls: bool) -> None:
    handshake = ServerHandshake(lambda: OFFERS, tls=tls)
    data = FIXED + b"".join(parts)
    try:
        for start in range(0, len(data), step):
            handshake.receive(data[start : start + step])
            if handshake.over:
                break
    except Error as error:
        told(error, {Kind.PEER_LIED, Kind.PERMISSION if tls else Kind.NOT_FOUND})
    assert not (tls and handshake.agreed)


@given(st.lists(replies | st.binary(max_size=40), max_size=8), pieces, st.booleans())
def test_client_handshake_survives_any_server(parts: list[bytes], step: int, tls: bool) -> None:
    handshake = ClientHandshake("disk0", tls=tls)
    data = b"NBDMAGICIHAVEOPT\0\x03" + b"".join(parts)
    try:
        for start in range(0, len(data), step):
            handshake.receive(data[start : start + step])
            if handshake.agreed is not None:
                break
    except Error as error:
        told(error, TOLD)
    assert not (tls and handshake.agreed)


@given(st.binary(max_size=64), st.sampled_from([b"", b"\x25\x60\x95\x13"]))
def test_request_is_parsed_or_a_lie(garbage: bytes, magic: bytes) -> None:
    data = bytearray(magic + garbage)
    try:
        parsed = transmission.parse_request(data, 0, len(data))
    except Error as error:
        told(error, {Kind.PEER_LIED})
    else:
        assert (parsed is None) == (len(data) < transmission.REQUEST_SIZE)


@given(st.binary(max_size=64), st.sampled_from([b"", b"\x67\x44\x66\x98", b"\x66\x8e\x33\xef"]))
def test_reply_is_parsed_or_a_lie(garbage: bytes, magic: bytes) -> None:
    data = bytearray(magic + garbage)
    try:
        parsed = transmission.parse_reply(data, 0, len(data))
    except Error as error:
        told(error, {Kind.PEER_LIED})
    else:
        assert parsed is not None or len(data) < transmission.STRUCTURED_SIZE


@given(st.binary(max_size=64), st.integers(0x8001, 0x8003))
def test_chunks_are_parsed_or_lies(garbage: bytes, kind: int) -> None:
    view = memoryview(garbage)
    for parse in (
        lambda: transmission.parse_error_chunk(kind, view),
        lambda: transmission.parse_hole_chunk(view),
        lambda: transmission.parse_status_chunk(view, 1),
    ):
        try:
            parse()
        except Error as error:
            told(error, {Kind.PEER_LIED})
