"""Sense data, in both formats."""

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.sense import FieldPointer


def test_fixed_format() -> None:
    plain = sense.encode_fixed(sense.LBA_OUT_OF_RANGE)
    assert plain.hex(" ") == "70 00 05 00 00 00 00 0a 00 00 00 00 21 00 00 00 00 00"


def test_fixed_format_with_information() -> None:
    data = sense.encode_fixed(sense.MISCOMPARE, information=0x01020304)
    assert data[0] == 0xF0
    assert data[3:7].hex() == "01020304"


def test_fixed_format_leaves_out_information_that_does_not_fit() -> None:
    assert sense.encode_fixed(sense.MISCOMPARE, information=1 << 32) == sense.encode_fixed(sense.MISCOMPARE)


def test_field_pointers() -> None:
    assert FieldPointer(2).encode().hex() == "c00002"
    assert FieldPointer(1, 5).encode().hex() == "cd0001"
    assert FieldPointer(0x102, in_cdb=False).encode().hex() == "800102"
    assert sense.encode_fixed(sense.INVALID_FIELD_IN_CDB, pointer=FieldPointer(2))[15:18].hex() == "c00002"


def test_descriptor_format() -> None:
    data = sense.encode_descriptor(sense.MISCOMPARE, information=1 << 40, pointer=FieldPointer(1, 3))
    assert data[:8].hex(" ") == "72 0e 1d 00 00 00 00 14"
    assert data[8:20].hex() == "000a8000" + "0000010000000000"
    assert data[20:].hex() == "02060000cb000100"


def test_check_condition_answers_with_status_2() -> None:
    answer = sense.CheckCondition(sense.WRITE_PROTECTED).answer()
    assert answer == (2, sense.encode_fixed(sense.WRITE_PROTECTED), b"")
