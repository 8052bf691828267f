"""What a client says to our server once it has the export: requests and the data of writes.

byte 0      bit 0: structured replies; 1: block status; 2: read-only
byte 1      bytes of a piece, 0 for all at once
byte 2      bytes that the socket takes at a time, 0 for everything
byte 3      which of eight calls of the disk end late
the rest    requests
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator

from tcmu_replication.frontend import nbd_connection
from tcmu_replication.frontend.nbd_connection import Connection
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.protocol import Command
from tests.fuzz.disk import Disk
from tests.fuzz.script import Script
from tests.fuzz.wire import Loop, Wire, running

LENGTH = 256 << 10
WORDS = tuple(protocol.REQUEST_MAGIC.to_bytes(4) + b"\0\0" + command.to_bytes(2) for command in Command)
MAX_LENGTH = 8192


@contextlib.contextmanager
def _lines() -> Iterator[list[logging.LogRecord]]:
    """What the connection logs, which goes nowhere else."""
    lines: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        lines.append(record)
        return False

    nbd_connection.log.addFilter(keep)
    try:
        yield lines
    finally:
        nbd_connection.log.removeFilter(keep)


def check(data: bytes) -> None:
    """Whole requests before the first lie are answered once each; then the connection ends, and only once."""
    script = Script(data)
    flags, step, window, late = (script.number() for _ in range(4))
    said = script.rest()
    disk = Disk(LENGTH, late)
    wire = Wire(said, step=step, window=window * 64)
    ends: list[Connection] = []
    with running(Loop()) as loop, _lines() as lines:
        connection = Connection(
            wire,  # type: ignore[arg-type]
            disk,
            peer="fuzz",
            read_only=bool(flags & 4),
            structured=bool(flags & 1),
            allocation=bool(flags & 1 and flags & 2),
            ended=ends.append,
        )
        loop.run(wire, disk.release)
    assert connection.closed
    assert wire.closed
    assert ends == [connection]
    assert connection.in_flight == 0
    asked, lied = _requests(said)
    assert [line.levelno for line in lines] == [logging.WARNING] * lied, lines
    answered = _replies(bytes(wire.sent), asked, structured=bool(flags & 1), cut=lied)
    if lied:
        assert not answered - Counter(cookie for _, cookie, _ in asked)
    else:
        assert answered == Counter(cookie for _, cookie, _ in asked)


def _requests(said: bytes) -> tuple[list[tuple[int, int, int]], bool]:
    """(command, cookie, length) of every whole request before a disconnect, and whether a lie ended them."""
    found: list[tuple[int, int, int]] = []
    at = 0
    while at + protocol.REQUEST.size <= len(said):
        magic, _, command, cookie, _, length = protocol.REQUEST.unpack_from(said, at)
        if magic != protocol.REQUEST_MAGIC or (command == Command.WRITE and length > protocol.MAX_REQUEST):
            return found, True
        at += protocol.REQUEST.size + (length if command == Command.WRITE else 0)
        if at > len(said) or command == Command.DISC:
            break
        found.append((command, cookie, length))
    return found, False


def _replies(sent: bytes, asked: list[tuple[int, int, int]], *, structured: bool, cut: bool) -> Counter[int]:
    """How often each cookie was answered. After a lie the last reply may be cut off."""
    lengths: dict[int, set[int]] = {}
    for command, cookie, length in asked:
        if command == Command.READ:
            lengths.setdefault(cookie, set()).add(length)
    answered: Counter[int] = Counter()
    at = 0
    while at + 16 <= len(sent):
        (magic,) = protocol.U32.unpack_from(sent, at)
        if magic == protocol.SIMPLE_REPLY_MAGIC:
            _, error, cookie = protocol.SIMPLE_REPLY.unpack_from(sent, at)
            at += protocol.SIMPLE_REPLY.size
            reads = lengths.get(cookie, set())
            if not structured and reads and not error:
                # Only with one kind of request of that cookie is it plain how much data follows.
                if len(reads) > 1 or any(c == cookie and command for command, c, _ in asked):
                    return Counter(cookie for _, cookie, _ in asked)
                at += min(reads)
        else:
            assert magic == protocol.STRUCTURED_REPLY_MAGIC, f"no reply at {at}: {magic:#x}"
            assert structured
            if at + 20 > len(sent):
                break
            _, done, _, cookie, length = protocol.STRUCTURED_REPLY.unpack_from(sent, at)
            assert done
            at += protocol.STRUCTURED_REPLY.size + length
        if at <= len(sent):
            answered[cookie] += 1
    assert cut or at == len(sent)
    return answered
