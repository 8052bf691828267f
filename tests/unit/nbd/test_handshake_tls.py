"""STARTTLS in both halves of the handshake: nothing is told, and nothing is kept, before TLS."""

from __future__ import annotations

import struct

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.handshake import ServerHandshake
from tcmu_replication.nbd.handshake_client import ClientHandshake
from tcmu_replication.nbd.protocol import OptionReply
from tests.unit.nbd.test_handshake import FIXED, OFFERS, contexts, name_and_infos, option, reply
from tests.unit.nbd.test_handshake_client import GREETING

STARTTLS = option(5)
GO = option(7, name_and_infos("disk0"))


def secured(*before: bytes) -> ServerHandshake:
    """The server's handshake behind TLS, after a client said `before` in plain text."""
    handshake = ServerHandshake(lambda: OFFERS, tls=True)
    for said in (FIXED, *before, STARTTLS):
        handshake.receive(said)
    assert handshake.wants_tls
    return handshake.secured()


EVERY_OPTION = {
    "list": option(3),
    "info": option(6, name_and_infos("disk0")),
    "go": GO,
    "structured replies": option(8),
    "listing contexts": option(9, contexts("disk0")),
    "setting contexts": option(10, contexts("disk0", "base:allocation")),
    "an unknown one": option(99, b"data"),
}


@pytest.mark.parametrize("row", EVERY_OPTION)
def test_every_option_before_tls_is_refused_alike(row: str) -> None:
    handshake = ServerHandshake(lambda: OFFERS, tls=True)
    answer = handshake.receive(FIXED + EVERY_OPTION[row])
    assert struct.unpack_from(">I", answer, 12)[0] == OptionReply.ERR_TLS_REQD
    assert b"disk0" not in answer
    assert not handshake.over
    handshake.receive(STARTTLS)
    assert handshake.wants_tls


def test_export_name_before_tls_hangs_up() -> None:
    with pytest.raises(Error, match="without TLS") as caught:
        ServerHandshake(lambda: OFFERS, tls=True).receive(FIXED + option(1, b"disk0"))
    assert caught.value.kind is Kind.PERMISSION


def test_abort_before_tls_ends_it() -> None:
    handshake = ServerHandshake(lambda: OFFERS, tls=True)
    assert handshake.receive(FIXED + option(2)) == reply(2, 1)
    assert handshake.over
    assert not handshake.wants_tls


@pytest.mark.parametrize("injected", [b"x", GO, option(8)], ids=["garbage", "go", "structured replies"])
def test_plain_text_behind_starttls_hangs_up(injected: bytes) -> None:
    handshake = ServerHandshake(lambda: OFFERS, tls=True)
    with pytest.raises(Error, match=f"{len(injected)} bytes behind STARTTLS") as caught:
        handshake.receive(FIXED + STARTTLS + injected)
    assert caught.value.kind is Kind.PEER_LIED


def test_what_was_said_in_plain_text_is_forgotten() -> None:
    handshake = secured(option(8), option(10, contexts("disk0", "base:allocation")))
    handshake.receive(GO)
    assert handshake.agreed is not None
    assert not handshake.agreed.structured
    assert not handshake.agreed.allocation


def test_starttls_inside_of_tls_is_refused() -> None:
    handshake = secured()
    answer = handshake.receive(STARTTLS)
    assert struct.unpack_from(">I", answer, 12)[0] == OptionReply.ERR_INVALID
    handshake.receive(GO)
    assert handshake.agreed is not None


def test_both_halves_agree_with_tls_between() -> None:
    client, server = ClientHandshake("disk0", tls=True), ServerHandshake(lambda: OFFERS, tls=True)
    answer = server.receive(client.receive(server.greeting()))
    assert client.receive(answer) == b""
    assert client.wants_tls
    assert server.wants_tls
    server, to_server = server.secured(), client.secured()
    while client.agreed is None:
        to_server = client.receive(server.receive(to_server))
    assert server.agreed is not None
    assert client.agreed.structured
    assert client.agreed.allocation_id == 1


REFUSALS = {
    "policy": (reply(5, 0x80000002, b"no TLS here"), Kind.PERMISSION, "no TLS here"),
    "unknown": (reply(5, 0x80000001), Kind.PERMISSION, "has no TLS"),
    "bytes in front of TLS": (reply(5, 1) + reply(8, 1), Kind.PEER_LIED, "20 bytes of the server in front"),
    "an answer that makes no sense": (reply(5, 2), Kind.PEER_LIED, "reply of type 2"),
}


@pytest.mark.parametrize("row", REFUSALS)
def test_client_goes_on_without_tls_never(row: str) -> None:
    said, kind, text = REFUSALS[row]
    client = ClientHandshake("disk0", tls=True)
    assert client.receive(GREETING) == FIXED + STARTTLS
    with pytest.raises(Error, match=text) as caught:
        client.receive(said)
    assert caught.value.kind is kind


def test_client_with_tls_refuses_a_server_too_old_for_it() -> None:
    with pytest.raises(Error, match="too old for TLS") as caught:
        ClientHandshake("disk0", tls=True).receive(b"NBDMAGICIHAVEOPT\0\0")
    assert caught.value.kind is Kind.UNSUPPORTED


def test_client_without_tls_is_told_that_the_server_wants_it() -> None:
    client, server = ClientHandshake("disk0"), ServerHandshake(lambda: OFFERS, tls=True)
    answer = server.receive(client.receive(server.greeting()))
    with pytest.raises(Error, match="it wants TLS, which is not set up here") as caught:
        client.receive(answer)
    assert caught.value.kind is Kind.PERMISSION
