"""Every row of the command table, and REPORT SUPPORTED OPERATION CODES, which is made of it."""

import struct

import pytest

from tcmu_replication.scsi.command import Command, Data
from tcmu_replication.scsi.commands import COMMANDS

from .disk import Disk, pointer_of, row, sense_of

LENGTH_OF_GROUP = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}  # SPC-5, operation code groups
REFUSED = [(command, field) for command in COMMANDS for field in command.refused]
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)


def test_table_is_in_order_without_doubles() -> None:
    keys = [(c.opcode, c.action or 0) for c in COMMANDS]
    assert keys == sorted(set(keys))
    assert len({c.name for c in COMMANDS}) == len(COMMANDS)


@every_command
def test_row_has_the_length_of_its_group_and_fields_that_do_not_overlap(command: Command) -> None:
    assert command.length == LENGTH_OF_GROUP[command.opcode >> 5]
    seen = int.from_bytes(
        bytes((0xFF, 0x1F if command.action is not None else 0)).ljust(command.length, b"\0"), "big"
    )
    for field in command.fields:
        mask = int.from_bytes(command.mask(field), "big")
        assert mask.bit_count() == field.width
        assert not mask & seen, f"{field.name} overlaps"
        seen |= mask


@every_command
def test_encode_and_decode_agree(command: Command) -> None:
    values = {f.name: (0x5AA5_5AA5_5AA5_5AA5 + i) & (1 << f.width) - 1 for i, f in enumerate(command.fields)}
    cdb = command.encode(**values)
    assert {f.name: f.value(cdb) for f in command.fields} == values


@every_command
def test_a_cdb_that_is_cut_short_is_refused(command: Command) -> None:
    disk = Disk()
    for length in range(2, command.length):
        assert disk.send(command.encode()[:length], bytes(4096), 4096).sense == "05/24/00"


@pytest.mark.parametrize(("command", "field"), REFUSED, ids=lambda v: v.name)
def test_a_field_of_a_feature_that_is_missing_is_refused_and_pointed_at(command: Command, field) -> None:
    result = Disk().send(command.encode(**{field.name: 1}), bytes(4096), 4096)
    assert result.sense == "05/24/00"
    assert pointer_of(result.answer) == (True, field.byte, field.msb)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.writes], ids=lambda c: c.name)
def test_what_writes_is_refused_on_a_read_only_unit(command: Command) -> None:
    disk = Disk(read_only=True)
    assert disk.send(command.encode(), bytes(4096)).sense == "07/27/00"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "lba" in c.by_name], ids=lambda c: c.name)
def test_an_lba_beyond_the_end_is_refused(command: Command) -> None:
    disk = Disk(64 * 512)
    blocks = 2
    data = bytes(2 * blocks * 512)
    assert disk.send(command.encode(lba=62, blocks=blocks), data, len(data)).answer.status != 2
    for lba in (63, 64, (1 << command.by_name["lba"].width) - 1):
        assert disk.send(command.encode(lba=lba, blocks=blocks), data, len(data)).sense == "05/21/00"


def test_an_lba_beyond_the_end_is_refused_even_for_no_blocks() -> None:
    disk = Disk(64 * 512)
    for name in (
        "READ (10)",
        "READ (16)",
        "WRITE (12)",
        "VERIFY (10)",
        "COMPARE AND WRITE",
        "SYNCHRONIZE CACHE (16)",
    ):
        assert disk.command(name, lba=65).sense == "05/21/00"
        assert disk.command(name, lba=64).good


def test_everything_else_is_no_command() -> None:
    disk = Disk()
    known = {c.opcode for c in COMMANDS}
    for opcode in set(range(256)) - known:
        assert disk.send(bytes([opcode]) + bytes(31)).sense == "05/20/00"
    for opcode in {c.opcode for c in COMMANDS if c.action is not None}:
        actions = {c.action for c in COMMANDS if c.opcode == opcode}
        for action in set(range(32)) - actions:
            assert disk.send(bytes((opcode, action)) + bytes(30)).sense == "05/20/00"
    assert disk.send(b"").sense == "05/20/00"


def _report(disk: Disk, **fields: int) -> bytes:
    result = disk.command(
        "REPORT SUPPORTED OPERATION CODES", in_length=8192, allocation_length=8192, **fields
    )
    assert result.good
    return result.data


def test_report_of_all_commands_lists_the_table() -> None:
    data = _report(Disk())
    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 8 * len(COMMANDS)
    listed = [struct.unpack(">BxHxBH", data[at : at + 8]) for at in range(4, len(data), 8)]
    assert listed == [(c.opcode, c.action or 0, int(c.action is not None), c.length) for c in COMMANDS]


def test_report_of_all_commands_with_timeouts_has_a_descriptor_for_each() -> None:
    data = _report(Disk(), rctd=1)
    assert len(data) == 4 + 20 * len(COMMANDS)
    assert data[4 + 5] & 0x02
    assert data[4 + 8 : 4 + 10] == b"\x00\x0a"


@every_command
def test_report_of_one_command_gives_its_usage(command: Command) -> None:
    option = 1 if command.action is None else 2
    asked = {"requested_opcode": command.opcode, "requested_action": command.action or 0}
    data = _report(Disk(), reporting_options=option, **asked)
    assert data[1] & 0x07 == 3
    assert int.from_bytes(data[2:4], "big") == command.length == len(data) - 4
    assert data[4] == command.opcode
    assert data == _report(Disk(), reporting_options=3, **asked)
    for field in command.fields:
        mask = command.mask(field)
        assert all(data[4 + i] & byte == (0 if field.zero else byte) for i, byte in enumerate(mask))


def test_report_of_one_command_with_timeouts_appends_them() -> None:
    data = _report(Disk(), reporting_options=1, requested_opcode=0x28, rctd=1)
    assert data[1] == 0x83
    assert data[14:16] == b"\x00\x0a"
    assert len(data) == 4 + 10 + 12


@pytest.mark.parametrize(
    ("option", "opcode", "action"), [(1, 0x5E, 0), (2, 0xA3, 5), (3, 0xA3, 5), (3, 0x28, 1), (3, 0xFF, 0)]
)
def test_report_of_a_command_that_is_missing_says_so(option: int, opcode: int, action: int) -> None:
    data = _report(Disk(), reporting_options=option, requested_opcode=opcode, requested_action=action)
    assert data == bytes((0, 1, 0, 0))


@pytest.mark.parametrize(("option", "opcode"), [(1, 0xA3), (2, 0x28), (4, 0x28), (7, 0)])
def test_report_asked_in_a_way_that_does_not_fit_is_refused(option: int, opcode: int) -> None:
    result = Disk().command(
        "REPORT SUPPORTED OPERATION CODES", in_length=64, allocation_length=64,
        reporting_options=option, requested_opcode=opcode,
    )  # fmt: skip
    assert str(sense_of(result.answer)) == "05/24/00"


def test_usage_of_a_service_action_holds_its_value() -> None:
    usage = row("READ CAPACITY (16)").usage()
    assert usage[:2] == b"\x9e\x10"


@every_command
def test_data_direction_fits_the_fields(command: Command) -> None:
    if "allocation_length" in command.by_name:
        assert command.data is Data.IN
    if "parameter_list_length" in command.by_name or command.writes:
        assert command.data is Data.OUT
