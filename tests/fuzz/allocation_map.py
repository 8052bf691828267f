"""The map file of an overlay of a 40 MiB disk.

byte 0      bit 0: the header's checksum is put right; 1: the file has its proper size
the rest    16 bytes of file each: where they go (two bytes, times 8) and fourteen bytes of content;
            what is not written is a fresh map
"""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path

from tcmu_replication.block import map_format
from tcmu_replication.block.allocation_map import AllocationMap
from tcmu_replication.block.map_format import (
    ABSENT,
    CHECKSUM,
    HEADER,
    HERE,
    NEW,
    NOWHERE,
    OVER_ZERO,
    ZERO,
    ZERO_FLAG,
)
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import blocks_of
from tests.fuzz.script import Script, told

LENGTH = 40 << 20
BLOCKS = blocks_of(LENGTH)
SIZE = map_format.file_size(LENGTH)
WORDS = (
    map_format.MAGIC,
    NOWHERE.to_bytes(4, "little") * 3,
    NEW.to_bytes(4, "little") * 3,
    OVER_ZERO.to_bytes(4, "little") * 3,
    ZERO_FLAG.to_bytes(4, "little") * 3,
    LENGTH.to_bytes(8, "little"),
)
MAX_LENGTH = 1024

_FOLDER = tempfile.TemporaryDirectory()
_PATH = Path(_FOLDER.name) / "map"


def check(data: bytes) -> None:
    """A map opens with every mark counted and none beyond the disk, or is refused.

    Reading it changes nothing but what was not flushed, if it is of another boot.
    """
    opens(data)


def opens(data: bytes) -> bool:
    """As `check`; whether it was not refused."""
    script = Script(data)
    flags = script.number()
    content = bytearray(SIZE)
    head = map_format.header(LENGTH)
    content[: len(head)] = head
    while script.left:
        at, piece = script.number(2) * 8 % SIZE, script.take(14)
        content[at : at + len(piece)] = piece
    if flags & 1:
        CHECKSUM.pack_into(content, HEADER.size, zlib.crc32(content[: HEADER.size]))
    if flags & 2:
        del content[SIZE:]
    _PATH.write_bytes(content)
    found_there = bytes(content)
    if len(content) == SIZE and not content.startswith(head):
        _lose_power(memoryview(content)[map_format.PAGE :].cast("I"))
    refused = found_there, found_there[: len(head)] + bytes(content[len(head) :])
    try:
        found = AllocationMap(os.fspath(_PATH), LENGTH)
    except Error as error:
        told(error, Kind.BAD_CONFIG)
        assert _PATH.read_bytes() in refused
        return False
    content[: len(head)] = head
    _look(found, content)
    found.close()
    assert _PATH.read_bytes() == content
    return True


def _lose_power(entries: memoryview) -> None:
    """What was not flushed is as it was before."""
    for at, entry in enumerate(entries):
        if NEW <= entry < ZERO_FLAG:
            entries[at] = 0 if entry < OVER_ZERO else entry | ZERO_FLAG


def _look(found: AllocationMap, content: bytearray) -> None:
    entries = list(memoryview(content)[map_format.PAGE :].cast("I"))
    marks = [(ZERO if entry >= ZERO_FLAG else HERE) if entry else ABSENT for entry in entries]
    assert (found.here, found.zero) == (marks.count(HERE), marks.count(ZERO))
    assert found.entries(0, BLOCKS) == entries[:BLOCKS]
    assert found.states(0, BLOCKS) == bytes(marks[:BLOCKS])
    assert [found.state(block) for block in range(0, BLOCKS, 7)] == marks[:BLOCKS:7]
    assert found.slots == max(entry & NOWHERE for entry in entries if entry & NOWHERE != NOWHERE)
    runs = list(found.runs(0, BLOCKS))
    assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])]
    assert runs[-1][1] == BLOCKS
    assert [run for run in runs if run[2] != ABSENT] == list(found.marked(0, BLOCKS))
