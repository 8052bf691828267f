"""The handshake's verdict: every row is reached, both ends agree, and nothing is overwritten on a contradiction."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcmu_replication.replication import verdict
from tcmu_replication.replication.facts import Disk, Ending, Facts, check
from tcmu_replication.replication.identity import BLANK, Identity
from tcmu_replication.replication.stages import Mode
from tcmu_replication.replication.verdict import (
    TABLE,
    Found,
    Side,
    Span,
    compare,
    mirror_spans,
    row_named,
)
from tests.unit.replication.generations import A, B, C, D, E, generation

SIZE = 1 << 30
KILLED, CRASHED = Ending.KILLED, Ending.CRASHED


def primary(identity: Identity = Identity(A), **changes: Any) -> Facts:  # noqa: B008 - immutable
    good = Facts((1, 2), "disk0", SIZE, Mode.PRIMARY, Disk.UPTODATE, identity, software="1.2")
    return check(good._replace(**changes))


def secondary(identity: Identity = Identity(A), **changes: Any) -> Facts:  # noqa: B008 - immutable
    disk = Disk.INCONSISTENT if identity.becoming else Disk.UPTODATE
    return primary(identity, **{"role": Mode.SECONDARY, "disk": disk} | changes)


MIX = Identity(A, becoming=B)
CASES: dict[str, tuple[Facts, Facts]] = {
    "versions": (primary(), secondary(protocol=(3, 4))),
    "names": (primary(), secondary(name="disk1")),
    "sizes": (primary(), secondary(size=SIZE * 2)),
    "both-blank": (primary(BLANK), secondary(BLANK)),
    "nobody-whole": (secondary(MIX), secondary(Identity(B, becoming=A))),
    "they-are-blank": (primary(), secondary(BLANK)),
    "both-primary": (primary(), primary()),
    "contradiction": (primary(Identity(A, B)), secondary(Identity(B, A))),
    "they-become-ours": (primary(Identity(B, A), dirty_bytes=8192), secondary(MIX)),
    "they-become-our-base": (primary(Identity(C, B, (A,)), dirty_bytes=4096), secondary(MIX)),
    "they-become-our-past": (primary(Identity(D, C, (B, A))), secondary(MIX)),
    "they-are-a-mix": (primary(Identity(C, A)), secondary(MIX)),
    "same-and-primary-counts": (primary(Identity(A, B), dirty_bytes=4096), secondary()),
    "same-and-counted": (primary(), secondary(Identity(A, B), dirty_bytes=4096)),
    "same-and-they-are-outdated": (
        primary(hot_bytes=4096, ending=CRASHED),
        secondary(disk=Disk.OUTDATED),
    ),
    "same-and-they-crashed": (secondary(), primary(hot_bytes=4096, ending=CRASHED)),
    "same-and-hot": (primary(hot_bytes=4096, ending=KILLED), secondary()),
    "same-and-nobody-primary": (secondary(hot_bytes=4096, ending=KILLED), secondary()),
    "in-sync": (primary(), secondary()),
    "behind-and-written": (secondary(Identity(B, A)), primary(Identity(A, C), dirty_bytes=4096)),
    "they-are-behind": (primary(Identity(B, A), dirty_bytes=8192), secondary(hot_bytes=4096, ending=CRASHED)),
    "they-are-far-behind": (primary(Identity(C, B, (A,))), secondary()),
    "parted": (primary(Identity(B, A), dirty_bytes=8192), primary(Identity(C, A), dirty_bytes=4096)),
    "unrelated": (primary(Identity(A, B)), secondary(Identity(C, D, (E,)))),
}
MIRRORS = {
    "we-are-blank": "they-are-blank",
    "we-become-theirs": "they-become-ours",
    "we-become-their-base": "they-become-our-base",
    "we-become-their-past": "they-become-our-past",
    "we-are-a-mix": "they-are-a-mix",
    "same-and-their-primary-counts": "same-and-primary-counts",
    "same-and-we-are-outdated": "same-and-they-are-outdated",
    "same-and-we-crashed": "same-and-they-crashed",
    "same-and-hot-there": "same-and-hot",
    "ahead-and-written": "behind-and-written",
    "we-are-behind": "they-are-behind",
    "we-are-far-behind": "they-are-far-behind",
}
CASES |= {mirror: CASES[name][::-1] for mirror, name in MIRRORS.items()}


def test_every_row_has_a_case() -> None:
    assert {row.name for row in TABLE} == set(CASES)
    assert len(TABLE) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_case_is_its_rows(name: str) -> None:
    verdict = compare(*CASES[name])
    assert verdict.row == name
    assert verdict.found is row_named(name).found
    assert "{" not in verdict.words + (verdict.advice or "")


@pytest.mark.parametrize("name", CASES)
def test_verdict_that_waits_for_the_operator_names_the_command(name: str) -> None:
    verdict = compare(*CASES[name])
    if verdict.found.proceeds and name != "same-and-nobody-primary":
        assert verdict.advice is None
    elif verdict.found is Found.REFUSED and name in ("versions", "names"):
        assert "until that is mended" in (verdict.advice or "")
    else:
        assert "`tcmu-replication " in (verdict.advice or "")
        assert "--force" not in (verdict.advice or "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sizes", "disk0 has 1073741824 bytes here and 2147483648 bytes on the peer"),
        ("versions", "this one speaks 1 to 2, the peer 3 to 4"),
        ("names", "this host has the resource disk0, the peer says disk1"),
        ("they-are-behind", "the peer is behind: 12 KiB are missing there"),
        ("we-are-behind", "this host is behind: 12 KiB are missing here"),
        ("parted", "here 8 KiB, there 4 KiB"),
        ("same-and-counted", "0 B count as different here and 4 KiB on the peer"),
    ],
)
def test_words_have_both_values(name: str, words: str) -> None:
    assert words in compare(*CASES[name]).words


def test_behind_is_resynced_by_the_map_and_what_was_hot_on_either() -> None:
    verdict = compare(*CASES["they-are-behind"])
    assert verdict.source is Side.MINE
    assert set(verdict.spans) == {Span.MY_DIRTY, Span.THEIR_DIRTY, Span.MY_HOT, Span.THEIR_HOT}


def test_primary_that_lost_its_page_cache_is_not_the_source() -> None:
    """What it had acknowledged and not flushed is on the secondary alone."""
    verdict = compare(primary(hot_bytes=4096, ending=CRASHED), secondary())
    assert verdict.found is Found.HOT
    assert verdict.source is Side.THEIRS


def test_both_lost_power_the_primary_is_the_source() -> None:
    verdict = compare(primary(hot_bytes=4096, ending=CRASHED), secondary(hot_bytes=8192, ending=CRASHED))
    assert (verdict.found, verdict.source) == (Found.HOT, Side.MINE)


def test_equal_identities_with_dirty_blocks_are_never_in_sync() -> None:
    """DRBD's: a peer whose identity is equal and whose map is not empty was taken for in sync."""
    for mine in (primary(), primary(Identity(A, B), dirty_bytes=4096)):
        for theirs in (secondary(Identity(A, C), dirty_bytes=8192), secondary()):
            if mine.identity.base or theirs.identity.base:
                assert compare(mine, theirs).found is not Found.IN_SYNC


