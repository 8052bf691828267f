"""Requests and replies of the transmission phase: bytes in, values out, no I/O.

Source: doc/proto.md of the NBD project, "Transmission phase". Parsers look into
a buffer at a position and return None if it ends too early; what no honest peer
sends raises Error PEER_LIED. Payloads are not touched: who parses a write or a
data chunk finds its payload behind the header, where it was received.
"""

from __future__ import annotations

from typing import NamedTuple

from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.protocol import Chunk, Command, CommandFlag

Buffer = bytearray | memoryview

REQUEST_SIZE = protocol.REQUEST.size
SIMPLE_SIZE = protocol.SIMPLE_REPLY.size
STRUCTURED_SIZE = protocol.STRUCTURED_REPLY.size
DATA_PREFIX = protocol.CHUNK_OFFSET.size

# Plain integers: the complement of an IntFlag has no bits that it does not know.
FLAGS_OF_COMMAND: dict[int, int] = {
    Command.READ: int(CommandFlag.FUA | CommandFlag.DF),
    Command.WRITE: int(CommandFlag.FUA),
    Command.FLUSH: int(CommandFlag.FUA),
    Command.TRIM: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
"""The commands that our server answers, and the flags it takes. FUA is harmless everywhere, as in QEMU."""


# Requests


class Request(NamedTuple):
    """A request's header; `offset` and `length` are bytes."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


_unpack_request = protocol.REQUEST.unpack_from
_WRITE = int(Command.WRITE)
_MAX = protocol.MAX_REQUEST


def parse_request(buffer: Buffer, start: int, end: int) -> tuple[int, int, int, int, int] | None:
    """The fields of the `Request` at `start` (as a plain tuple, which is made faster); None: needs more."""
    if end - start < REQUEST_SIZE:
        return None
    magic, flags, command, cookie, offset, length = _unpack_request(buffer, start)
    if magic != protocol.REQUEST_MAGIC:
        raise Error(Kind.PEER_LIED, f"a request began with {magic:#010x}")
    if command == _WRITE and length > _MAX:
        raise Error(Kind.PEER_LIED, f"a write of {length} bytes; the limit is {_MAX}")
    return flags, command, cookie, offset, length


def request(command: Command, cookie: int, offset: int = 0, length: int = 0, flags: int = 0) -> bytes:
    """The header of a request."""
    return protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, cookie, offset, length)


# Replies, written


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply's header."""
    return protocol.SIMPLE_REPLY.pack(protocol.SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(cookie: int, kind: Chunk, payload: bytes = b"", *, done: bool = True) -> bytes:
    """A whole chunk of a structured reply."""
    return chunk_header(cookie, kind, len(payload), done=done) + payload


def chunk_header(cookie: int, kind: Chunk, length: int, *, done: bool) -> bytes:
    """The header of a chunk whose payload has `length` bytes."""
    flags = protocol.CHUNK_DONE if done else 0
    return protocol.STRUCTURED_REPLY.pack(protocol.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)


def error_chunk(cookie: int, error: int, text: str) -> bytes:
    """The last chunk of a reply that failed, with a sentence."""
    said = text.encode()[: protocol.MAX_STRING]
    return chunk(cookie, Chunk.ERROR, protocol.CHUNK_ERROR.pack(error, len(said)) + said)


# Replies, read


class Reply(NamedTuple):
    """A reply's header. Simple: `error` counts, `kind` is None. Structured: `length` bytes follow."""

    cookie: int
    kind: int | None
    done: bool
    error: int
    length: int


def parse_reply(buffer: Buffer, start: int, end: int) -> Reply | None:
    """The reply's header at `start`; it takes SIMPLE_SIZE or, with a kind, STRUCTURED_SIZE bytes."""
    if end - start < 4:
        return None
    (magic,) = protocol.U32.unpack_from(buffer, start)
    if magic == protocol.SIMPLE_REPLY_MAGIC:
        if end - start < SIMPLE_SIZE:
            return None
        _, error, cookie = protocol.SIMPLE_REPLY.unpack_from(buffer, start)
        return Reply(cookie, None, True, error, 0)
    if magic != protocol.STRUCTURED_REPLY_MAGIC:
        raise Error(Kind.PEER_LIED, f"a reply began with {magic:#010x}")
    if end - start < STRUCTURED_SIZE:
        return None
    _, flags, kind, cookie, length = protocol.STRUCTURED_REPLY.unpack_from(buffer, start)
    limit = protocol.MAX_REQUEST + DATA_PREFIX if kind == Chunk.OFFSET_DATA else protocol.MAX_OPTION
    if kind == Chunk.BLOCK_STATUS:
        limit = protocol.MAX_STATUS
    if length > limit or (kind == Chunk.OFFSET_DATA and length <= DATA_PREFIX):
        raise Error(Kind.PEER_LIED, f"a reply's chunk of type {kind} has {length} bytes")
    return Reply(cookie, kind, bool(flags & protocol.CHUNK_DONE), 0, length)


def parse_error_chunk(kind: int, payload: Buffer) -> tuple[int, str]:
    """The error value and its sentence ("" if there is none)."""
    head = protocol.CHUNK_ERROR.size
    if len(payload) < head:
        raise Error(Kind.PEER_LIED, f"an error chunk of {len(payload)} bytes")
    error, length = protocol.CHUNK_ERROR.unpack_from(payload)
    tail = protocol.CHUNK_OFFSET.size if kind == Chunk.ERROR_OFFSET else 0
    if kind in (Chunk.ERROR, Chunk.ERROR_OFFSET) and head + length + tail != len(payload):
        raise Error(Kind.PEER_LIED, f"an error chunk of {len(payload)} bytes with a text of {length}")
    if not error:
        raise Error(Kind.PEER_LIED, "an error chunk without an error")
    return error, protocol.sentence(bytes(payload[head : head + length]))


def parse_hole_chunk(payload: Buffer) -> tuple[int, int]:
    """Offset and length of what reads as zeroes."""
    if len(payload) != protocol.CHUNK_HOLE.size:
        raise Error(Kind.PEER_LIED, f"a hole chunk of {len(payload)} bytes")
    offset, length = protocol.CHUNK_HOLE.unpack(payload)
    if not length:
        raise Error(Kind.PEER_LIED, "a hole chunk without a length")
    return offset, length


def parse_status_chunk(payload: Buffer, context: int | None) -> list[tuple[int, int]]:
    """The first MAX_EXTENTS (length, ExtentState mask) pairs of a block status."""
    if len(payload) < 4 + protocol.CHUNK_EXTENT.size or (len(payload) - 4) % protocol.CHUNK_EXTENT.size:
        raise Error(Kind.PEER_LIED, f"a block status of {len(payload)} bytes")
    (number,) = protocol.U32.unpack_from(payload)
    if number != context:
        raise Error(Kind.PEER_LIED, f"a block status of context {number}; agreed was {context}")
    extents = list(protocol.CHUNK_EXTENT.iter_unpack(payload[4 : 4 + protocol.MAX_EXTENTS * 8]))
    if not all(length for length, _ in extents):
        raise Error(Kind.PEER_LIED, "a block status with an empty extent")
    return extents


def status_chunk(cookie: int, context: int, extents: list[tuple[int, int]]) -> bytes:
    """A whole block status reply."""
    pairs = b"".join(protocol.CHUNK_EXTENT.pack(length, state) for length, state in extents)
    return chunk(cookie, Chunk.BLOCK_STATUS, protocol.U32.pack(context) + pairs)
