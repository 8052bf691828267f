"""Fields: where their bits are."""

import pytest

from tcmu_replication.scsi.command import Field

from .disk import row


@pytest.mark.parametrize(
    ("field", "cdb", "value"),
    [
        (Field("whole bytes", 2, 16), "00 00 12 34", 0x1234),
        (Field("top bits", 1, 3), "00 a0", 5),
        (Field("low bits", 1, 5, msb=4), "00 ff", 0x1F),
        (Field("one bit", 1, 1, msb=3), "00 08", 1),
        (Field("bits and bytes", 1, 21, msb=4), "00 ff 00 01", 0x1F0001),
    ],
    ids=lambda v: v.name if isinstance(v, Field) else None,
)
def test_value_of_a_field(field: Field, cdb: str, value: int) -> None:
    assert field.value(bytes.fromhex(cdb)) == value


def test_field_pointer_names_the_highest_bit_of_a_part_of_a_byte() -> None:
    assert Field("bits", 1, 2, msb=5).pointer() == (1, 5, True)
    assert Field("bytes", 2, 32).pointer() == (2, None, True)


def test_encoded_cdbs_are_those_of_the_standard() -> None:
    assert row("READ (6)").encode(lba=0x1ABCDE, blocks=9).hex() == "081abcde0900"
    assert row("WRITE (10)").encode(lba=0x01020304, blocks=0x0506, fua=1).hex() == "2a080102030400050600"
    assert row("READ (12)").encode(lba=1, blocks=2, dpo=1).hex() == "a81000000001000000020000"
    assert row("WRITE (16)").encode(lba=1 << 40, blocks=3).hex() == "8a000000010000000000000000030000"
    assert row("READ CAPACITY (16)").encode(allocation_length=32).hex() == "9e100000000000000000000000200000"
    assert row("COMPARE AND WRITE").encode(lba=7, blocks=1).hex() == "89000000000000000007000000010000"
    assert row("UNMAP").encode(parameter_list_length=24).hex() == "42000000000000001800"
    assert row("MODE SENSE (10)").encode(page_code=8, page_control=1, dbd=1, allocation_length=255).hex() == (
        "5a0848000000" + "0000ff00"
    )


def test_layout_unpacks_what_the_fields_say() -> None:
    command = row("READ (16)")
    cdb = command.encode(lba=0x0102030405060708, blocks=0x090A0B0C, fua=1)
    flags, lba, blocks = command.layout("lba", "blocks").unpack_from(cdb + b"padding")
    assert (flags, lba, blocks) == (0x08, 0x0102030405060708, 0x090A0B0C)
