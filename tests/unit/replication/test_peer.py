"""What a secondary may answer, and what its primary makes of it."""

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import peer
from tcmu_replication.replication.stages import Stage

STATE = {"stage": "running", "epoch": 7, "generation": "3f2a", "length": 4096}


def test_state_of_a_secondary_is_taken():
    assert peer.state_of(STATE) == peer.PeerState(Stage.RUNNING, 7, "3f2a", 4096, None)


@pytest.mark.parametrize(
    "lie",
    [
        {"stage": "walking"},
        {"epoch": -1},
        {"epoch": 1 << 63},
        {"epoch": "7"},
        {"length": 10**30},
        {"generation": "x" * 257},
        {"generation": "a\nb"},
        {"more\nthan": 1},
    ],
    ids=str,
)
def test_answer_that_is_no_state_is_a_lie_told_in_one_line(lie):
    with pytest.raises(Error, match="is not its state") as caught:
        peer.state_of(STATE | lie)
    assert caught.value.kind is Kind.PEER_LIED
    assert str(caught.value).isprintable()


def test_error_of_a_secondary_is_one_line():
    assert peer.state_of(STATE | {"error": "full\nERROR \x1b[31m"}).error == "full?ERROR ?[31m"
