"""What the kernel and a handler share, byte by byte: mailbox, ring entries, constants.

Every table is a structure of linux/target_core_user.h (mailbox version 2), a
row per field that is used: its offset in the structure, its `struct` code, its
name. Integers are the machine's own, so the formats are native ones without
padding. No I/O here.

     0          mailbox           handler reads cmd_head, writes cmd_tail
    cmdr_off    ring, cmdr_size   entries, contiguous, 8-byte aligned; the
                                  response overlaps the request
    then        data area         4 KiB blocks that the iovecs point into
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

MAILBOX_VERSION = 2
"""TCMU_MAILBOX_VERSION, the only one that this project speaks."""


class Capability(enum.IntFlag):
    """TCMU_MAILBOX_FLAG_CAP_*: what this kernel can do."""

    OUT_OF_ORDER = 1
    READ_LEN = 2
    TASK_MANAGEMENT = 4
    KEEP_BUFFERS = 8


class Opcode(enum.IntEnum):
    """enum tcmu_opcode: what an entry is. The low three bits of len_op."""

    PAD = 0
    COMMAND = 1
    TASK_MANAGEMENT = 2


OPCODE_MASK = 0x7
"""TCMU_OP_MASK. The other bits of len_op are the entry's length in bytes."""

ALIGNMENT = 8
"""TCMU_OP_ALIGN_SIZE: entries start and end on it."""

UNKNOWN_OPCODE = 0x1
"""TCMU_UFLAG_UNKNOWN_OP: the handler does not know what this entry asks for."""
USE_READ_LEN = 0x2
"""TCMU_UFLAG_READ_LEN: the read_len of the response counts (the kernel ignores 0)."""
KEEP_BUFFERS = 0x4
"""TCMU_UFLAG_KEEP_BUF: completed, but its data blocks stay until action/free_kept_buf."""

SENSE_LENGTH = 96
"""TCMU_SENSE_BUFFERSIZE."""


class TaskManagement(enum.IntEnum):
    """TCMU_TMR_*: why the kernel aborts commands."""

    UNKNOWN = 0
    ABORT_TASK = 1
    ABORT_TASK_SET = 2
    CLEAR_ACA = 3
    CLEAR_TASK_SET = 4
    LUN_RESET = 5
    TARGET_WARM_RESET = 6
    TARGET_COLD_RESET = 7
    LUN_RESET_BY_PR_OUT = 128


class Field(NamedTuple):
    """One field: offset in its structure, code of the struct module, name."""

    offset: int
    code: str
    name: str


def pack_of(fields: tuple[Field, ...]) -> struct.Struct:
    """A Struct of `fields`, from offset 0 to the end of the last one, gaps skipped."""
    text = "="
    for field in fields:
        gap = field.offset - struct.calcsize(text)
        text += (f"{gap}x" if gap else "") + field.code
    return struct.Struct(text)


# struct tcmu_mailbox
MAILBOX_FIELDS = (
    Field(0, "H", "version"),
    Field(2, "H", "flags"),
    Field(4, "I", "cmdr_off"),
    Field(8, "I", "cmdr_size"),
    Field(12, "I", "cmd_head"),
    Field(64, "I", "cmd_tail"),
)
MAILBOX = pack_of(MAILBOX_FIELDS)
HEAD_WORD = 12 // 4
"""cmd_head, when the mailbox is seen as 32-bit words."""
TAIL_WORD = 64 // 4
"""cmd_tail likewise: the only word of the mailbox that the handler writes.

One aligned 32-bit store, never struct.pack_into, which writes zeroes first.
"""
MAILBOX_SIZE = 128

# struct tcmu_cmd_entry_hdr
HEADER_FIELDS = (
    Field(0, "I", "len_op"),
    Field(4, "H", "cmd_id"),
    Field(6, "B", "kflags"),
    Field(7, "B", "uflags"),
)
HEADER = pack_of(HEADER_FIELDS)

# struct tcmu_cmd_entry, req
REQUEST_FIELDS = (
    Field(0, "I", "len_op"),
    Field(4, "H", "cmd_id"),
    Field(8, "I", "iov_cnt"),
    Field(12, "I", "iov_bidi_cnt"),
    Field(24, "Q", "cdb_off"),
)
REQUEST = pack_of(REQUEST_FIELDS)
IOVECS = 48
"""Where req.iov starts. First iov_cnt of Data-Out or Data-In, then iov_bidi_cnt."""
# struct iovec on a 64-bit machine; the base is an offset from the mailbox
IOVEC_FIELDS = (Field(0, "Q", "base"), Field(8, "Q", "length"))
IOVEC = pack_of(IOVEC_FIELDS)

COMMAND_SIZE = 112
"""sizeof(struct tcmu_cmd_entry): where the response ends. The CDB follows, or the iovecs beyond four do."""
USUAL_FIELDS = (
    *REQUEST_FIELDS,
    Field(48, "Q", "base"),
    Field(56, "Q", "length"),
    Field(112, "16s", "cdb"),
)
USUAL = pack_of(USUAL_FIELDS)
"""The usual entry in one go: at most four iovecs, of which the first, and a CDB of up to 16 bytes."""

# struct tcmu_cmd_entry, from hdr.cmd_id on: rsp
RESPONSE_OFFSET = 4
RESPONSE_FIELDS = (
    Field(0, "H", "cmd_id"),
    Field(2, "B", "kflags"),
    Field(3, "B", "uflags"),
    Field(4, "B", "scsi_status"),
    Field(8, "I", "read_len"),
)
RESPONSE = pack_of(RESPONSE_FIELDS)
SENSE = 16
"""Where rsp.sense_buffer starts in the entry."""

# struct tcmu_tmr_entry
TASK_MANAGEMENT_FIELDS = (
    Field(0, "I", "len_op"),
    Field(4, "H", "cmd_id"),
    Field(8, "B", "tmr_type"),
    Field(12, "I", "cmd_cnt"),
)
TASK_MANAGEMENT = pack_of(TASK_MANAGEMENT_FIELDS)
COMMAND_IDS = 32
"""Where tcmu_tmr_entry.cmd_ids starts: cmd_cnt of 16 bits each."""

_GROUP_LENGTHS = (6, 10, 10, 12, 16, 12, 10, 10)
CDB_LENGTHS = bytes(_GROUP_LENGTHS[opcode >> 5] for opcode in range(256))
"""Bytes of a CDB by its first byte, as the kernel counts (scsi_command_size_tbl)."""
VARIABLE_LENGTH = 0x7F
"""The opcode whose CDB is 8 + cdb[7] bytes long."""


def round_entry(length: int) -> int:
    """`length` rounded up to where the next entry may start."""
    return -(-length // ALIGNMENT) * ALIGNMENT
