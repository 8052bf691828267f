"""Requests and replies, by rows of (bytes, value)."""

from __future__ import annotations

import struct

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol, transmission
from tcmu_replication.nbd.protocol import Chunk, Command, CommandFlag
from tcmu_replication.nbd.transmission import Reply

COOKIE = 0x1122334455667788
C = "1122334455667788"

REQUESTS = {
    "read": (f"25609513 0000 0000 {C} 0000000000001000 00000200", (0, 0, COOKIE, 4096, 512)),
    "write with FUA": (f"25609513 0001 0001 {C} 0000000000000000 00000001", (1, 1, COOKIE, 0, 1)),
    "disconnect": (f"25609513 0000 0002 {C} 0000000000000000 00000000", (0, 2, COOKIE, 0, 0)),
    "longest write": (f"25609513 0000 0001 {C} 0000000000000000 02000000", (0, 1, COOKIE, 0, 32 << 20)),
    "zeroes of 4 GiB": (
        f"25609513 0002 0006 {C} 0000000100000000 ffffffff",
        (2, 6, COOKIE, 1 << 32, 2**32 - 1),
    ),
    "unknown command": (f"25609513 8000 00ff {C} 0000000000000000 00000000", (0x8000, 255, COOKIE, 0, 0)),
}

REPLIES = {
    "simple": (f"67446698 00000000 {C}", Reply(COOKIE, None, True, 0, 0)),
    "simple error": (f"67446698 0000001c {C}", Reply(COOKIE, None, True, 28, 0)),
    "none": (f"668e33ef 0001 0000 {C} 00000000", Reply(COOKIE, 0, True, 0, 0)),
    "data, more to come": (f"668e33ef 0000 0001 {C} 00001008", Reply(COOKIE, 1, False, 0, 0x1008)),
    "hole": (f"668e33ef 0001 0002 {C} 0000000c", Reply(COOKIE, 2, True, 0, 12)),
    "error": (f"668e33ef 0001 8001 {C} 00000006", Reply(COOKIE, 0x8001, True, 0, 6)),
}


@pytest.mark.parametrize("row", REQUESTS)
def test_request_is_parsed_when_it_is_whole(row: str) -> None:
    text, expected = REQUESTS[row]
    data = bytearray(b"before" + bytes.fromhex(text) + b"behind")
    end = len(data) - len(b"behind")
    for cut in range(6, end):
        assert transmission.parse_request(data, 6, cut) is None
    assert transmission.parse_request(data, 6, end) == expected
    assert transmission.parse_request(data, 6, len(data)) == expected


@pytest.mark.parametrize("row", ["read", "write with FUA", "disconnect"])
def test_request_is_built(row: str) -> None:
    text, (flags, command, cookie, offset, length) = REQUESTS[row]
    assert transmission.request(Command(command), cookie, offset, length, flags) == bytes.fromhex(text)


@pytest.mark.parametrize("row", REPLIES)
def test_reply_is_parsed_when_it_is_whole(row: str) -> None:
    text, expected = REPLIES[row]
    data = bytearray(b"before" + bytes.fromhex(text) + b"behind")
    end = len(data) - len(b"behind")
    for cut in range(6, end):
        assert transmission.parse_reply(data, 6, cut) is None
    assert transmission.parse_reply(data, 6, end) == expected
    assert transmission.parse_reply(data, 6, len(data)) == expected


def test_replies_are_built() -> None:
    assert transmission.simple_reply(COOKIE, 28) == bytes.fromhex(REPLIES["simple error"][0])
    assert transmission.chunk(COOKIE, Chunk.NONE) == bytes.fromhex(REPLIES["none"][0])
    hole = transmission.chunk(COOKIE, Chunk.OFFSET_HOLE, bytes(12))
    assert hole == bytes.fromhex(REPLIES["hole"][0]) + bytes(12)


