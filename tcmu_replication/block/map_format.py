"""What is in the map file of an overlay: four bytes per 4 KiB block of the disk, behind a header.

    byte 0      header (see HEADER), the rest of the page zero
    byte 4096   one entry per block, little-endian; the two high bits say of what kind it is:
                  0                         not here
                  1 + slot                  here; `slot` counts blocks in the data file
                  NOWHERE                   here, without a place (what a map without a data file uses)
                  NEW | 1 + slot            here, but not yet flushed since it came
                  OVER_ZERO | 1 + slot      the same, and it was zero before
                  ZERO_FLAG, or ZERO_FLAG | 1 + slot
                                            here and all zero; the slot stays the block's own

One page of the map stands for 4 MiB of disk. The header names the boot that the
file was last opened in: in another one the kinds NEW and OVER_ZERO mean what was
there before, "not here" or "zero" (see `unflushed`). Whoever looks at a block
asks for its state, which is one of three; those of many entries are found all at
once, as large numbers.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array

from tcmu_replication.block import boot
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, blocks_of, round_up

ABSENT, HERE, ZERO = 0, 1, 2
"""A block's state: look below; data is stored here; here, reads as zeroes, nothing stored."""

ENTRY = 4
"""Bytes of an entry."""
NEW, OVER_ZERO, ZERO_FLAG = 1 << 30, 2 << 30, 3 << 30
"""An entry's kind; 0 is a block that is here for good. ZERO is the greatest: one comparison tells it from HERE."""
NOWHERE = NEW - 1
MAX_SLOTS = NOWHERE - 1
"""So many slots can be told apart: just under 4 TiB."""

PAGE = 4096
PER_PAGE = PAGE // ENTRY
"""Blocks that a page of the map stands for."""
HEADER = struct.Struct(f"<8sIIQ{boot.LENGTH}s")
"""Magic, version, bytes per block, bytes of the disk, boot; a CRC-32 of these follows."""
CHECKSUM = struct.Struct("<I")
MAGIC = b"tcmurmap"
VERSION = 3

RUNS = re.compile(rb"\x00+|\x01+|\x02+")
_LOW = bytes(bool(byte) for byte in range(256))
_TOP = bytes(2 if byte >= ZERO_FLAG >> 24 else bool(byte) for byte in range(256))
_STATE = bytes((ABSENT, HERE, ZERO, ZERO)[byte & 3] for byte in range(256))
"""From an entry's bytes to its state: 1 if a bit is set, 2 for the kind of zeroes, OR-ed."""
UNFLUSHED = re.compile(rb"[\x40-\xbf]")
"""The high byte of an entry of the kinds NEW and OVER_ZERO."""
_OVER = bytes(both & 3 or both >> 2 & 3 for both in range(256))
"""By upper state + 4 * lower state: the state that counts."""


def file_size(length: int) -> int:
    """Bytes of the map file of a disk of `length` bytes: the header's page and whole pages of marks."""
    return PAGE + round_up(blocks_of(length) * ENTRY, PAGE)


def header(length: int) -> bytes:
    """How the map file of a disk of `length` bytes begins in this boot; within a sector, so never torn."""
    head = HEADER.pack(MAGIC, VERSION, BLOCK, length, boot.boot_id().encode())
    return head + CHECKSUM.pack(zlib.crc32(head))


def check_header(page: bytes, path: str, length: int) -> None:
    """Raise `Error` BAD_CONFIG unless the map file that begins with `page` is one of a disk of `length` bytes."""
    if len(page) < PAGE or not any(page[: HEADER.size + CHECKSUM.size]):
        raise refused(path, "was not finished when it was created")
    magic, version, block, disk_length, _ = HEADER.unpack_from(page)
    if magic != MAGIC:
        raise refused(path, "is something else")
    if version != VERSION or block != BLOCK:
        raise refused(path, f"has version {version} and blocks of {block}, not {VERSION} and {BLOCK}")
    if CHECKSUM.unpack_from(page, HEADER.size) != (zlib.crc32(page[: HEADER.size]),):
        raise refused(path, "has a damaged header")
    if disk_length != length:
        raise refused(path, f"is for a disk of {disk_length} bytes, not of {length}")


def refused(path: str, why: str) -> Error:
    """For a file that is no map: `why` goes on after "it"."""
    return Error(
        Kind.BAD_CONFIG,
        f"{path} is no map of this overlay: it {why}. Give another path, or remove the overlay",
    )


def states_of(entries: bytes) -> bytes:
    """The states that entries mean, a byte each."""
    count = len(entries) // ENTRY
    if entries.count(0) == len(entries):
        return bytes(count)
    both = int.from_bytes(entries[3::ENTRY].translate(_TOP), "big")
    for byte in range(3):
        both |= int.from_bytes(entries[byte::ENTRY].translate(_LOW), "big")
    return both.to_bytes(count, "big").translate(_STATE)


def in_order(entry: int, count: int) -> memoryview:
    """Entries of so many adjacent slots."""
    return memoryview(array("I", range(entry, entry + count)))


def over(upper: bytes, lower: bytes) -> bytes:
    """The states of `upper`, and those of `lower` where it has none: all bytes at once, as one large number."""
    both = int.from_bytes(upper, "big") | int.from_bytes(lower, "big") << 2
    return both.to_bytes(len(upper) + 1, "big")[1:].translate(_OVER)


def pages_of(last: int) -> int:
    """Map pages that hold the blocks before `last`."""
    return -(-last // PER_PAGE)


def by_page(first: int, last: int) -> list[tuple[int, int]]:
    """The range in pieces that lie in one page of the map each."""
    if first // PER_PAGE == (last - 1) // PER_PAGE:
        return [(first, last)]
    inner = list(range((first // PER_PAGE + 1) * PER_PAGE, last, PER_PAGE))
    return list(zip([first, *inner], [*inner, last], strict=True))