def test_activity_log_that_is_lost_makes_everything_hot() -> None:
    """DRBD's: a crash with the activity log off was taken for in sync."""
    verdict = compare(primary(hot_bytes=SIZE, ending=CRASHED), secondary())
    assert verdict.found is Found.HOT
    assert "1 GiB" in verdict.words


def test_replay_of_an_old_identity_becomes_no_source() -> None:
    """A host whose record was restored from a backup has a past of the other as its present."""
    assert compare(primary(Identity(A)), primary(Identity(C, B, (A,)))).source is Side.THEIRS


def test_partial_history_is_no_unrelated_data() -> None:
    """DRBD's: a history that was cut off on one side made related data unrelated."""
    assert compare(primary(Identity(D, C)), primary(Identity(E, B, (C,)))).found is Found.SPLIT_BRAIN


def test_source_of_what_the_operator_decides_is_never_a_mix() -> None:
    for name in ("they-are-a-mix", "unrelated"):
        mine, _ = CASES[name]
        theirs = secondary(Identity(E, becoming=D)) if name == "unrelated" else CASES[name][1]
        assert compare(mine, theirs).may_be_source == {Side.MINE}


def test_blank_host_is_never_the_source_for_one_that_has_an_identity() -> None:
    assert compare(*CASES["we-are-blank"]).may_be_source == {Side.THEIRS}


