"""The SCSI edge of errors: which answer a failed task gets, kind by kind.

Linux retries ABORTED COMMAND a few times, and BUSY and NOT READY 04/01 (becoming
ready) for as long as the command's time allows; it takes MEDIUM ERROR and NOT READY
04/00 and 04/03 as final. The rows choose by that. A row is (on reading, on writing).
"""

from __future__ import annotations

from tcmu_replication.errors import Error, Kind
from tcmu_replication.scsi import sense
from tcmu_replication.scsi.task import Answer, Op


def _ends(reading: sense.Sense, writing: sense.Sense | None = None) -> tuple[Answer, Answer]:
    first, second = (sense.CheckCondition(s).answer() for s in (reading, writing or reading))
    return first, second


ANSWER_OF_KIND: dict[Kind, tuple[Answer, Answer]] = {
    Kind.IO: _ends(sense.UNRECOVERED_READ_ERROR, sense.WRITE_ERROR),
    Kind.NO_SPACE: _ends(sense.UNRECOVERED_READ_ERROR, sense.SPACE_ALLOCATION_FAILED),
    Kind.OUT_OF_RANGE: _ends(sense.LBA_OUT_OF_RANGE),
    Kind.UNALIGNED: _ends(sense.INVALID_FIELD_IN_CDB),
    Kind.UNSUPPORTED: _ends(sense.INVALID_FIELD_IN_CDB),
    Kind.INVALID_STATE: _ends(sense.NOT_READY),
    Kind.BAD_REQUEST: _ends(sense.INTERNAL_TARGET_FAILURE),
    Kind.BAD_CONFIG: _ends(sense.INTERNAL_TARGET_FAILURE),
    Kind.NOT_FOUND: _ends(sense.NOT_READY),
    Kind.READ_ONLY: _ends(sense.WRITE_PROTECTED),
    Kind.MISCOMPARE: _ends(sense.MISCOMPARE),
    Kind.CONFLICT: (sense.BUSY, sense.BUSY),
    Kind.PERMISSION: _ends(sense.UNRECOVERED_READ_ERROR, sense.WRITE_PROTECTED),
    Kind.PEER_LOST: _ends(sense.COMMUNICATION_FAILURE),
    Kind.PEER_LIED: _ends(sense.COMMUNICATION_FAILURE),
    Kind.TIMED_OUT: _ends(sense.COMMUNICATION_TIME_OUT),
    Kind.CANCELLED: (sense.BUSY, sense.BUSY),
    Kind.NOT_READY: _ends(sense.MANUAL_INTERVENTION_REQUIRED),
    Kind.BECOMING_READY: _ends(sense.BECOMING_READY),
}

_READS = frozenset((Op.READ, Op.VERIFY))


def answer_to(error: Error, op: Op) -> Answer:
    """The end of a task of kind `op` that failed with `error`."""
    reading, writing = ANSWER_OF_KIND[error.kind]
    return reading if op in _READS else writing
