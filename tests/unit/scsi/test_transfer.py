"""Commands on the medium: which task they become, and what they are refused for."""

import struct

import pytest

from tcmu_replication.scsi.sense import GOOD
from tcmu_replication.scsi.task import Op, Task
from tcmu_replication.units import KiB, MiB

from .disk import Disk, pointer_of, row, sense_of, views

READS = ["READ (6)", "READ (10)", "READ (12)", "READ (16)"]
WRITES = ["WRITE (6)", "WRITE (10)", "WRITE (12)", "WRITE (16)"]
VERIFIES = ["VERIFY (10)", "VERIFY (12)", "VERIFY (16)"]
both_sizes = pytest.mark.parametrize("block_size", [512, 4096])


def unmap_list(*ranges: tuple[int, int], described: int | None = None) -> bytes:
    body = b"".join(struct.pack(">QI4x", lba, blocks) for lba, blocks in ranges)
    size = len(body) if described is None else described
    return struct.pack(">HH4x", size + 6, size) + body


@both_sizes
@pytest.mark.parametrize("name", READS)
def test_read_becomes_bytes(name: str, block_size: int) -> None:
    disk = Disk(MiB, block_size)
    task = disk.outcome(name, in_length=3 * block_size, lba=5, blocks=3)
    assert task == Task(Op.READ, 5 * block_size, 3 * block_size)


@both_sizes
@pytest.mark.parametrize("name", WRITES)
def test_write_becomes_bytes(name: str, block_size: int) -> None:
    disk = Disk(MiB, block_size)
    task = disk.outcome(name, bytes(3 * block_size), lba=5, blocks=3)
    assert task == Task(Op.WRITE, 5 * block_size, 3 * block_size)


def test_six_byte_transfers_of_zero_blocks_mean_256() -> None:
    disk = Disk()
    assert disk.outcome("READ (6)", in_length=MiB) == Task(Op.READ, 0, 128 * KiB)
    assert disk.outcome("WRITE (6)", bytes(128 * KiB)) == Task(Op.WRITE, 0, 128 * KiB)


@pytest.mark.parametrize("name", READS[1:] + WRITES[1:])
def test_fua_is_passed_on(name: str) -> None:
    task = Disk().outcome(name, bytes(512), 512, blocks=1, fua=1, dpo=1)
    assert isinstance(task, Task)
    assert task.fua


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_durable_without_a_write_cache(name: str) -> None:
    task = Disk(write_cache=False).outcome(name, bytes(128 * KiB), blocks=1)
    assert isinstance(task, Task)
    assert task.fua


@pytest.mark.parametrize("name", READS[1:] + WRITES[1:] + VERIFIES)
def test_transfer_of_no_blocks_does_nothing(name: str) -> None:
    assert Disk().outcome(name, lba=1) == GOOD


@pytest.mark.parametrize("name", READS)
def test_read_into_a_short_area_fills_what_there_is(name: str) -> None:
    assert Disk().outcome(name, in_length=700, lba=1, blocks=2) == Task(Op.READ, 512, 700)


@pytest.mark.parametrize("name", [*WRITES, "WRITE SAME (16)", "COMPARE AND WRITE"])
def test_write_with_too_little_data_is_refused(name: str) -> None:
    result = Disk().command(name, bytes(511), blocks=1)
    assert result.sense == "05/24/00"
    assert pointer_of(result.answer) == (True, row(name).by_name["blocks"].byte, None)


@pytest.mark.parametrize("name", WRITES)
def test_write_leaves_data_beyond_its_blocks_alone(name: str) -> None:
    disk = Disk()
    assert disk.command(name, b"\xaa" * 2000, lba=1, blocks=2).good
    assert disk.node.data == bytes(512) + b"\xaa" * 1024 + bytes(MiB - 1536)


def test_transfer_longer_than_the_recommended_is_served() -> None:
    task = Disk(8 * MiB, max_transfer=64 * KiB).outcome("READ (16)", in_length=8 * MiB, blocks=16384)
    assert task == Task(Op.READ, 0, 8 * MiB)


@pytest.mark.parametrize("name", VERIFIES)
def test_verify_kinds(name: str) -> None:
    disk = Disk()
    assert disk.outcome(name, lba=2, blocks=3) == Task(Op.VERIFY, 1024, 1536)
    assert disk.outcome(name, bytes(1536), lba=2, blocks=3, bytchk=1) == Task(
        Op.VERIFY, 1024, 1536, compare=True
    )
    once = disk.outcome(name, b"\x05" * 512, lba=2, blocks=3, bytchk=3)
    assert once == Task(Op.VERIFY, 1024, 1536, compare=True, pattern=b"\x05" * 512)
    assert disk.command(name, bytes(1536), blocks=3, bytchk=2).sense == "05/24/00"
    assert disk.command(name, bytes(1535), blocks=3, bytchk=1).sense == "05/24/00"
    assert disk.command(name, bytes(511), blocks=3, bytchk=3).sense == "05/24/00"


def test_verify_without_data_is_held_to_a_limit() -> None:
    disk = Disk(64 * MiB, 4096)
    assert disk.command("VERIFY (16)", blocks=8192).good
    assert disk.command("VERIFY (16)", blocks=8193).sense == "05/24/00"


@pytest.mark.parametrize("name", ["SYNCHRONIZE CACHE (10)", "SYNCHRONIZE CACHE (16)"])
def test_synchronize_cache_flushes_all(name: str) -> None:
    disk = Disk()
    for fields in ({}, {"immed": 1}, {"lba": 4, "blocks": 9}):
        assert disk.outcome(name, **fields) == Task(Op.FLUSH)


