"""The small commands about the unit's state: ready, sense, capacity, start and stop."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.command import Request
from tcmu_replication.scsi.failure import answer_to
from tcmu_replication.scsi.task import Answer, Op, Task

if TYPE_CHECKING:
    from tcmu_replication.scsi.unit import LogicalUnit

_LBPME = 0x80


def test_unit_ready(unit: LogicalUnit, request: Request) -> Answer:
    """TEST UNIT READY (SPC-5)."""
    error = unit.not_ready()
    return sense.GOOD if error is None else answer_to(error, Op.READ)


def request_sense(unit: LogicalUnit, request: Request) -> Answer:
    """REQUEST SENSE (SPC-5): the oldest unit attention, which this takes away, or no sense."""
    encode = sense.encode_descriptor if request["desc"] else sense.encode_fixed
    return Answer(sense.Status.GOOD, data=encode(unit.take_attention() or sense.NO_SENSE))


def read_capacity_10(unit: LogicalUnit, request: Request) -> Answer:
    """READ CAPACITY (10) (SBC-4): the last lba, all ones if it needs READ CAPACITY (16)."""
    last = min(unit.blocks - 1, 0xFFFFFFFF)
    return Answer(sense.Status.GOOD, data=struct.pack(">II", last, unit.block_size))


def read_capacity_16(unit: LogicalUnit, request: Request) -> Answer:
    """READ CAPACITY (16) (SBC-4): no protection, 2**exponent blocks a granule, thin (LBPME), LBPRZ 0."""
    exponent = unit.limits.granularity.bit_length() - 1
    data = struct.pack(">QIBBH16x", unit.blocks - 1, unit.block_size, 0, exponent, _LBPME << 8)
    return Answer(sense.Status.GOOD, data=data)


def start_stop(unit: LogicalUnit, request: Request) -> Answer | Task:
    """START STOP UNIT (SBC-4). The medium stays; stopping makes it durable, and the unit stays ready.

    A unit that one initiator could stop would be stopped for all of them.
    """
    if request["start"] or request["no_flush"]:
        return sense.GOOD
    return Task(Op.FLUSH)
