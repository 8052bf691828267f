"""INQUIRY: standard data (SPC-5) and the vital product data pages (SPC-5, SBC-4)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from tcmu_replication.scsi import identity, sense
from tcmu_replication.scsi.command import Request
from tcmu_replication.scsi.task import Answer

if TYPE_CHECKING:
    from tcmu_replication.scsi.unit import LogicalUnit

_DISK = 0x00
_SPC_4 = 0x06
_COMMAND_QUEUE = 0x02
_VERSION_DESCRIPTORS = (0x00A0, 0x0460, 0x04C0)  # SAM-5, SPC-4, SBC-3, no version claimed of each

_BINARY, _ASCII = 0x1, 0x2
_T10, _NAA = 0x1, 0x3


def standard(unit: LogicalUnit) -> bytes:
    """Standard INQUIRY data, 96 bytes (SPC-5, Standard INQUIRY data)."""
    who = unit.identity()
    data = bytearray(96)
    data[0:8] = bytes((_DISK, 0, _SPC_4, 0x02, len(data) - 5, 0, 0, _COMMAND_QUEUE))
    data[8:16] = identity.padded(who.vendor, 8)
    data[16:32] = identity.padded(who.product, 16)
    data[32:36] = identity.padded(who.revision, 4)
    struct.pack_into(f">{len(_VERSION_DESCRIPTORS)}H", data, 58, *_VERSION_DESCRIPTORS)
    return bytes(data)


def _supported_pages(unit: LogicalUnit) -> bytes:
    return bytes(sorted(PAGES))


def _unit_serial(unit: LogicalUnit) -> bytes:
    return unit.identity().serial.encode("ascii", "replace")


def _designator(code_set: int, kind: int, value: bytes) -> bytes:
    return bytes((code_set, kind, 0, len(value))) + value


def _identification(unit: LogicalUnit) -> bytes:
    """Without a serial there is no designator: one that two units share would make multipath join them."""
    who = unit.identity()
    if not who.serial:
        return b""
    return _designator(_BINARY, _NAA, identity.naa(who)) + _designator(_ASCII, _T10, identity.t10(who))


def _block_limits(unit: LogicalUnit) -> bytes:
    limits = unit.limits
    return struct.pack(
        ">BBHIIIIIIIQ20x",
        0x01,  # WSNZ: a WRITE SAME of zero blocks is refused
        limits.compare_and_write,
        limits.granularity,
        limits.transfer,
        limits.transfer - limits.transfer % limits.granularity,  # Linux heeds whole physical blocks only
        0,  # no PRE-FETCH
        limits.unmap,
        limits.unmap_descriptors,
        limits.granularity,
        1 << 31,  # UGAVALID, and unmap granules begin at lba 0
        limits.write_same,
    )


def _characteristics(unit: LogicalUnit) -> bytes:
    """All zero: the rotation rate and the form factor of what lies below are not reported."""
    return bytes(60)


def _provisioning(unit: LogicalUnit) -> bytes:
    """LBPU, LBPWS, LBPWS10; thin. LBPRZ is 0: what UNMAP leaves behind may read as before."""
    return bytes((0, 0xE0, 0x02, 0))


PAGES: dict[int, Callable[[LogicalUnit], bytes]] = {
    0x00: _supported_pages,  # SPC-5, Supported VPD Pages
    0x80: _unit_serial,  # SPC-5, Unit Serial Number
    0x83: _identification,  # SPC-5, Device Identification
    0xB0: _block_limits,  # SBC-4, Block Limits
    0xB1: _characteristics,  # SBC-4, Block Device Characteristics
    0xB2: _provisioning,  # SBC-4, Logical Block Provisioning
}


def inquiry(unit: LogicalUnit, request: Request) -> Answer:
    """INQUIRY (SPC-5)."""
    page = request["page_code"]
    if not request["evpd"]:
        if page:
            raise request.refuse("page_code")
        return Answer(sense.Status.GOOD, data=standard(unit))
    build = PAGES.get(page)
    if build is None:
        raise request.refuse("page_code")
    body = build(unit)
    return Answer(sense.Status.GOOD, data=struct.pack(">BBH", _DISK, page, len(body)) + body)
