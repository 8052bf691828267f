"""MODE SENSE and MODE SELECT (SPC-5; pages of SPC-5 and SBC-4). No parameter can be changed or saved.

MODE SELECT therefore takes exactly the values that MODE SENSE gave, as LIO's
own backstores do, and refuses all others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.command import Request
from tcmu_replication.scsi.task import Answer

if TYPE_CHECKING:
    from tcmu_replication.scsi.unit import LogicalUnit

_ALL_PAGES, _ALL_SUBPAGES = 0x3F, 0xFF
_CHANGEABLE, _SAVED = 1, 3
_WRITE_PROTECT, _DPOFUA = 0x80, 0x10
_LONG_LBA = 0x01


def _error_recovery(unit: LogicalUnit) -> bytes:
    return bytes(10)


def _caching(unit: LogicalUnit) -> bytes:
    """WCE says whether a write that has ended may still be lost with power; DRA is set as LIO sets it."""
    page = bytearray(18)
    page[0] = 0x04 if unit.write_cache else 0
    page[10] = 0x20
    return bytes(page)


def _control(unit: LogicalUnit) -> bytes:
    """GLTSD; unrestricted reordering; TAS (the kernel's default); no limit to being busy; fixed sense."""
    return struct.pack(">BBBBHHH", 0x02, 0x10, 0, 0x40, 0, 0xFFFF, 0)


def _exceptions(unit: LogicalUnit) -> bytes:
    return bytes(10)


PAGES: dict[int, Callable[[LogicalUnit], bytes]] = {
    0x01: _error_recovery,  # SBC-4, Read-Write Error Recovery
    0x08: _caching,  # SBC-4, Caching
    0x0A: _control,  # SPC-5, Control
    0x1C: _exceptions,  # SPC-5, Informational Exceptions Control
}


def _page(unit: LogicalUnit, code: int, control: int) -> bytes:
    body = PAGES[code](unit)
    if control == _CHANGEABLE:
        body = bytes(len(body))
    return bytes((code, len(body))) + body


def _descriptor(unit: LogicalUnit, long: bool) -> bytes:
    if long:
        return struct.pack(">Q4xI", unit.blocks, unit.block_size)
    return struct.pack(">II", min(unit.blocks, 0xFFFFFFFF), unit.block_size)


def mode_sense(unit: LogicalUnit, request: Request) -> Answer:
    """MODE SENSE (6) and (10). Default values are the current ones."""
    code, subpage, control = request["page_code"], request["subpage_code"], request["page_control"]
    if control == _SAVED:
        raise sense.CheckCondition(sense.SAVING_PARAMETERS_NOT_SUPPORTED)
    if code != _ALL_PAGES and code not in PAGES:
        raise request.refuse("page_code")
    if subpage not in (0, _ALL_SUBPAGES):
        raise request.refuse("subpage_code")
    codes = sorted(PAGES) if code == _ALL_PAGES else [code]
    pages = b"".join(_page(unit, c, control) for c in codes)
    ten = request.command.length == 10
    long = ten and bool(request["llbaa"])
    descriptor = b"" if request["dbd"] else _descriptor(unit, long)
    device = _DPOFUA | (_WRITE_PROTECT if unit.read_only else 0)
    rest = len(descriptor) + len(pages)
    if ten:
        long_flag = _LONG_LBA if long and descriptor else 0
        header = struct.pack(">HBBBxH", rest + 6, 0, device, long_flag, len(descriptor))
    else:
        header = bytes((rest + 3, 0, device, len(descriptor)))
    return Answer(sense.Status.GOOD, data=header + descriptor + pages)


def mode_select(unit: LogicalUnit, request: Request) -> Answer:
    """MODE SELECT (6) and (10)."""
    if not request["pf"]:
        raise request.refuse("pf")
    length = request["parameter_list_length"]
    data = request.parameters(length)
    if not length:
        return sense.GOOD
    ten = request.command.length == 10
    header = 8 if ten else 4
    if length < header:
        raise sense.CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    medium, long = data[2 if ten else 1], ten and bool(data[4] & _LONG_LBA)
    if medium:
        raise _refuse_parameter(2 if ten else 1)
    size = int.from_bytes(data[6:8], "big") if ten else data[3]
    if header + size > length:
        raise sense.CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    _check_descriptor(unit, data[header : header + size], header, long)
    _check_pages(unit, data, header + size)
    return sense.GOOD


def _refuse_parameter(byte: int) -> sense.CheckCondition:
    return sense.CheckCondition(
        sense.INVALID_FIELD_IN_PARAMETER_LIST, pointer=sense.FieldPointer(byte, in_cdb=False)
    )


def _check_descriptor(unit: LogicalUnit, data: bytes, start: int, long: bool) -> None:
    """None, or one that says what is; a number of blocks of 0 or all ones means "as it is"."""
    if not data:
        return
    form = struct.Struct(">Q4xI" if long else ">II")
    if len(data) != form.size:
        raise _refuse_parameter(start - (2 if start == 8 else 1))
    blocks, block_size = form.unpack(data)
    largest = (1 << (64 if long else 32)) - 1
    if blocks not in (0, largest, min(unit.blocks, largest)):
        raise _refuse_parameter(start)
    if block_size & 0xFFFFFF != unit.block_size:
        raise _refuse_parameter(start + form.size - 4)


def _check_pages(unit: LogicalUnit, data: bytes, at: int) -> None:
    """Each page must be known, whole, and as it is."""
    while at < len(data):
        code = data[at] & 0x7F
        if code not in PAGES:
            raise _refuse_parameter(at)
        expected = _page(unit, code, 0)
        found = data[at : at + len(expected)]
        if len(found) > 1 and found[1] != expected[1]:
            raise _refuse_parameter(at + 1)
        if len(found) < len(expected):
            raise sense.CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
        for index in range(2, len(expected)):
            if found[index] != expected[index]:
                raise _refuse_parameter(at + index)
        at += len(expected)
