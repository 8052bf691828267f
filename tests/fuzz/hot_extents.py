"""The file of the activity log of a disk of three sectors' extents.

byte 0      bit 0: the header's checksum is put right; 1: the file has its proper size; 2 to 4: the checksum of each
            sector is put right
the rest    16 bytes of file each: where they go (two bytes) and fourteen bytes of content;
            what is not written is a file that names nothing
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

from tcmu_replication.block.hot_extents import (
    CHECKSUM,
    EXTENT,
    HEADER,
    MAGIC,
    PAGE,
    PER_SECTOR,
    SECTOR,
    VERSION,
    HotExtents,
    file_size,
)
from tcmu_replication.errors import Error, Kind
from tests.fuzz.script import Script, told

EXTENTS = 2 * PER_SECTOR + 100
LENGTH = EXTENTS * EXTENT - 512
SIZE = file_size(LENGTH)
SECTORS = range(PAGE, SIZE, SECTOR)
HEAD = HEADER.pack(MAGIC, VERSION, EXTENT, LENGTH)
WORDS = (MAGIC, LENGTH.to_bytes(8, "little"), b"\xff" * 14, b"\x55" * 14)
MAX_LENGTH = 1024

_FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm")
_PATH = Path(_FOLDER.name) / "log"


def check(data: bytes) -> None:
    """A log opens with every extent named that may be, and none beyond the disk; or it is of a newer version."""
    opens(data)


def opens(data: bytes) -> bool:
    """As `check`; whether it was taken for what it says, and not for one that names everything."""
    script = Script(data)
    flags = script.number()
    content = bytearray(SIZE)
    content[: HEADER.size] = HEAD
    while script.left:
        at, piece = script.number(2) % SIZE, script.take(14)
        content[at : at + len(piece)] = piece
    if flags & 1:
        CHECKSUM.pack_into(content, HEADER.size, zlib.crc32(content[: HEADER.size]))
    for number, at in enumerate(SECTORS):
        if flags & 4 << number:
            CHECKSUM.pack_into(content, at + SECTOR - 4, zlib.crc32(content[at : at + SECTOR - 4], number))
    if flags & 2:
        del content[SIZE:]
    _PATH.write_bytes(content)
    try:
        found = HotExtents(_PATH, LENGTH)
    except Error as error:
        told(error, Kind.BAD_CONFIG)
        assert _PATH.read_bytes() == content
        return False
    ours = content.startswith(HEAD + CHECKSUM.pack(zlib.crc32(HEAD))) and len(content) == SIZE
    named = [extent for extent in range(EXTENTS) if not ours or _named(content, extent)]
    assert [extent for first, last in found.runs() for extent in range(first, last)] == named
    assert found.count == len(named)
    assert found.found == (found.runs() if ours else None)
    found.close()
    again = HotExtents(_PATH, LENGTH)
    assert again.found == found.runs()
    again.close()
    return ours


def _named(content: bytearray, extent: int) -> bool:
    sector, bit = divmod(extent, PER_SECTOR)
    at = PAGE + sector * SECTOR
    bits, checksum = content[at : at + SECTOR - 4], content[at + SECTOR - 4 : at + SECTOR]
    return checksum != CHECKSUM.pack(zlib.crc32(bits, sector)) or bool(bits[bit // 8] >> bit % 8 & 1)
