"""The tables against the compiler's idea of linux/target_core_user.h, and against themselves."""

from __future__ import annotations

import ctypes

import pytest

from tcmu_replication.tcmu import layout

u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class Mailbox(ctypes.Structure):
    _fields_ = (
        ("version", u16),
        ("flags", u16),
        ("cmdr_off", u32),
        ("cmdr_size", u32),
        ("cmd_head", u32),
        ("_line", u8 * 48),  # cmd_tail is aligned to 64
        ("cmd_tail", u32),
    )


class Header(ctypes.Structure):
    _fields_ = (("len_op", u32), ("cmd_id", u16), ("kflags", u8), ("uflags", u8))


class Iovec(ctypes.Structure):
    _fields_ = (("base", u64), ("length", u64))


class Request(ctypes.Structure):
    _fields_ = (
        *Header._fields_,
        ("iov_cnt", u32),
        ("iov_bidi_cnt", u32),
        ("iov_dif_cnt", u32),
        ("cdb_off", u64),
        ("_pad1", u64),
        ("_pad2", u64),
        ("iov", Iovec * 0),
    )


class Response(ctypes.Structure):
    _fields_ = (
        *Header._fields_,
        ("scsi_status", u8),
        ("_pad1", u8),
        ("_pad2", u16),
        ("read_len", u32),
        ("sense", u8 * 96),
    )


class TaskManagement(ctypes.Structure):
    _fields_ = (
        *Header._fields_,
        ("tmr_type", u8),
        ("_pad1", u8),
        ("_pad2", u16),
        ("cmd_cnt", u32),
        ("_pad3", u64),
        ("_pad4", u64),
        ("cmd_ids", u16 * 0),
    )


TABLES = (
    (Mailbox, layout.MAILBOX_FIELDS, 0),
    (Header, layout.HEADER_FIELDS, 0),
    (Request, layout.REQUEST_FIELDS, 0),
    (Iovec, layout.IOVEC_FIELDS, 0),
    (Response, layout.RESPONSE_FIELDS, layout.RESPONSE_OFFSET),
    (TaskManagement, layout.TASK_MANAGEMENT_FIELDS, 0),
)
ROWS = [
    pytest.param(structure, field, base, id=f"{structure.__name__}.{field.name}")
    for structure, fields, base in TABLES
    for field in fields
]


@pytest.mark.parametrize(("structure", "field", "base"), ROWS)
def test_field_is_where_the_structure_has_it(structure, field, base):
    expected = getattr(structure, field.name)
    assert (field.offset + base, layout.struct.calcsize("=" + field.code)) == (expected.offset, expected.size)


def test_offsets_that_are_not_fields():
    assert Request.iov.offset == layout.IOVECS
    assert Response.sense.offset == layout.SENSE
    assert TaskManagement.cmd_ids.offset == layout.COMMAND_IDS
    assert ctypes.sizeof(Response) == layout.COMMAND_SIZE
    assert Mailbox.cmd_head.offset == layout.HEAD_WORD * 4
    assert Mailbox.cmd_tail.offset == layout.TAIL_WORD * 4


def test_usual_entry_is_the_request_its_first_iovec_and_the_cdb_behind_the_response():
    entry = bytearray(layout.USUAL.size)
    layout.REQUEST.pack_into(entry, 0, 128 | 1, 7, 1, 0, 4711)
    layout.IOVEC.pack_into(entry, layout.IOVECS, 8192, 512)
    entry[layout.COMMAND_SIZE :] = bytes(range(16))
    assert layout.USUAL.unpack(entry) == (129, 7, 1, 0, 4711, 8192, 512, bytes(range(16)))


@pytest.mark.parametrize(
    ("opcode", "length"),
    [
        (0x00, 6),
        (0x12, 6),
        (0x28, 10),
        (0x5A, 10),
        (0x88, 16),
        (0x9E, 16),
        (0xA8, 12),
        (0xC0, 10),
        (0xFF, 10),
    ],
)
def test_length_of_a_cdb(opcode, length):
    assert layout.CDB_LENGTHS[opcode] == length
