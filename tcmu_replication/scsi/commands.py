"""The command table: one row per command. Decoding, REPORT SUPPORTED OPERATION CODES and tests come from it.

REPORT LUNS, PERSISTENT RESERVE and RESERVE/RELEASE are answered by the kernel
before a command gets here. What has no row ends as 05/20/00.
"""

from __future__ import annotations

from tcmu_replication.scsi import inquiry, mode, opcodes, status, transfer
from tcmu_replication.scsi.command import Command, Data, Field, checked

IN, OUT, NONE = Data.IN, Data.OUT, Data.NONE

_RDPROTECT = Field("rdprotect", 1, 3, zero=True)
_WRPROTECT = Field("wrprotect", 1, 3, zero=True)
_VRPROTECT = Field("vrprotect", 1, 3, zero=True)
_DPO = Field("dpo", 1, 1, msb=4)  # a hint about caching, not taken
_FUA = Field("fua", 1, 1, msb=3)
_BYTCHK = Field("bytchk", 1, 2, msb=2)
_IMMED = Field("immed", 1, 1, msb=1)
_ANCHOR = Field("anchor", 1, 1, msb=4, zero=True)
_UNMAP = Field("unmap", 1, 1, msb=3)
_PBDATA = Field("pbdata", 1, 1, msb=2, zero=True)
_LBDATA = Field("lbdata", 1, 1, msb=1, zero=True)
_LBA_6 = Field("lba", 1, 21, msb=4)
_LBA_32 = Field("lba", 2, 32)
_LBA_64 = Field("lba", 2, 64)
_SP = Field("sp", 1, 1, msb=0, zero=True)
_PF = Field("pf", 1, 1, msb=4)
_DBD = Field("dbd", 1, 1, msb=3)
_PAGE_CONTROL = Field("page_control", 2, 2)
_PAGE_CODE = Field("page_code", 2, 6, msb=5)
_SUBPAGE_CODE = Field("subpage_code", 3, 8)


def _blocks(byte: int, width: int) -> Field:
    return Field("blocks", byte, width)


def _allocation(byte: int, width: int) -> Field:
    return Field("allocation_length", byte, width)


def _parameters(byte: int, width: int) -> Field:
    return Field("parameter_list_length", byte, width)


