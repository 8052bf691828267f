"""MODE SENSE and MODE SELECT."""

import struct

import pytest

from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.units import MiB, TiB

from .disk import Disk, pointer_of, row

LENGTHS = {0x01: 12, 0x08: 20, 0x0A: 12, 0x1C: 12}
SENSE = ["MODE SENSE (6)", "MODE SENSE (10)"]
SELECT = {"MODE SENSE (6)": "MODE SELECT (6)", "MODE SENSE (10)": "MODE SELECT (10)"}
both = pytest.mark.parametrize("name", SENSE)


def mode(name: str, disk: Disk | None = None, **fields: int) -> bytes:
    result = (disk or Disk()).command(name, in_length=255, allocation_length=255, **fields)
    assert result.good
    return result.data


def split(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, block descriptors, pages."""
    header = 4 if name == "MODE SENSE (6)" else 8
    length = data[3] if header == 4 else int.from_bytes(data[6:8], "big")
    first = data[0] + 1 if header == 4 else int.from_bytes(data[:2], "big") + 2
    assert first == len(data)
    return data[:header], data[header : header + length], data[header + length :]


def pages(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        found[data[0]] = data[: data[1] + 2]
        data = data[data[1] + 2 :]
    return found


@both
def test_all_pages_are_each_page(name: str) -> None:
    everything = pages(split(name, mode(name, page_code=0x3F))[2])
    assert {code: len(body) for code, body in everything.items()} == LENGTHS
    assert pages(split(name, mode(name, page_code=0x3F, subpage_code=0xFF))[2]) == everything
    for code, body in everything.items():
        assert split(name, mode(name, page_code=code))[2] == body


@both
def test_caching_page_and_header_follow_the_unit(name: str) -> None:
    for cache in (True, False):
        for read_only in (True, False):
            disk = Disk(write_cache=cache, read_only=read_only)
            header, _, body = split(name, mode(name, disk, page_code=0x08))
            assert bool(body[2] & 0x04) == cache
            device = header[2] if len(header) == 4 else header[3]
            assert device == (0x90 if read_only else 0x10), "WP and DPOFUA"


@both
def test_page_control(name: str) -> None:
    current = mode(name, page_code=0x3F)
    assert mode(name, page_code=0x3F, page_control=2) == current, "default"
    changeable = pages(split(name, mode(name, page_code=0x3F, page_control=1))[2])
    assert {code: len(body) for code, body in changeable.items()} == LENGTHS
    assert not any(any(body[2:]) for body in changeable.values())
    saved = Disk().command(name, in_length=255, allocation_length=255, page_code=0x3F, page_control=3)
    assert saved.sense == "05/39/00"


@both
def test_a_page_that_is_missing_is_refused(name: str) -> None:
    disk = Disk()
    result = disk.command(name, in_length=255, allocation_length=255, page_code=0x19)
    assert result.sense == "05/24/00"
    assert pointer_of(result.answer) == (True, 2, 5)
    assert (
        disk.command(name, in_length=255, allocation_length=255, page_code=8, subpage_code=1).sense
        == "05/24/00"
    )


@both
def test_block_descriptor(name: str) -> None:
    assert split(name, mode(name, page_code=8))[1] == struct.pack(">II", 2048, 512)
    assert split(name, mode(name, page_code=8, dbd=1))[1] == b""


def test_long_block_descriptor() -> None:
    header, descriptor, _ = split(SENSE[1], mode(SENSE[1], page_code=8, llbaa=1))
    assert header[4] == 1
    assert descriptor == struct.pack(">Q4xI", 2048, 512)
    header, descriptor, _ = split(SENSE[1], mode(SENSE[1], page_code=8, llbaa=1, dbd=1))
    assert (header[4], descriptor) == (0, b"")


def test_short_block_descriptor_of_a_large_disk_says_that_it_does_not_fit() -> None:
    unit = LogicalUnit(16 * TiB, 512, Identity)
    cdb = row("MODE SENSE (6)").encode(page_code=8, allocation_length=255)
    assert unit.command(cdb, [], 255).data[4:8] == b"\xff" * 4


def select(name: str, data: bytes, length: int | None = None, **fields: int):
    values = {"pf": 1, "parameter_list_length": len(data) if length is None else length} | fields
    return Disk().command(SELECT[name], data, **values)


@both
@pytest.mark.parametrize("options", [{}, {"dbd": 1}], ids=["descriptor", "none"])
def test_select_takes_what_sense_gave(name: str, options: dict[str, int]) -> None:
    for code in (0x3F, *LENGTHS):
        assert select(name, mode(name, page_code=code, **options)).good


def test_select_takes_a_long_descriptor() -> None:
    assert select(SENSE[1], mode(SENSE[1], page_code=8, llbaa=1)).good


@both
def test_select_of_any_other_value_is_refused_and_pointed_at(name: str) -> None:
    given = mode(name, page_code=0x3F)
    header, descriptor, _ = split(name, given)
    for at in range(len(header) + len(descriptor), len(given)):
        wrong = bytearray(given)
        wrong[at] ^= 0x40
        result = select(name, bytes(wrong))
        assert result.answer.status == 2
        if result.sense == "05/26/00":
            assert pointer_of(result.answer) == (False, at, None)
        else:
            assert result.sense == "05/1A/00"


@both
def test_select_cannot_change_the_geometry(name: str) -> None:
    header, _, body = split(name, mode(name, page_code=8))
    for blocks, size, good in (
        (0, 512, 1),
        (2048, 512, 1),
        (0xFFFFFFFF, 512, 1),
        (2047, 512, 0),
        (0, 4096, 0),
    ):
        result = select(name, header + struct.pack(">II", blocks, size) + body)
        assert result.good if good else result.sense == "05/26/00"


@both
def test_select_of_a_list_that_is_cut_off_is_refused(name: str) -> None:
    given = mode(name, page_code=0x3F)
    whole = {0} | {len(given) - sum(list(LENGTHS.values())[i:]) for i in range(5)}
    header, descriptor, _ = split(name, given)
    whole.add(len(header) + len(descriptor))
    for length in range(len(given)):
        result = select(name, given[:length])
        assert result.good if length in whole else result.sense == "05/1A/00"


@both
def test_select_checks_its_bits(name: str) -> None:
    given = mode(name, page_code=8)
    assert select(name, given, pf=0).sense == "05/24/00"
    assert select(name, given, sp=1).sense == "05/24/00"
    assert select(name, given, length=len(given) + 1).sense == "05/1A/00"
    medium = bytearray(given)
    medium[1 if name == SENSE[0] else 2] = 1
    assert select(name, bytes(medium)).sense == "05/26/00"


@both
def test_select_of_a_descriptor_of_a_wrong_length_is_refused(name: str) -> None:
    data = bytearray(mode(name, page_code=8))
    at = 3 if name == SENSE[0] else 7
    data[at] = 7
    result = select(name, bytes(data))
    assert result.sense == "05/26/00"
    assert pointer_of(result.answer) == (False, 3 if name == SENSE[0] else 6, None)


def test_mode_commands_do_not_write() -> None:
    assert not any(c.writes for c in COMMANDS if c.name.startswith("MODE"))
    assert Disk(MiB, read_only=True).command("MODE SELECT (6)", pf=1).good
