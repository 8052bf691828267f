"""Status codes and sense data (SAM-5, SPC-5 4.4): what is said when a command does not end well."""

from __future__ import annotations

import enum
from typing import NamedTuple

from tcmu_replication.scsi.task import Answer


class Status(enum.IntEnum):
    """SAM status codes that this unit gives."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    BUSY = 0x08


class Sense(NamedTuple):
    """Sense key, additional sense code and its qualifier, as in "05/24/00"."""

    key: int
    asc: int
    ascq: int

    def __str__(self) -> str:
        return f"{self.key:02X}/{self.asc:02X}/{self.ascq:02X}"


class FieldPointer(NamedTuple):
    """The first wrong byte, in the CDB or in the parameter list, and the field's highest bit if not 7."""

    byte: int
    bit: int | None = None
    in_cdb: bool = True

    def encode(self) -> bytes:
        """The three sense-key specific bytes (SPC-5, field pointer)."""
        first = 0x80 | (0x40 if self.in_cdb else 0)
        if self.bit is not None:
            first |= 0x08 | self.bit
        return bytes((first,)) + self.byte.to_bytes(2, "big")


NO_SENSE = Sense(0x00, 0x00, 0x00)
WRITE_ERROR = Sense(0x03, 0x0C, 0x00)
UNRECOVERED_READ_ERROR = Sense(0x03, 0x11, 0x00)
INTERNAL_TARGET_FAILURE = Sense(0x04, 0x44, 0x00)
PARAMETER_LIST_LENGTH_ERROR = Sense(0x05, 0x1A, 0x00)
INVALID_OPERATION_CODE = Sense(0x05, 0x20, 0x00)
LBA_OUT_OF_RANGE = Sense(0x05, 0x21, 0x00)
INVALID_FIELD_IN_CDB = Sense(0x05, 0x24, 0x00)
INVALID_FIELD_IN_PARAMETER_LIST = Sense(0x05, 0x26, 0x00)
SAVING_PARAMETERS_NOT_SUPPORTED = Sense(0x05, 0x39, 0x00)
MODE_PARAMETERS_CHANGED = Sense(0x06, 0x2A, 0x01)
CAPACITY_CHANGED = Sense(0x06, 0x2A, 0x09)
WRITE_PROTECTED = Sense(0x07, 0x27, 0x00)
SPACE_ALLOCATION_FAILED = Sense(0x07, 0x27, 0x07)
NOT_READY = Sense(0x02, 0x04, 0x00)
BECOMING_READY = Sense(0x02, 0x04, 0x01)
MANUAL_INTERVENTION_REQUIRED = Sense(0x02, 0x04, 0x03)
COMMUNICATION_FAILURE = Sense(0x0B, 0x08, 0x00)
COMMUNICATION_TIME_OUT = Sense(0x0B, 0x08, 0x01)
MISCOMPARE = Sense(0x0E, 0x1D, 0x00)


def encode_fixed(sense: Sense, information: int | None = None, pointer: FieldPointer | None = None) -> bytes:
    """18 bytes of fixed format sense data. An `information` of more than 32 bits is left out: no room."""
    data = bytearray(18)
    data[0] = 0x70
    data[2], data[12], data[13] = sense
    data[7] = len(data) - 8
    if information is not None and information < 1 << 32:
        data[0] |= 0x80
        data[3:7] = information.to_bytes(4, "big")
    if pointer is not None:
        data[15:18] = pointer.encode()
    return bytes(data)


def encode_descriptor(
    sense: Sense, information: int | None = None, pointer: FieldPointer | None = None
) -> bytes:
    """Descriptor format sense data, with a descriptor for each of `information` and `pointer`."""
    descriptors = b""
    if information is not None:
        descriptors += bytes((0x00, 0x0A, 0x80, 0x00)) + information.to_bytes(8, "big")
    if pointer is not None:
        descriptors += bytes((0x02, 0x06, 0x00, 0x00)) + pointer.encode() + b"\0"
    return bytes((0x72, *sense, 0, 0, 0, len(descriptors))) + descriptors


class CheckCondition(Exception):  # noqa: N818  SAM calls it so
    """Ends a command with CHECK CONDITION. Raised inside scsi/, never seen outside of it."""

    def __init__(
        self, sense: Sense, information: int | None = None, pointer: FieldPointer | None = None
    ) -> None:
        super().__init__(str(sense))
        self.sense = sense
        self.information = information
        self.pointer = pointer

    def answer(self) -> Answer:
        """The command's end, with fixed format sense data."""
        return Answer(Status.CHECK_CONDITION, encode_fixed(self.sense, self.information, self.pointer))


GOOD = Answer(Status.GOOD)
BUSY = Answer(Status.BUSY)
"""Try again later: what a command gets that came at a bad moment, or stayed beyond its deadline."""


def miscompare(offset: int) -> Answer:
    """The end of a comparison that failed; `offset` (bytes) is the first difference in the Data-Out area."""
    return CheckCondition(MISCOMPARE, information=offset).answer()