COMMANDS: tuple[Command, ...] = (
    Command(0x00, "TEST UNIT READY", 6, NONE, checked(status.test_unit_ready), (), "SPC-5"),
    Command(0x03, "REQUEST SENSE", 6, IN, checked(status.request_sense),
            (Field("desc", 1, 1, msb=0), _allocation(4, 8)), "SPC-5"),
    Command(0x08, "READ (6)", 6, IN, checked(transfer.read_6), (_LBA_6, _blocks(4, 8)), "SBC-3"),
    Command(0x0A, "WRITE (6)", 6, OUT, checked(transfer.write_6),
            (_LBA_6, _blocks(4, 8)), "SBC-3", writes=True),
    Command(0x12, "INQUIRY", 6, IN, checked(inquiry.inquiry),
            (Field("cmddt", 1, 1, msb=1, zero=True), Field("evpd", 1, 1, msb=0),
             Field("page_code", 2, 8), _allocation(3, 16)), "SPC-5"),
    Command(0x15, "MODE SELECT (6)", 6, OUT, checked(mode.mode_select),
            (_PF, _SP, _parameters(4, 8)), "SPC-5"),
    Command(0x1A, "MODE SENSE (6)", 6, IN, checked(mode.mode_sense),
            (_DBD, _PAGE_CONTROL, _PAGE_CODE, _SUBPAGE_CODE, _allocation(4, 8)), "SPC-5"),
    Command(0x1B, "START STOP UNIT", 6, NONE, checked(status.start_stop),
            (Field("immed", 1, 1, msb=0), Field("modifier", 3, 4, msb=3, zero=True),
             Field("power_condition", 4, 4, zero=True), Field("no_flush", 4, 1, msb=2),
             Field("loej", 4, 1, msb=1, zero=True), Field("start", 4, 1, msb=0)), "SBC-4"),
    Command(0x25, "READ CAPACITY (10)", 10, IN, checked(status.read_capacity_10), (), "SBC-4"),
    Command(0x28, "READ (10)", 10, IN, transfer.reader,
            (_RDPROTECT, _DPO, _FUA, _LBA_32, _blocks(7, 16)), "SBC-4"),
    Command(0x2A, "WRITE (10)", 10, OUT, transfer.writer,
            (_WRPROTECT, _DPO, _FUA, _LBA_32, _blocks(7, 16)), "SBC-4", writes=True),
    Command(0x2F, "VERIFY (10)", 10, OUT, checked(transfer.verify),
            (_VRPROTECT, _DPO, _BYTCHK, _LBA_32, _blocks(7, 16)), "SBC-4"),
    Command(0x35, "SYNCHRONIZE CACHE (10)", 10, NONE, checked(transfer.synchronize_cache),
            (_IMMED, _LBA_32, _blocks(7, 16)), "SBC-4"),
    Command(0x41, "WRITE SAME (10)", 10, OUT, checked(transfer.write_same),
            (_WRPROTECT, _ANCHOR, _UNMAP, _PBDATA, _LBDATA, _LBA_32, _blocks(7, 16)), "SBC-4", writes=True),
    Command(0x42, "UNMAP", 10, OUT, checked(transfer.unmap),
            (Field("anchor", 1, 1, msb=0, zero=True), _parameters(7, 16)), "SBC-4", writes=True),
    Command(0x55, "MODE SELECT (10)", 10, OUT, checked(mode.mode_select),
            (_PF, _SP, _parameters(7, 16)), "SPC-5"),
    Command(0x5A, "MODE SENSE (10)", 10, IN, checked(mode.mode_sense),
            (Field("llbaa", 1, 1, msb=4), _DBD, _PAGE_CONTROL, _PAGE_CODE, _SUBPAGE_CODE,
             _allocation(7, 16)), "SPC-5"),
    Command(0x88, "READ (16)", 16, IN, transfer.reader,
            (_RDPROTECT, _DPO, _FUA, _LBA_64, _blocks(10, 32)), "SBC-4"),
    Command(0x89, "COMPARE AND WRITE", 16, OUT, checked(transfer.compare_and_write),
            (_WRPROTECT, _DPO, _FUA, _LBA_64, _blocks(13, 8)), "SBC-4", writes=True),
    Command(0x8A, "WRITE (16)", 16, OUT, transfer.writer,
            (_WRPROTECT, _DPO, _FUA, _LBA_64, _blocks(10, 32)), "SBC-4", writes=True),
    Command(0x8F, "VERIFY (16)", 16, OUT, checked(transfer.verify),
            (_VRPROTECT, _DPO, _BYTCHK, _LBA_64, _blocks(10, 32)), "SBC-4"),
    Command(0x91, "SYNCHRONIZE CACHE (16)", 16, NONE, checked(transfer.synchronize_cache),
            (_IMMED, _LBA_64, _blocks(10, 32)), "SBC-4"),
    Command(0x93, "WRITE SAME (16)", 16, OUT, checked(transfer.write_same),
            (_WRPROTECT, _ANCHOR, _UNMAP, _PBDATA, _LBDATA, Field("ndob", 1, 1, msb=0),
             _LBA_64, _blocks(10, 32)), "SBC-4", writes=True),
    Command(0x9E, "READ CAPACITY (16)", 16, IN, checked(status.read_capacity_16),
            (_allocation(10, 32),), "SBC-4", action=0x10),
    Command(0xA3, "REPORT SUPPORTED OPERATION CODES", 12, IN, checked(opcodes.report),
            (Field("rctd", 2, 1), Field("reporting_options", 2, 3, msb=2), Field("requested_opcode", 3, 8),
             Field("requested_action", 4, 16), _allocation(6, 32)), "SPC-5", action=0x0C),
    Command(0xA8, "READ (12)", 12, IN, transfer.reader,
            (_RDPROTECT, _DPO, _FUA, _LBA_32, _blocks(6, 32)), "SBC-4"),
    Command(0xAA, "WRITE (12)", 12, OUT, transfer.writer,
            (_WRPROTECT, _DPO, _FUA, _LBA_32, _blocks(6, 32)), "SBC-4", writes=True),
    Command(0xAF, "VERIFY (12)", 12, OUT, checked(transfer.verify),
            (_VRPROTECT, _DPO, _BYTCHK, _LBA_32, _blocks(6, 32)), "SBC-4"),
)  # fmt: skip
