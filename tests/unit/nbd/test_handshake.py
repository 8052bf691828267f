"""The server's half of the handshake, by rows of (what the client sends, what it must get)."""

from __future__ import annotations

import struct

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.handshake import Offer, ServerHandshake
from tcmu_replication.nbd.protocol import Option, OptionReply

GIB = 1 << 30
OFFERS = {
    "disk0": Offer("disk0", GIB, 0x16D, "first"),
    "disk1": Offer("disk1", 512, 0x16F),
}
ONE = {"disk0": OFFERS["disk0"]}

FIXED = b"\0\0\0\x03"
"""The client's flags of every real client: fixed newstyle, no zeroes."""


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", number, kind, len(data)) + data


def string(text: str) -> bytes:
    return struct.pack(">I", len(text)) + text.encode()


def name_and_infos(name: str, *infos: int) -> bytes:
    return string(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def contexts(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


EXPORT0 = struct.pack(">HQH", 0, GIB, 0x16D)
BLOCKS = struct.pack(">HIII", 3, 1, 4096, 32 << 20)
STRUCTURED = option(8)
STRUCTURED_OK = reply(8, 1)

ROWS = {
    "go": (
        FIXED + option(7, name_and_infos("disk0")),
        reply(7, 3, EXPORT0) + reply(7, 3, BLOCKS) + reply(7, 1),
    ),
    "go with every information": (
        FIXED + option(7, name_and_infos("disk0", 1, 2, 3)),
        reply(7, 3, EXPORT0)
        + reply(7, 3, BLOCKS)
        + reply(7, 3, b"\0\x01disk0")
        + reply(7, 3, b"\0\x02first")
        + reply(7, 1),
    ),
    "info then abort": (
        FIXED + option(6, name_and_infos("disk0")) + option(2),
        reply(6, 3, EXPORT0) + reply(6, 3, BLOCKS) + reply(6, 1) + reply(2, 1),
    ),
    "list then abort": (
        FIXED + option(3) + option(2),
        reply(3, 2, string("disk0") + b"first") + reply(3, 2, string("disk1")) + reply(3, 1) + reply(2, 1),
    ),
    "export name": (FIXED + option(1, b"disk0"), struct.pack(">QH", GIB, 0x16D)),
    "export name with zeroes": (
        b"\0\0\0\x01" + option(1, b"disk0"),
        struct.pack(">QH", GIB, 0x16D) + bytes(124),
    ),
    "export name from a client of the plain newstyle": (
        b"\0\0\0\0" + option(1, b"disk0"),
        struct.pack(">QH", GIB, 0x16D) + bytes(124),
    ),
    "contexts listed, all": (
        FIXED + STRUCTURED + option(9, contexts("disk0")) + option(2),
        STRUCTURED_OK + reply(9, 4, b"\0\0\0\0base:allocation") + reply(9, 1) + reply(2, 1),
    ),
    "contexts listed, a namespace": (
        FIXED + STRUCTURED + option(9, contexts("disk0", "base:")) + option(2),
        STRUCTURED_OK + reply(9, 4, b"\0\0\0\0base:allocation") + reply(9, 1) + reply(2, 1),
    ),
    "contexts listed, an unknown one": (
        FIXED + STRUCTURED + option(9, contexts("disk0", "qemu:dirty-bitmap:b")) + option(2),
        STRUCTURED_OK + reply(9, 1) + reply(2, 1),
    ),
    "context set": (
        FIXED + STRUCTURED + option(10, contexts("disk0", "base:allocation", "x:y")) + option(2),
        STRUCTURED_OK + reply(10, 4, b"\0\0\0\x01base:allocation") + reply(10, 1) + reply(2, 1),
    ),
}


def feed(data: bytes, step: int) -> tuple[ServerHandshake, bytes]:
    handshake = ServerHandshake(lambda: OFFERS)
    answer = b""
    while data and not handshake.over:
        answer += handshake.receive(data[:step])
        data = data[step:]
    return handshake, answer


def test_greeting_is_the_fixed_newstyle() -> None:
    greeting = ServerHandshake(lambda: OFFERS).greeting()
    assert greeting == b"NBDMAGICIHAVEOPT\0\x03"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("step", [1, 7, 1 << 20], ids=["byte by byte", "by sevens", "whole"])
def test_handshake_answers(row: str, step: int) -> None:
    sent, expected = ROWS[row]
    handshake, answer = feed(sent, step)
    assert answer == expected
    assert handshake.over
    assert handshake.rest == b""


@pytest.mark.parametrize("row", ROWS)
def test_bytes_behind_the_handshake_are_kept(row: str) -> None:
    handshake, answer = feed(ROWS[row][0] + b"%request", 1 << 20)
    assert answer == ROWS[row][1]
    assert handshake.rest == b"%request"


REFUSED = {
    "unknown option": (option(99, b"data"), OptionReply.ERR_UNSUP),
    "peek": (option(4), OptionReply.ERR_UNSUP),
    "starttls": (option(5), OptionReply.ERR_POLICY),
    "starttls with data": (option(5, b"x"), OptionReply.ERR_INVALID),
    "list with data": (option(3, b"x"), OptionReply.ERR_INVALID),
    "structured replies with data": (option(8, b"x"), OptionReply.ERR_INVALID),
    "go to an unknown export": (option(7, name_and_infos("disk9")), OptionReply.ERR_UNKNOWN),
    "info without a name": (option(6), OptionReply.ERR_INVALID),
    "go with a name too long for its option": (option(7, b"\0\0\0\x09disk0\0\0"), OptionReply.ERR_INVALID),
    "go with a count too high": (option(7, string("disk0") + b"\0\x02\0\0"), OptionReply.ERR_INVALID),
    "go with bytes too many": (option(7, name_and_infos("disk0") + b"x"), OptionReply.ERR_INVALID),
    "context without structured replies": (
        option(10, contexts("disk0", "base:allocation")),
        OptionReply.ERR_INVALID,
    ),
    "context of an unknown export": (
        STRUCTURED + option(10, contexts("disk9", "base:allocation")),
        OptionReply.ERR_UNKNOWN,
    ),
    "context count too high": (
        STRUCTURED + option(10, string("disk0") + b"\xff\xff\xff\xff"),
        OptionReply.ERR_INVALID,
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_refused_option_lets_the_handshake_go_on(row: str) -> None:
    sent, expected = REFUSED[row]
    handshake, answer = feed(FIXED + sent, 1 << 20)
    answer = answer.removeprefix(STRUCTURED_OK)
    assert struct.unpack_from(">I", answer, 12)[0] == expected
    assert len(answer) > 20, "an error reply says why"
    assert not handshake.over
    handshake.receive(option(7, name_and_infos("disk0")))
    assert handshake.agreed is not None


HUNG_UP = {
    "unknown flags": b"\0\0\0\x07",
    "no option": FIXED + bytes(16),
    "an option too long": FIXED + b"IHAVEOPT" + struct.pack(">II", 99, protocol.MAX_OPTION + 1),
    "an option of a client without the fixed newstyle": b"\0\0\0\x02" + option(7, name_and_infos("disk0")),
    "a name too long": FIXED + option(7, name_and_infos("n" * 4097)),
    "a name that is not UTF-8": FIXED + option(1, b"\xff\xfe"),
    "a query that is not UTF-8": FIXED
    + STRUCTURED
    + option(10, string("disk0") + b"\0\0\0\x01\0\0\0\x01\xff"),
}


@pytest.mark.parametrize("row", HUNG_UP)
@pytest.mark.parametrize("step", [1, 1 << 20], ids=["byte by byte", "whole"])
def test_broken_handshake_is_the_peers_lie(row: str, step: int) -> None:
    with pytest.raises(Error) as caught:
        feed(HUNG_UP[row], step)
    assert caught.value.kind is Kind.PEER_LIED


def test_export_name_that_is_unknown_hangs_up() -> None:
    with pytest.raises(Error, match="disk9") as caught:
        feed(FIXED + option(1, b"disk9"), 1 << 20)
    assert caught.value.kind is Kind.NOT_FOUND


def test_abort_agrees_on_nothing() -> None:
    handshake, _ = feed(FIXED + option(2), 1 << 20)
    assert handshake.over
    assert handshake.agreed is None


def test_empty_name_is_the_only_export() -> None:
    handshake = ServerHandshake(lambda: ONE)
    handshake.receive(FIXED + option(7, name_and_infos("")))
    assert handshake.agreed is not None
    assert handshake.agreed.offer.name == "disk0"


def test_empty_name_among_several_is_unknown() -> None:
    handshake, _ = feed(FIXED + option(7, name_and_infos("")), 1 << 20)
    assert not handshake.over


def test_context_counts_only_for_the_export_it_was_set_for() -> None:
    for name, expected in (("disk0", True), ("disk1", False)):
        sent = FIXED + STRUCTURED + option(10, contexts("disk0", "base:allocation"))
        handshake, _ = feed(sent + option(7, name_and_infos(name)), 1 << 20)
        assert handshake.agreed is not None
        assert handshake.agreed.structured
        assert handshake.agreed.allocation is expected


def test_setting_contexts_again_replaces_them() -> None:
    first = option(Option.SET_META_CONTEXT, contexts("disk0", "base:allocation"))
    second = option(Option.SET_META_CONTEXT, contexts("disk0"))
    handshake, _ = feed(FIXED + STRUCTURED + first + second + option(7, name_and_infos("disk0")), 1 << 20)
    assert handshake.agreed is not None
    assert not handshake.agreed.allocation


def test_name_that_is_long_and_unprintable_is_refused_in_few_words() -> None:
    handshake = ServerHandshake(lambda: OFFERS)
    handshake.receive(FIXED)
    answer = handshake.receive(option(7, name_and_infos("\x01" * 4096)))
    assert protocol.OPTION_REPLY.unpack_from(answer)[2] == OptionReply.ERR_UNKNOWN
    assert len(answer) <= 20 + protocol.MAX_STRING