NAMES = [generation(letter) for letter in "ABCD"]
IDENTITIES = [
    Identity(names[0], base and names[1], history, becoming)
    for names in itertools.permutations(NAMES, 3)
    for base in ("", names[1])
    for history in ((), (names[2],), tuple(sorted({names[1], names[2]} - {base})))
    for becoming in (*[""] * 4, *NAMES)
] + [BLANK]
FACTS = st.builds(
    lambda identity, role, outdated, dirty, hot, ending, protocol, size: Facts(
        protocol,
        "disk0",
        size,
        Mode.SECONDARY if identity.becoming else role,
        Disk.INCONSISTENT if identity.becoming else Disk.OUTDATED if outdated else Disk.UPTODATE,
        identity,
        dirty if identity.base else 0,
        hot,
        ending,
    ),
    st.sampled_from(IDENTITIES),
    st.sampled_from(Mode),
    st.booleans(),
    st.sampled_from([0, 4096]),
    st.sampled_from([0, 4096]),
    st.sampled_from(Ending),
    st.sampled_from([(1, 2)] * 9 + [(3, 4)]),
    st.sampled_from([SIZE] * 9 + [SIZE * 2]),
)
BELIEVED = FACTS.map(
    lambda facts: check(facts._replace(disk=Disk.UPTODATE) if facts.role is Mode.PRIMARY else facts)
)


@settings(max_examples=500)
@given(BELIEVED, BELIEVED)
def test_the_other_end_finds_the_mirror(mine: Facts, theirs: Facts) -> None:
    here, there = compare(mine, theirs), compare(theirs, mine)
    assert here.found is there.found
    assert here.source is (there.source.other if there.source else None)
    assert here.may_be_source == {side.other for side in there.may_be_source}
    assert here.spans == mirror_spans(there.spans)
    twins = MIRRORS | {name: mirror for mirror, name in MIRRORS.items()}
    assert there.row == twins.get(here.row, here.row)


@settings(max_examples=500)
@given(BELIEVED, BELIEVED)
def test_nothing_is_overwritten_that_the_other_has_not(mine: Facts, theirs: Facts) -> None:
    verdict = compare(mine, theirs)
    if not verdict.found.proceeds or verdict.source is None:
        return
    source, target = (mine, theirs) if verdict.source is Side.MINE else (theirs, mine)
    assert source.whole
    assert not (target.role is Mode.PRIMARY and target.dirty_bytes)
    known = {source.identity.current, source.identity.base, *source.identity.history}
    assert (target.identity.becoming or target.identity.current) in known


@settings(max_examples=500)
@given(BELIEVED, BELIEVED)
def test_in_sync_only_if_nothing_says_otherwise(mine: Facts, theirs: Facts) -> None:
    if compare(mine, theirs).found is Found.IN_SYNC:
        assert mine.identity.current == theirs.identity.current
        for facts in (mine, theirs):
            assert (facts.identity.becoming, facts.dirty_bytes, facts.hot_bytes) == ("", 0, 0)
        assert Mode.SECONDARY in (mine.role, theirs.role)


GUARDS = [
    *("versions", "names", "sizes", "nobody-whole", "both-primary", "contradiction", "they-are-a-mix"),
    *("same-and-primary-counts", "same-and-counted", "same-and-they-are-outdated", "same-and-nobody-primary"),
    "behind-and-written",
]


@pytest.mark.parametrize("name", GUARDS)
def test_guard_that_is_taken_out_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these rows stands before one that would copy, or copy the other way, or call it in sync."""
    right = compare(*CASES[name])
    gone = {name} | {mirror for mirror, of in MIRRORS.items() if of == name}
    monkeypatch.setattr(verdict, "TABLE", tuple(row for row in TABLE if row.name not in gone))
    wrong = compare(*CASES[name])
    if right.found.proceeds:
        assert (wrong.found, wrong.source) != (right.found, right.source)
    else:
        assert wrong.found.proceeds
