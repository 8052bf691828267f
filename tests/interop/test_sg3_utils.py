"""What sg3_utils reads in our pages, sense data and command table."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.commands import COMMANDS
from tests.support.tools import requires
from tests.unit.scsi.disk import IDENTITY, SERIAL, Disk, sense_of

pytestmark = [pytest.mark.interop, requires("sg_inq", "sg_vpd", "sg_decode_sense")]

MEANINGS = {
    sense.NO_SENSE: ("No Sense", "No additional sense information"),
    sense.WRITE_ERROR: ("Medium Error", "Write error"),
    sense.UNRECOVERED_READ_ERROR: ("Medium Error", "Unrecovered read error"),
    sense.INTERNAL_TARGET_FAILURE: ("Hardware Error", "Internal target failure"),
    sense.PARAMETER_LIST_LENGTH_ERROR: ("Illegal Request", "Parameter list length error"),
    sense.INVALID_OPERATION_CODE: ("Illegal Request", "Invalid command operation code"),
    sense.LBA_OUT_OF_RANGE: ("Illegal Request", "Logical block address out of range"),
    sense.INVALID_FIELD_IN_CDB: ("Illegal Request", "Invalid field in cdb"),
    sense.INVALID_FIELD_IN_PARAMETER_LIST: ("Illegal Request", "Invalid field in parameter list"),
    sense.SAVING_PARAMETERS_NOT_SUPPORTED: ("Illegal Request", "Saving parameters not supported"),
    sense.MODE_PARAMETERS_CHANGED: ("Unit Attention", "Mode parameters changed"),
    sense.CAPACITY_CHANGED: ("Unit Attention", "Capacity data has changed"),
    sense.WRITE_PROTECTED: ("Data Protect", "Write protected"),
    sense.SPACE_ALLOCATION_FAILED: ("Data Protect", "Space allocation failed write protect"),
    sense.NOT_READY: ("Not Ready", "Logical unit not ready, cause not reportable"),
    sense.BECOMING_READY: ("Not Ready", "in process of becoming ready"),
    sense.MANUAL_INTERVENTION_REQUIRED: ("Not Ready", "manual intervention required"),
    sense.COMMUNICATION_FAILURE: ("Aborted Command", "Logical unit communication failure"),
    sense.COMMUNICATION_TIME_OUT: ("Aborted Command", "Logical unit communication time-out"),
    sense.MISCOMPARE: ("Miscompare", "Miscompare during verify operation"),
}


def decode(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


def page(tmp_path: Path, code: int) -> str:
    file = tmp_path / "page"
    file.write_bytes(
        Disk().command("INQUIRY", in_length=255, allocation_length=255, evpd=1, page_code=code).data
    )
    return decode("sg_vpd", "--raw", f"--inhex={file}", f"--page={code:#x}")


def test_standard_inquiry(tmp_path: Path) -> None:
    file = tmp_path / "inquiry"
    file.write_bytes(Disk().command("INQUIRY", in_length=255, allocation_length=255).data)
    text = decode("sg_inq", "--raw", f"--inhex={file}")
    assert "[SPC-4]" in text
    assert "CmdQue=1" in text
    assert "Peripheral device type: disk" in text
    assert f"Vendor identification: {IDENTITY.vendor}" in text
    assert f"Product identification: {IDENTITY.product}" in text
    assert f"Product revision level: {IDENTITY.revision}" in text


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0x00, ["[sv]", "[sn]", "[di]", "[bl]", "[bdc]", "[lbpv]"]),
        (0x80, [f"Unit serial number: {SERIAL}"]),
        (
            0x83,
            [
                "0x60014053f2504e04f8941d39a0c0305e",
                "vendor id: ACME",
                f"vendor specific: replication:{SERIAL}",
            ],
        ),
        (
            0xB0,
            [
                "Write same non-zero (WSNZ): 1",
                "Maximum compare and write length: 128 blocks",
                "Maximum transfer length: 2048 blocks",
                "Maximum unmap LBA count: 65536",
                "Maximum unmap block descriptor count: 256",
                "Optimal unmap granularity: 8 blocks",
                "Unmap granularity alignment: 0",
                "Maximum write same length: 0x10000 blocks",
            ],
        ),
        (0xB1, ["Medium rotation rate is not reported"]),
        (
            0xB2,
            [
                "(LBPU): 1",
                "(LBPWS): 1",
                "(LBPWS10): 1",
                "(LBPRZ): 0",
                "Provisioning type: 2 (thin provisioned)",
            ],
        ),
    ],
)
def test_vital_product_data(tmp_path: Path, code: int, expected: list[str]) -> None:
    text = page(tmp_path, code)
    assert [phrase for phrase in expected if phrase not in text] == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_row_has_the_name_of_its_cdb(command) -> None:
    text = decode("sg_decode_sense", "--cdb", *command.encode().hex(" ").split())
    assert text.strip().lower() == command.name.replace(" (", "(").lower()


def test_every_sense_is_tried() -> None:
    assert {value for value in vars(sense).values() if isinstance(value, sense.Sense)} == set(MEANINGS)


@pytest.mark.parametrize("encode", [sense.encode_fixed, sense.encode_descriptor])
@pytest.mark.parametrize("what", MEANINGS, ids=str)
def test_sense_is_what_its_name_says(what: sense.Sense, encode) -> None:
    text = decode("sg_decode_sense", *encode(what).hex(" ").split()).lower()
    assert [phrase for phrase in MEANINGS[what] if phrase.lower() not in text] == []


def test_field_pointer_and_information() -> None:
    wrong = Disk().command("READ (16)", in_length=512, blocks=1, rdprotect=1).answer
    text = decode("sg_decode_sense", *wrong.sense.hex(" ").split())
    assert "Error in Command: byte 1 bit 7" in text
    differs = Disk().command("VERIFY (10)", bytes(300) + b"!" + bytes(211), bytchk=1, blocks=1).answer
    assert str(sense_of(differs)) == "0E/1D/00"
    assert "Info fld=0x12c [300]" in decode("sg_decode_sense", *differs.sense.hex(" ").split())
