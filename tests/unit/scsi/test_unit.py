"""The unit's state: capacity, attention, sense, start and stop, geometry."""

import struct

import pytest

from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.sense import CAPACITY_CHANGED, MODE_PARAMETERS_CHANGED, Sense
from tcmu_replication.scsi.task import Op, Task
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.units import MiB, TiB

from .disk import Disk


@pytest.mark.parametrize(("length", "block_size"), [(MiB, 520), (MiB, 0), (511, 512), (0, 512), (4095, 4096)])
def test_geometry_that_cannot_be_is_refused(length: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"block|bytes"):
        LogicalUnit(length, block_size, Identity)


@pytest.mark.parametrize("granularity", [0, 256, 3 * 512])
def test_granularity_that_cannot_be_is_refused(granularity: int) -> None:
    with pytest.raises(ValueError, match="granularity"):
        LogicalUnit(MiB, 512, Identity, granularity=granularity)


def test_a_part_of_a_block_at_the_end_is_left_out() -> None:
    assert Disk(10 * 512 + 511).unit.blocks == 10


@pytest.mark.parametrize(
    ("length", "block_size", "last"), [(MiB, 512, 2047), (MiB, 4096, 255), (2 * TiB, 512, 0xFFFFFFFF)]
)
def test_read_capacity_10(length: int, block_size: int, last: int) -> None:
    unit = LogicalUnit(length, block_size, Identity)
    answer = unit.command(bytes((0x25,)) + bytes(9), [], 8)
    assert answer.data == struct.pack(">II", last, block_size)


def test_read_capacity_10_of_a_disk_that_needs_16() -> None:
    unit = LogicalUnit(16 * TiB, 512, Identity)
    assert unit.command(bytes((0x25,)) + bytes(9), [], 8).data[:4] == b"\xff" * 4


@pytest.mark.parametrize(("block_size", "exponent"), [(512, 3), (4096, 0)])
def test_read_capacity_16(block_size: int, exponent: int) -> None:
    data = Disk(MiB, block_size).command("READ CAPACITY (16)", in_length=64, allocation_length=32).data
    assert len(data) == 32
    assert struct.unpack(">QI", data[:12]) == (MiB // block_size - 1, block_size)
    assert data[12] == 0
    assert data[13] == exponent
    assert data[14:16] == b"\x80\x00"  # LBPME, and LBPRZ is not promised


def test_answers_are_cut_to_the_allocation_length_and_to_the_area() -> None:
    disk = Disk()
    assert len(disk.command("INQUIRY", in_length=255, allocation_length=5).data) == 5
    assert len(disk.command("INQUIRY", in_length=7, allocation_length=255).data) == 7
    assert disk.command("INQUIRY", in_length=255, allocation_length=0).good
    assert len(disk.command("READ CAPACITY (10)", in_length=3).data) == 3


def test_a_new_size_is_told_once_and_holds_at_once() -> None:
    disk = Disk(MiB)
    disk.unit.resize(2 * MiB)
    disk.unit.resize(4 * MiB)
    assert disk.command("TEST UNIT READY").sense == str(CAPACITY_CHANGED) == "06/2A/09"
    assert disk.command("TEST UNIT READY").good
    assert disk.unit.blocks == 8192
    disk.unit.resize(4 * MiB)
    assert disk.command("TEST UNIT READY").good


def test_a_smaller_size_bounds_transfers() -> None:
    disk = Disk(MiB)
    disk.unit.resize(512)
    disk.unit.take_attention()
    assert disk.command("READ (10)", in_length=512, lba=1, blocks=1).sense == "05/21/00"
    with pytest.raises(ValueError, match="less than one block"):
        disk.unit.resize(0)


def test_a_changed_write_cache_is_told() -> None:
    disk = Disk()
    disk.unit.set_write_cache(True)
    assert disk.command("TEST UNIT READY").good
    disk.unit.set_write_cache(False)
    assert disk.command("READ (6)").sense == str(MODE_PARAMETERS_CHANGED) == "06/2A/01"
    assert disk.outcome("WRITE (10)", bytes(512), blocks=1) == Task(Op.WRITE, 0, 512, fua=True)


def test_inquiry_passes_an_attention_by() -> None:
    disk = Disk()
    disk.unit.attention(CAPACITY_CHANGED)
    assert disk.command("INQUIRY", in_length=36, allocation_length=36).good
    assert disk.command("TEST UNIT READY").sense == "06/2A/09"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_an_attention_comes_before_any_other_command(command) -> None:
    disk = Disk()
    disk.unit.attention(CAPACITY_CHANGED)
    result = disk.send(command.encode(), bytes(1024), 4096)
    if command.name in ("INQUIRY", "REQUEST SENSE"):
        assert result.good
    else:
        assert result.sense == "06/2A/09"


def test_request_sense_takes_attentions_away_in_order() -> None:
    disk = Disk()
    disk.unit.attention(CAPACITY_CHANGED)
    disk.unit.attention(MODE_PARAMETERS_CHANGED)
    first = disk.command("REQUEST SENSE", in_length=252, allocation_length=252).data
    assert (first[0], first[2], first[12], first[13]) == (0x70, *CAPACITY_CHANGED)
    second = disk.command("REQUEST SENSE", in_length=252, allocation_length=252, desc=1).data
    assert second == bytes((0x72, *MODE_PARAMETERS_CHANGED, 0, 0, 0, 0))
    third = disk.command("REQUEST SENSE", in_length=252, allocation_length=252).data
    assert third == bytes((0x70, 0, 0, 0, 0, 0, 0, 10)) + bytes(10)


def test_stop_makes_durable_and_the_unit_stays_ready() -> None:
    disk = Disk()
    assert disk.outcome("START STOP UNIT", start=0) == Task(Op.FLUSH)
    assert disk.command("START STOP UNIT", start=0, no_flush=1).good
    assert disk.command("START STOP UNIT", start=1, immed=1).good
    assert disk.command("TEST UNIT READY").good


def test_sense_prints_as_people_write_it() -> None:
    assert str(Sense(0x0B, 0x08, 0x01)) == "0B/08/01"
