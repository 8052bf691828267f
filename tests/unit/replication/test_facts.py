"""What a peer may say of itself, and what is refused or read in the safer way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import facts as module
from tcmu_replication.replication.facts import Disk, Ending, Facts, check
from tcmu_replication.replication.identity import BLANK, Identity
from tcmu_replication.replication.stages import Mode
from tests.unit.replication.generations import A, B, C

SIZE = 1 << 20
GOOD = Facts((1, 2), "disk0", SIZE, Mode.PRIMARY, Disk.UPTODATE, Identity(A, B, (C,)), software="1.0")
SECONDARY = GOOD._replace(role=Mode.SECONDARY)
HUGE = 1 << 64

BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("protocol", {"protocol": (0, 1)}),
    ("protocol", {"protocol": (2, 1)}),
    ("protocol", {"protocol": (1, HUGE)}),
    ("protocol", {"protocol": (-1, -1)}),
    ("name", {"name": ""}),
    ("name", {"name": "x" * 256}),
    ("name", {"name": "disk0\x1b[2J"}),
    ("software", {"software": "x" * 256}),
    ("software", {"software": "1\n2"}),
    ("size", {"size": 0}),
    ("size", {"size": -1}),
    ("size", {"size": HUGE}),
    ("epoch", {"epoch": -1}),
    ("epoch", {"epoch": HUGE}),
    ("epoch", {"epoch": True}),
    ("dirty-bytes", {"dirty_bytes": -1}),
    ("dirty-bytes", {"dirty_bytes": SIZE + 1}),
    ("hot-bytes", {"hot_bytes": -1}),
    ("hot-bytes", {"hot_bytes": SIZE + 1}),
    ("dirty-without-base", {"identity": Identity(A), "dirty_bytes": 4096}),
    ("becoming-and-whole", {"role": Mode.SECONDARY, "disk": Disk.INCONSISTENT}),
    ("becoming-and-whole", {"identity": Identity(A, becoming=B)}),
    ("primary-not-uptodate", {"disk": Disk.OUTDATED}),
    (
        "primary-not-uptodate",
        {"disk": Disk.INCONSISTENT, "identity": Identity(A, becoming=B), "serving": True},
    ),
    ("serving-secondary", {"role": Mode.SECONDARY, "serving": True}),
    ("serving-blank", {"identity": BLANK, "serving": True}),
    ("promoted-secondary", {"role": Mode.SECONDARY, "promoted": True}),
    ("handing-over-primary", {"handing_over": True}),
]


@pytest.mark.parametrize(("rule", "changes"), BROKEN)
def test_peer_that_lies_is_refused(rule: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Error) as refused:
        check(GOOD._replace(**changes))
    assert refused.value.kind is Kind.PEER_LIED
    words = str(refused.value)
    assert words.isprintable()
    assert len(words) < 600
    assert "tcmu-replication status" in words
    found = next(r for r in (*module.RANGES, *module.CONTRADICTIONS) if r.name == rule)
    assert found.broken(GOOD._replace(**changes))


def test_every_rule_has_a_lie() -> None:
    names = {rule.name for rule in (*module.RANGES, *module.CONTRADICTIONS)}
    assert names == {rule for rule, _ in BROKEN}


@pytest.mark.parametrize(
    "identity", [Identity("x"), Identity(A, A), Identity("", A), Identity(A, "", ("../../etc/passwd",))]
)
def test_peer_whose_identity_is_impossible_is_refused(identity: Identity) -> None:
    with pytest.raises(Error, match="identity of its data is not possible") as refused:
        check(GOOD._replace(identity=identity))
    assert refused.value.kind is Kind.PEER_LIED


@pytest.mark.parametrize(
    "facts",
    [
        GOOD,
        SECONDARY,
        GOOD._replace(identity=BLANK),
        GOOD._replace(dirty_bytes=SIZE, hot_bytes=SIZE, ending=Ending.CRASHED, serving=True, promoted=True),
        SECONDARY._replace(identity=Identity(A, becoming=B), disk=Disk.INCONSISTENT),
        SECONDARY._replace(handing_over=True),
        GOOD._replace(size=4097, hot_bytes=8192, ending=Ending.KILLED),
    ],
)
def test_peer_that_is_possible_is_believed(facts: Facts) -> None:
    assert check(facts) is facts


def test_hot_extents_of_a_clean_end_are_counted_all_the_same() -> None:
    assert check(GOOD._replace(hot_bytes=4096)).ending is Ending.KILLED
    assert check(GOOD._replace(hot_bytes=4096, ending=Ending.CRASHED)).ending is Ending.CRASHED


@given(
    st.builds(
        Facts,
        protocol=st.tuples(st.integers(), st.integers()),
        name=st.text(),
        size=st.integers(),
        role=st.sampled_from(Mode),
        disk=st.sampled_from(Disk),
        identity=st.builds(Identity, st.text(), st.text(), st.lists(st.text()).map(tuple), st.text()),
        dirty_bytes=st.integers(),
        hot_bytes=st.integers(),
        ending=st.sampled_from(Ending),
        epoch=st.integers(),
        software=st.text(),
        promoted=st.booleans(),
        serving=st.booleans(),
        handing_over=st.booleans(),
    )
)
def test_noise_is_refused_with_a_sentence(facts: Facts) -> None:
    with pytest.raises(Error) as refused:
        check(facts)
    assert refused.value.kind is Kind.PEER_LIED
    assert str(refused.value).isprintable()
