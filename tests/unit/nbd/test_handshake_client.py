"""The client's half of the handshake: against our server's half, and against servers that are old or lie."""

from __future__ import annotations

import struct

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.handshake import Offer, ServerHandshake
from tcmu_replication.nbd.handshake_client import ClientHandshake
from tests.unit.nbd.test_handshake import OFFERS, reply, string

GREETING = b"NBDMAGICIHAVEOPT\0\x03"
EXPORT = struct.pack(">HQH", 0, 4096, 0x6D)
GO_ON = GREETING + reply(8, 1) + reply(10, 4, b"\0\0\0\x07base:allocation") + reply(10, 1)


def converse(client: ClientHandshake, server: ServerHandshake, step: int) -> None:
    """Carry bytes both ways until the client is done."""
    to_client, to_server = server.greeting(), b""
    while client.agreed is None:
        assert to_client, "both wait for the other"
        while to_client and client.agreed is None:
            to_server += client.receive(to_client[:step])
            to_client = to_client[step:]
        if client.agreed is None:
            to_client += server.receive(to_server)
            to_server = b""


@pytest.mark.parametrize("step", [1, 1 << 20], ids=["byte by byte", "whole"])
def test_client_agrees_with_our_server(step: int) -> None:
    client, server = ClientHandshake("disk0"), ServerHandshake(lambda: OFFERS)
    converse(client, server, step)
    assert client.agreed is not None
    assert (client.agreed.length, client.agreed.flags) == (1 << 30, 0x16D)
    assert client.agreed.structured
    assert client.agreed.allocation_id == 1
    assert (client.agreed.minimum, client.agreed.maximum) == (1, 32 << 20)
    assert server.agreed is not None
    assert server.agreed.allocation


def test_missing_export_is_told_with_those_that_exist() -> None:
    with pytest.raises(Error, match="no export 'disk9'; it offers 'disk0', 'disk1'") as caught:
        converse(ClientHandshake("disk9"), ServerHandshake(lambda: OFFERS), 1 << 20)
    assert caught.value.kind is Kind.NOT_FOUND


def test_many_exports_are_not_all_told() -> None:
    offers = {f"d{n}": Offer(f"d{n}", 1, 1) for n in range(1000)}
    with pytest.raises(Error) as caught:
        converse(ClientHandshake("disk9"), ServerHandshake(lambda: offers), 1 << 20)
    assert "'d9'" in caught.value.detail
    assert "'d10'" not in caught.value.detail


SERVERS = {
    "newstyle that is not fixed": (b"NBDMAGICIHAVEOPT\0\0" + struct.pack(">QH", 512, 1) + bytes(124), False),
    "no structured replies": (GREETING + reply(8, 0x80000001) + reply(7, 3, EXPORT) + reply(7, 1), False),
    "no contexts": (GREETING + reply(8, 1) + reply(10, 1) + reply(7, 3, EXPORT) + reply(7, 1), True),
    "contexts unsupported": (
        GREETING + reply(8, 1) + reply(10, 0x80000001) + reply(7, 3, EXPORT) + reply(7, 1),
        True,
    ),
    "no GO": (GREETING + reply(8, 0x80000001) + reply(7, 0x80000001) + struct.pack(">QH", 512, 1), False),
}


@pytest.mark.parametrize("row", SERVERS)
@pytest.mark.parametrize("step", [1, 1 << 20], ids=["byte by byte", "whole"])
def test_server_with_fewer_abilities_will_do(row: str, step: int) -> None:
    said, structured = SERVERS[row]
    client = ClientHandshake("disk0")
    said += b"!"
    while client.agreed is None:
        client.receive(said[:step])
        said = said[step:]
    assert client.rest + said == b"!"
    assert client.agreed.structured is structured
    assert client.agreed.allocation_id is None


def feed(client: ClientHandshake, said: bytes, step: int) -> None:
    for start in range(0, len(said), step):
        client.receive(said[start : start + step])


