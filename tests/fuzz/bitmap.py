"""The map of dirty blocks of a disk of some 256 MiB.

byte 0      bit 0: the header's checksum is put right; 1: the file has its proper size
the rest    16 bytes of file each: where they go (two bytes, times 8) and fourteen bytes of content;
            what is not written is a fresh map
"""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path

from tcmu_replication.block.bitmap import (
    CHECKSUM,
    HEADER,
    MAGIC,
    PAGE,
    PER_PAGE,
    Bitmap,
    file_size,
    header,
)
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK
from tests.fuzz.script import Script, told

BLOCKS = 2 * PER_PAGE + 100
LENGTH = BLOCKS * BLOCK - 512
SIZE = file_size(LENGTH)
WORDS = (MAGIC, LENGTH.to_bytes(8, "little"), b"\xff" * 14, b"\x55" * 14)
MAX_LENGTH = 1024

_FOLDER = tempfile.TemporaryDirectory()
_PATH = Path(_FOLDER.name) / "map"


def check(data: bytes) -> None:
    """A map opens with every mark counted and none beyond the disk, or is refused. To read it changes nothing."""
    opens(data)


def opens(data: bytes) -> bool:
    """As `check`; whether it was not refused."""
    script = Script(data)
    flags = script.number()
    content = bytearray(header(LENGTH).ljust(SIZE, b"\0"))
    while script.left:
        at, piece = script.number(2) * 8 % SIZE, script.take(14)
        content[at : at + len(piece)] = piece
    if flags & 1:
        CHECKSUM.pack_into(content, HEADER.size, zlib.crc32(content[: HEADER.size]))
    if flags & 2:
        del content[SIZE:]
    _PATH.write_bytes(content)
    try:
        found = Bitmap(os.fspath(_PATH), LENGTH)
    except Error as error:
        told(error, Kind.BAD_CONFIG)
        assert _PATH.read_bytes() == content
        return False
    marked = [
        8 * at + bit for at, byte in enumerate(content[PAGE:]) if byte for bit in range(8) if byte >> bit & 1
    ]
    assert max(marked, default=0) < BLOCKS
    assert found.count == len(marked)
    assert [block for first, last in found.runs() for block in range(first, last)] == marked
    assert all(found.test(block) for block in marked)
    found.close()
    assert _PATH.read_bytes() == content
    return True