@pytest.mark.parametrize("name", ["WRITE SAME (10)", "WRITE SAME (16)"])
def test_write_same_repeats_a_block_and_knows_zeroes(name: str) -> None:
    disk = Disk()
    pattern = bytes(511) + b"\x01"
    assert disk.outcome(name, pattern, lba=1, blocks=4) == Task(Op.WRITE_SAME, 512, 2048, pattern=pattern)
    assert disk.outcome(name, bytes(512), lba=1, blocks=4) == Task(Op.WRITE_SAME, 512, 2048)
    unmap = disk.outcome(name, bytes(512), lba=1, blocks=4, unmap=1)
    assert unmap == Task(Op.WRITE_SAME, 512, 2048, unmap=True)


def test_write_same_16_without_data_writes_zeroes() -> None:
    assert Disk().outcome("WRITE SAME (16)", ndob=1, blocks=4) == Task(Op.WRITE_SAME, 0, 2048)


@pytest.mark.parametrize("name", ["WRITE SAME (10)", "WRITE SAME (16)"])
def test_write_same_of_no_blocks_is_refused(name: str) -> None:
    assert Disk().command(name, bytes(512), blocks=0).sense == "05/24/00"


def test_write_same_is_held_to_its_limit() -> None:
    disk = Disk(64 * MiB)
    assert disk.command("WRITE SAME (16)", bytes(512), blocks=disk.unit.limits.write_same).good
    assert (
        disk.command("WRITE SAME (16)", bytes(512), blocks=disk.unit.limits.write_same + 1).sense
        == "05/24/00"
    )


def test_compare_and_write_wants_exactly_twice_its_blocks() -> None:
    disk = Disk()
    assert disk.outcome("COMPARE AND WRITE", bytes(2048), lba=1, blocks=2) == Task(
        Op.COMPARE_AND_WRITE, 512, 1024
    )
    for blocks, size in ((2, 2047), (2, 2049), (1, 2048), (0, 512)):
        assert disk.command("COMPARE AND WRITE", bytes(size), blocks=blocks).sense == "05/24/00"
    assert disk.command("COMPARE AND WRITE", blocks=0).good


def test_compare_and_write_is_held_to_its_limit() -> None:
    disk = Disk()
    most = disk.unit.limits.compare_and_write
    assert disk.command("COMPARE AND WRITE", bytes(1024 * most), blocks=most).good
    assert disk.command("COMPARE AND WRITE", bytes(1024 * (most + 1)), blocks=most + 1).sense == "05/24/00"


def unmap(disk: Disk, data: bytes, length: int | None = None):
    return disk.command("UNMAP", data, parameter_list_length=len(data) if length is None else length)


def test_unmap_becomes_ranges_without_empty_ones() -> None:
    data = unmap_list((0, 8), (9, 0), (16, 1))
    task = Disk().outcome("UNMAP", data, parameter_list_length=len(data))
    assert task == Task(Op.UNMAP, ranges=((0, 4096), (8192, 512)))


def test_unmap_of_nothing_does_nothing() -> None:
    disk = Disk()
    assert unmap(disk, b"").good
    assert unmap(disk, unmap_list()).good
    assert unmap(disk, unmap_list((5, 0))).good


@pytest.mark.parametrize("length", [1, 7])
def test_unmap_list_shorter_than_its_header_is_refused(length: int) -> None:
    assert unmap(Disk(), bytes(length)).sense == "05/1A/00"


def test_unmap_with_less_data_than_the_cdb_says_is_refused() -> None:
    assert unmap(Disk(), unmap_list((0, 1)), length=100).sense == "05/1A/00"


def test_unmap_descriptor_that_is_cut_off_is_ignored() -> None:
    disk = Disk()
    data = unmap_list((0, 8), (8, 8))
    for length in (24 + 8, 24 + 15):
        task = disk.outcome("UNMAP", data, parameter_list_length=length)
        assert task == Task(Op.UNMAP, ranges=((0, 4096),))
    few = unmap_list((0, 8), (8, 8), described=16)
    assert disk.outcome("UNMAP", few, parameter_list_length=len(few)) == Task(Op.UNMAP, ranges=((0, 4096),))


def test_unmap_of_too_much_is_refused_with_a_pointer_into_the_list() -> None:
    disk = Disk(128 * MiB)
    most = disk.unit.limits.unmap
    result = unmap(disk, unmap_list((0, 8), (8, most)))
    assert result.sense == "05/26/00"
    assert pointer_of(result.answer) == (False, 32, None)
    many = [(i, 1) for i in range(disk.unit.limits.unmap_descriptors + 1)]
    assert unmap(disk, unmap_list(*many)).sense == "05/26/00"
    assert unmap(disk, unmap_list(*many[:-1])).good


def test_unmap_beyond_the_end_is_refused_and_nothing_is_unmapped() -> None:
    disk = Disk(64 * 512)
    disk.node.data[:] = b"\xaa" * len(disk.node.data)
    assert unmap(disk, unmap_list((0, 8), (60, 5))).sense == "05/21/00"
    assert disk.node.data.count(0xAA) == len(disk.node.data)


@pytest.mark.parametrize("name", ["WRITE SAME (16)", "COMPARE AND WRITE"])
def test_other_writes_are_durable_without_a_write_cache(name: str) -> None:
    task = Disk(write_cache=False).outcome(name, bytes(1024), blocks=1)
    assert isinstance(task, Task)
    assert task.fua


def test_data_out_may_come_in_pieces() -> None:
    unit = Disk().unit
    cdb = row("WRITE (10)").encode(blocks=2)
    assert isinstance(unit.command(cdb, views(bytes(1000), bytes(24)), 0), Task)
    short = unit.command(cdb, views(bytes(1000), bytes(23)), 0)
    assert str(sense_of(short)) == "05/24/00"