LIES = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "greeting without its second magic": b"NBDMAGICNBDMAGIC\0\x03",
    "reply without magic": GREETING + bytes(20),
    "reply to another option": GREETING + reply(7, 1),
    "reply too long": GREETING + bytes.fromhex("0003e889045565a9") + struct.pack(">III", 8, 1, 1 << 20),
    "reply of a type that makes no sense": GREETING + reply(8, 2),
    "another context": GREETING + reply(8, 1) + reply(10, 4, b"\0\0\0\x07qemu:allocation-depth"),
    "agreement without a length": GO_ON + reply(7, 1),
    "information too short": GO_ON + reply(7, 3, b"\0"),
    "export information too short": GO_ON + reply(7, 3, EXPORT[:-1]),
    "minimum of 0": GO_ON + reply(7, 3, struct.pack(">HIII", 3, 0, 1, 1)),
    "minimum of 3": GO_ON + reply(7, 3, struct.pack(">HIII", 3, 3, 4096, 4096)),
    "maximum below the minimum": GO_ON + reply(7, 3, struct.pack(">HIII", 3, 4096, 4096, 512)),
    "length beyond 63 bits": GO_ON + reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)) + reply(7, 1),
    "list entry that is not UTF-8": GO_ON + reply(7, 0x80000006) + reply(3, 2, b"\0\0\0\x01\xff"),
}


@pytest.mark.parametrize("row", LIES)
@pytest.mark.parametrize("step", [1, 1 << 20], ids=["byte by byte", "whole"])
def test_server_that_lies(row: str, step: int) -> None:
    client = ClientHandshake("disk0")
    said = LIES[row]
    with pytest.raises(Error) as caught:
        feed(client, said, step)
    assert caught.value.kind is Kind.PEER_LIED


REFUSALS = {
    "TLS wanted": (GREETING + reply(8, 0x80000005, b"use TLS"), Kind.PERMISSION, "use TLS"),
    "policy": (GO_ON + reply(7, 0x80000002, b"not you"), Kind.PERMISSION, "not you"),
    "shutting down": (GO_ON + reply(7, 0x80000007), Kind.PERMISSION, "ERR_SHUTDOWN"),
    "block size wanted": (GO_ON + reply(7, 0x80000008), Kind.UNSUPPORTED, "0x80000008"),
    "not listed": (GO_ON + reply(7, 0x80000006) + reply(3, 0x80000001), Kind.NOT_FOUND, "disk0"),
    "oldstyle": (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(136), Kind.UNSUPPORTED, "old"),
    "huge blocks": (
        GO_ON + reply(7, 3, struct.pack(">HIII", 3, 1 << 30, 1 << 30, 1 << 30)),
        Kind.UNSUPPORTED,
        "1073741824",
    ),
}


@pytest.mark.parametrize("row", REFUSALS)
def test_server_that_refuses(row: str) -> None:
    said, kind, text = REFUSALS[row]
    with pytest.raises(Error, match=text) as caught:
        ClientHandshake("disk0").receive(said)
    assert caught.value.kind is kind


def test_block_sizes_of_the_server_are_taken() -> None:
    client = ClientHandshake("disk0")
    blocks = reply(7, 3, struct.pack(">HIII", 3, 512, 4096, 1 << 20))
    client.receive(GO_ON + reply(7, 3, EXPORT) + blocks + reply(7, 3, b"\0\x63new") + reply(7, 1))
    assert client.agreed is not None
    assert (client.agreed.minimum, client.agreed.maximum) == (512, 1 << 20)
    assert client.agreed.allocation_id == 7


def test_listing_is_read_from_a_server_that_describes() -> None:
    listed = reply(3, 2, string("a") + b"its description") + reply(3, 1)
    with pytest.raises(Error, match=r"it offers 'a'\Z"):
        ClientHandshake("disk0").receive(GO_ON + reply(7, 0x80000006) + listed)
