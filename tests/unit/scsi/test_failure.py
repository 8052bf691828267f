"""Errors of the chain as SCSI says them."""

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.scsi.failure import ANSWER_OF_KIND, answer_to
from tcmu_replication.scsi.sense import BUSY
from tcmu_replication.scsi.task import Op

from .disk import sense_of


def test_every_kind_has_an_answer_that_is_not_good() -> None:
    assert set(ANSWER_OF_KIND) == set(Kind)
    for answers in ANSWER_OF_KIND.values():
        for answer in answers:
            assert answer.status != 0
            assert bool(answer.sense) == (answer.status == 2)


@pytest.mark.parametrize(
    ("kind", "op", "sense"),
    [
        (Kind.IO, Op.READ, "03/11/00"),
        (Kind.IO, Op.VERIFY, "03/11/00"),
        (Kind.IO, Op.WRITE, "03/0C/00"),
        (Kind.IO, Op.FLUSH, "03/0C/00"),
        (Kind.NO_SPACE, Op.WRITE, "07/27/07"),
        (Kind.READ_ONLY, Op.UNMAP, "07/27/00"),
        (Kind.OUT_OF_RANGE, Op.READ, "05/21/00"),
        (Kind.PEER_LOST, Op.WRITE, "0B/08/00"),
        (Kind.TIMED_OUT, Op.WRITE, "0B/08/01"),
        (Kind.INVALID_STATE, Op.READ, "02/04/00"),
    ],
)
def test_sense_of_a_failure(kind: Kind, op: Op, sense: str) -> None:
    assert str(sense_of(answer_to(Error(kind), op))) == sense


def test_what_was_cancelled_is_to_be_sent_again() -> None:
    assert answer_to(Error(Kind.CANCELLED), Op.WRITE) is BUSY
