"""INQUIRY: standard data and the pages, byte by byte where others depend on it."""

import struct

import pytest

from tcmu_replication.scsi import identity
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.units import KiB, MiB

from .disk import SERIAL, Disk, pointer_of, row

NAA = "60014053f2504e04f8941d39a0c0305e"  # as LIO makes it of SERIAL


def page(code: int, disk: Disk | None = None) -> bytes:
    result = (disk or Disk()).command(
        "INQUIRY", in_length=1024, evpd=1, page_code=code, allocation_length=1024
    )
    assert result.good
    assert result.data[:2] == bytes((0, code))
    assert int.from_bytes(result.data[2:4], "big") == len(result.data) - 4
    return result.data[4:]


def test_standard_data() -> None:
    data = Disk().command("INQUIRY", in_length=255, allocation_length=255).data
    assert len(data) == 96
    assert data[4] == 91
    assert data[0] == 0, "a disk"
    assert data[3] & 0x0F == 2
    assert data[7] & 0x02, "command queueing"
    assert data[8:36] == b"ACME    replication     1.0 "
    assert struct.unpack(">3H", data[58:64]) == (0x00A0, 0x0460, 0x04C0)


def test_supported_pages_are_those_that_answer() -> None:
    codes = page(0x00)
    assert codes == bytes((0x00, 0x80, 0x83, 0xB0, 0xB1, 0xB2))
    for code in codes:
        page(code)


@pytest.mark.parametrize(("evpd", "code"), [(1, 0x81), (1, 0xFF), (0, 0x80)])
def test_a_page_that_is_missing_is_refused(evpd: int, code: int) -> None:
    result = Disk().command("INQUIRY", in_length=64, evpd=evpd, page_code=code, allocation_length=64)
    assert result.sense == "05/24/00"
    assert pointer_of(result.answer) == (True, 2, None)


def test_unit_serial_page() -> None:
    assert page(0x80) == SERIAL.encode()


def test_identification_page_has_what_lio_gives() -> None:
    data = page(0x83)
    assert data[:4] == bytes((0x01, 0x03, 0, 16))
    assert data[4:20].hex() == NAA
    name = b"ACME    replication:" + SERIAL.encode() + b"\0"
    assert data[20:] == bytes((0x02, 0x01, 0, len(name))) + name


def test_without_a_serial_there_is_no_designator_that_two_units_could_share() -> None:
    unit = LogicalUnit(MiB, 512, Identity)
    cdb = row("INQUIRY").encode(evpd=1, page_code=0x83, allocation_length=255)
    assert unit.command(cdb, [], 255).data == bytes((0, 0x83, 0, 0))


def test_identity_is_asked_each_time() -> None:
    serials = iter(["", "abc"])
    unit = LogicalUnit(MiB, 512, lambda: Identity(serial=next(serials)))
    cdb = row("INQUIRY").encode(evpd=1, page_code=0x80, allocation_length=255)
    assert unit.command(cdb, [], 255).data[4:] == b""
    assert unit.command(cdb, [], 255).data[4:] == b"abc"


@pytest.mark.parametrize(
    ("serial", "digits"),
    [
        ("", "0" * 25),
        ("12", "12" + "0" * 23),
        ("xyz-ABCDEFg", "abcdef" + "0" * 19),
        ("0123456789abcdef" * 2, "0123456789abcdef012345678"),
    ],
)
def test_naa_takes_the_hex_digits_of_the_serial(serial: str, digits: str) -> None:
    assert identity.naa(Identity(serial=serial)).hex() == "6001405" + digits


def test_naa_begins_with_the_company_id() -> None:
    assert identity.naa(Identity(company_id=0xABCDEF)).hex() == "6abcdef" + "0" * 25


def test_names_that_are_too_long_or_foreign_are_made_to_fit() -> None:
    who = Identity(vendor="Größenwahn", product="p" * 300, revision="12345", serial="s" * 254)
    unit = LogicalUnit(MiB, 512, lambda: who)
    data = unit.command(row("INQUIRY").encode(allocation_length=255), [], 255).data
    assert data[8:16] == b"Gr??enwa"
    assert data[16:36] == b"p" * 16 + b"1234"
    assert len(identity.t10(who)) == 255


@pytest.mark.parametrize("block_size", [512, 4096])
def test_block_limits_page(block_size: int) -> None:
    disk = Disk(MiB, block_size, max_transfer=256 * KiB)
    data = page(0xB0, disk)
    assert len(data) == 0x3C
    assert data[0] == 1, "WSNZ"
    assert data[1] == min(64 * KiB // block_size, 255)
    grain = 4096 // block_size
    assert struct.unpack(">HII", data[2:12]) == (grain, 256 * KiB // block_size, 256 * KiB // block_size)
    lbas, descriptors, unmap_grain, alignment = struct.unpack(">IIII", data[16:32])
    assert (lbas, descriptors, unmap_grain, alignment) == (32 * MiB // block_size, 256, grain, 0x80000000)
    assert struct.unpack(">Q", data[32:40]) == (32 * MiB // block_size,)


def test_optimal_transfer_length_is_whole_granules() -> None:
    data = page(0xB0, Disk(MiB, 512, max_transfer=1023 * 512))
    assert struct.unpack(">II", data[4:12]) == (1023, 1016)


def test_characteristics_page_reports_nothing() -> None:
    assert page(0xB1) == bytes(60)


def test_provisioning_page_offers_unmap_but_promises_no_zeroes() -> None:
    assert page(0xB2) == bytes((0, 0xE0, 0x02, 0))
