"""The commands that touch the medium (SBC-4): they become tasks, after every check that needs no I/O.

A transfer that is longer than VPD page B0 says is served all the same: its
data area exists already, and not every initiator reads the page. Commands
whose length does not come from a data area (VERIFY, WRITE SAME, UNMAP) are
held to their limits.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.buffers import Buffers, take, total
from tcmu_replication.scsi.command import Command, Request, Run
from tcmu_replication.scsi.task import Answer, Op, Task

if TYPE_CHECKING:
    from tcmu_replication.scsi.unit import LogicalUnit

_make = tuple.__new__  # Task(...) costs half a microsecond more, and the hot path makes one per command
_READ, _WRITE = Op.READ, Op.WRITE


def _read(unit: LogicalUnit, lba: int, blocks: int, fua: bool, in_length: int) -> Answer | Task:
    """A Data-In area that is too short gets what fits, as in LIO; the overflow cannot be reported."""
    if lba + blocks > unit.blocks:
        raise sense.CheckCondition(sense.LBA_OUT_OF_RANGE)
    size = unit.block_size
    length = blocks * size
    if length > in_length:
        length = in_length
    if not length:
        return sense.GOOD
    return _make(Task, (_READ, lba * size, length, fua, False, False, b"", ()))


def _write(
    unit: LogicalUnit, command: Command, lba: int, blocks: int, fua: bool, data_out: Buffers
) -> Answer | Task:
    if unit.read_only:
        raise sense.CheckCondition(sense.WRITE_PROTECTED)
    if lba + blocks > unit.blocks:
        raise sense.CheckCondition(sense.LBA_OUT_OF_RANGE)
    size = unit.block_size
    length = blocks * size
    if total(data_out) < length:
        raise _refused(command, "blocks")
    if not length:
        return sense.GOOD
    return _make(Task, (_WRITE, lba * size, length, fua or not unit.write_cache, False, False, b"", ()))


def _refused(command: Command, name: str) -> sense.CheckCondition:
    return sense.CheckCondition(sense.INVALID_FIELD_IN_CDB, pointer=command.by_name[name].pointer())


def reader(unit: LogicalUnit, command: Command) -> Run:
    """Bind READ (10), (12) or (16)."""
    unpack = command.layout("lba", "blocks").unpack_from
    protect, fua = command.mask(command.by_name["rdprotect"])[1], command.mask(command.by_name["fua"])[1]

    def run(cdb: bytes, data_out: Buffers, in_length: int) -> Answer | Task:
        try:
            flags, lba, blocks = unpack(cdb)
        except struct.error:
            raise sense.CheckCondition(sense.INVALID_FIELD_IN_CDB) from None
        if flags & protect:
            raise _refused(command, "rdprotect")
        return _read(unit, lba, blocks, flags & fua != 0, in_length)

    return run


def writer(unit: LogicalUnit, command: Command) -> Run:
    """Bind WRITE (10), (12) or (16)."""
    unpack = command.layout("lba", "blocks").unpack_from
    protect, fua = command.mask(command.by_name["wrprotect"])[1], command.mask(command.by_name["fua"])[1]

    def run(cdb: bytes, data_out: Buffers, in_length: int) -> Answer | Task:
        try:
            flags, lba, blocks = unpack(cdb)
        except struct.error:
            raise sense.CheckCondition(sense.INVALID_FIELD_IN_CDB) from None
        if flags & protect:
            raise _refused(command, "wrprotect")
        return _write(unit, command, lba, blocks, flags & fua != 0, data_out)

    return run


def read_6(unit: LogicalUnit, request: Request) -> Answer | Task:
    """READ (6): zero blocks mean 256."""
    return _read(unit, request["lba"], request["blocks"] or 256, False, request.in_length)


def write_6(unit: LogicalUnit, request: Request) -> Answer | Task:
    """WRITE (6): zero blocks mean 256."""
    blocks = request["blocks"] or 256
    return _write(unit, request.command, request["lba"], blocks, False, request.data_out)


def _range(unit: LogicalUnit, lba: int, blocks: int) -> tuple[int, int]:
    """Offset and length in bytes of a range that must be on the disk."""
    if lba + blocks > unit.blocks:
        raise sense.CheckCondition(sense.LBA_OUT_OF_RANGE)
    return lba * unit.block_size, blocks * unit.block_size


def _block(unit: LogicalUnit, request: Request) -> bytes:
    """The one block of the Data-Out area."""
    if total(request.data_out) < unit.block_size:
        raise request.refuse("blocks")
    return take(request.data_out, unit.block_size)


_ON_MEDIUM, _DATA, _ONE_BLOCK = 0, 1, 3


def verify(unit: LogicalUnit, request: Request) -> Answer | Task:
    """VERIFY (10), (12), (16): read the range, or compare it with as many blocks, or each with one block."""
    blocks, check = request["blocks"], request["bytchk"]
    offset, length = _range(unit, request["lba"], blocks)
    if check not in (_ON_MEDIUM, _DATA, _ONE_BLOCK):
        raise request.refuse("bytchk")
    if not blocks:
        return sense.GOOD
    if check == _DATA:
        if total(request.data_out) < length:
            raise request.refuse("blocks")
        return Task(Op.VERIFY, offset, length, compare=True)
    if blocks > unit.limits.without_data:
        raise request.refuse("blocks")
    if check == _ONE_BLOCK:
        return Task(Op.VERIFY, offset, length, compare=True, pattern=_block(unit, request))
    return Task(Op.VERIFY, offset, length)


def synchronize_cache(unit: LogicalUnit, request: Request) -> Answer | Task:
    """SYNCHRONIZE CACHE (10), (16): all of the cache, and the answer comes after it even with IMMED."""
    _range(unit, request["lba"], request["blocks"])
    return Task(Op.FLUSH)


def write_same(unit: LogicalUnit, request: Request) -> Answer | Task:
    """WRITE SAME (10), (16). UNMAP is heeded where the pattern is zeroes, which then still read as zeroes."""
    blocks = request["blocks"]
    if not 0 < blocks <= unit.limits.write_same:
        raise request.refuse("blocks")
    offset, length = _range(unit, request["lba"], blocks)
    pattern = b""
    if not (request.has("ndob") and request["ndob"]):
        pattern = _block(unit, request)
        if pattern.count(0) == len(pattern):
            pattern = b""
    fua = not unit.write_cache
    return Task(Op.WRITE_SAME, offset, length, fua=fua, unmap=bool(request["unmap"]), pattern=pattern)


def compare_and_write(unit: LogicalUnit, request: Request) -> Answer | Task:
    """COMPARE AND WRITE: the Data-Out area is exactly twice the range."""
    blocks = request["blocks"]
    if blocks > unit.limits.compare_and_write:
        raise request.refuse("blocks")
    offset, length = _range(unit, request["lba"], blocks)
    if total(request.data_out) != 2 * length:
        raise request.refuse("blocks")
    if not blocks:
        return sense.GOOD
    fua = bool(request["fua"]) or not unit.write_cache
    return Task(Op.COMPARE_AND_WRITE, offset, length, fua=fua)


_UNMAP_HEADER = struct.Struct(">HH4x")
_UNMAP_DESCRIPTOR = struct.Struct(">QI4x")


def unmap(unit: LogicalUnit, request: Request) -> Answer | Task:
    """UNMAP. A descriptor that the list cuts off is ignored (SBC-4, UNMAP parameter list)."""
    length = request["parameter_list_length"]
    data = request.parameters(length)
    if not length:
        return sense.GOOD
    if length < _UNMAP_HEADER.size:
        raise sense.CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
    _, described = _UNMAP_HEADER.unpack_from(data)
    count = min(described, length - _UNMAP_HEADER.size) // _UNMAP_DESCRIPTOR.size
    if count > unit.limits.unmap_descriptors:
        raise _refuse_parameter(2)
    ranges, left = [], unit.limits.unmap
    for at in range(_UNMAP_HEADER.size, _UNMAP_HEADER.size + count * _UNMAP_DESCRIPTOR.size, 16):
        lba, blocks = _UNMAP_DESCRIPTOR.unpack_from(data, at)
        left -= blocks
        if left < 0:
            raise _refuse_parameter(at + 8)
        where = _range(unit, lba, blocks)
        if blocks:
            ranges.append(where)
    if not ranges:
        return sense.GOOD
    return Task(Op.UNMAP, fua=not unit.write_cache, ranges=tuple(ranges))


def _refuse_parameter(byte: int) -> sense.CheckCondition:
    pointer = sense.FieldPointer(byte, in_cdb=False)
    return sense.CheckCondition(sense.INVALID_FIELD_IN_PARAMETER_LIST, pointer=pointer)