LIES = {
    "request without magic": lambda: transmission.parse_request(bytearray(28), 0, 28),
    "write beyond the limit": lambda: transmission.parse_request(
        bytearray(transmission.request(Command.WRITE, 1, 0, (32 << 20) + 1)), 0, 28
    ),
    "reply without magic": lambda: transmission.parse_reply(bytearray(4), 0, 4),
    "data chunk beyond the limit": lambda: transmission.parse_reply(
        bytearray(transmission.chunk_header(1, Chunk.OFFSET_DATA, (32 << 20) + 9, done=True)), 0, 20
    ),
    "error chunk beyond the limit": lambda: transmission.parse_reply(
        bytearray(transmission.chunk_header(1, Chunk.ERROR, 1 << 20, done=True)), 0, 20
    ),
    "error chunk too short": lambda: transmission.parse_error_chunk(Chunk.ERROR, memoryview(b"\0\0\0\5\0")),
    "error text beyond its chunk": lambda: transmission.parse_error_chunk(
        Chunk.ERROR, memoryview(b"\0\0\0\5\0\2x")
    ),
    "error chunk of no error": lambda: transmission.parse_error_chunk(Chunk.ERROR, memoryview(bytes(6))),
    "error at an offset without it": lambda: transmission.parse_error_chunk(
        Chunk.ERROR_OFFSET, memoryview(b"\0\0\0\5\0\0")
    ),
    "hole too short": lambda: transmission.parse_hole_chunk(memoryview(bytes(11))),
    "hole of nothing": lambda: transmission.parse_hole_chunk(memoryview(bytes(12))),
    "status too short": lambda: transmission.parse_status_chunk(memoryview(b"\0\0\0\1"), 1),
    "status cut off": lambda: transmission.parse_status_chunk(memoryview(b"\0\0\0\1" + bytes(9)), 1),
    "status of another context": lambda: transmission.parse_status_chunk(
        memoryview(b"\0\0\0\2" + b"\1" * 8), 1
    ),
    "status of nothing": lambda: transmission.parse_status_chunk(memoryview(b"\0\0\0\1" + bytes(8)), 1),
}


@pytest.mark.parametrize("row", LIES)
def test_lie_is_found(row: str) -> None:
    with pytest.raises(Error) as caught:
        LIES[row]()
    assert caught.value.kind is Kind.PEER_LIED


def test_error_chunk_carries_its_sentence() -> None:
    built = transmission.error_chunk(COOKIE, 28, "the disk is full: ä")
    reply = transmission.parse_reply(bytearray(built), 0, len(built))
    assert reply is not None
    payload = memoryview(built)[transmission.STRUCTURED_SIZE :]
    assert len(payload) == reply.length
    assert transmission.parse_error_chunk(Chunk.ERROR, payload) == (28, "the disk is full: ä")


def test_error_chunk_at_an_offset_and_of_an_unknown_type_are_read() -> None:
    at_offset = struct.pack(">IH", 5, 3) + b"bad" + struct.pack(">Q", 4096)
    assert transmission.parse_error_chunk(Chunk.ERROR_OFFSET, memoryview(at_offset)) == (5, "bad")
    assert transmission.parse_error_chunk(0x80FF, memoryview(at_offset)) == (5, "bad")


def test_error_sentence_is_cut_at_the_limit() -> None:
    built = transmission.error_chunk(COOKIE, 5, "x" * 5000)
    assert len(built) == transmission.STRUCTURED_SIZE + 6 + 4096


def test_block_status_is_read_as_it_was_built() -> None:
    extents = [(4096, 0), (8192, 3)]
    built = transmission.status_chunk(COOKIE, 1, extents)
    payload = memoryview(built)[transmission.STRUCTURED_SIZE :]
    assert transmission.parse_status_chunk(payload, 1) == extents


def test_block_status_of_too_many_extents_is_cut() -> None:
    payload = memoryview(b"\0\0\0\1" + struct.pack(">II", 1, 0) * (protocol.MAX_EXTENTS + 9))
    assert transmission.parse_status_chunk(payload, 1) == [(1, 0)] * protocol.MAX_EXTENTS


def test_flags_of_a_command_leave_no_unknown_bit() -> None:
    assert 0x8000 & ~transmission.FLAGS_OF_COMMAND[Command.WRITE]
    assert CommandFlag.FUA & transmission.FLAGS_OF_COMMAND[Command.WRITE]
