"""Protected or not: every row of the table, and that nothing bad is ever called protected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.replication.protection import TABLE, VALUES, Facts, judge, row_of
from tcmu_replication.replication.stages import Stage

THEN = "2026-01-02T03:04:05+00:00"
FILE = Path(__file__).parents[3] / "docs" / "status.md"


def facts(role: Any = "primary", **changes: Any) -> Facts:
    """Of a pair in which all is well, but for the changes."""
    host, peer = ("alpha", "beta") if role == "primary" else ("beta", "alpha")
    good = Facts("disk0", host, role, peer, Stage.RUNNING, link_state="connected", link_since=THEN)
    return good._replace(**changes)


CASES: dict[str, Facts] = {
    "superseded": facts(superseded_at=THEN, stage=Stage.DONE, error="beta was promoted", link_state="none"),
    "not-ready": facts(not_ready="this host was down; beta is asked", not_ready_since=THEN),
    "detached": facts(detached_since=THEN, error="the local disk failed; the secondary serves"),
    "disk-error-alone": facts(disk_error="a sync failed", outdated_since=THEN),
    "disk-error": facts(disk_error="a sync failed", error="a sync failed", error_since=THEN),
    "commit-failed": facts("secondary", stage=Stage.FAILOVER_FAILED, error="no space", error_since=THEN),
    "commit": facts("secondary", stage=Stage.FAILOVER, promoted_at=THEN, job="commit 45 %"),
    "promoted": facts("secondary", stage=Stage.DONE, promoted_at=THEN),
    "secondary-stopped-old": facts("secondary", stage=Stage.DONE, outdated_since=THEN, error="alpha goes on"),
    "stopped": facts(stage=Stage.DONE, stage_since=THEN),
    "primary-none": facts(stage=Stage.NONE),
    "secondary-none": facts("secondary", stage=Stage.NONE),
    "primary-resyncing": facts(outdated_since=THEN, resync="12 MiB are left", out_of_sync_bytes=12 << 20),
    "secondary-resyncing": facts("secondary", outdated_since=THEN, resync=THEN, error="alpha goes on"),
    "primary-unlike": facts(outdated_since=THEN, verified=False, outdated_reason="the disks differ: 4 KiB"),
    "primary-outdated-qemu": facts(
        outdated_since=THEN, outdated_reason="the link was lost", peer_is_qemu=True
    ),
    "primary-outdated": facts(outdated_since=THEN, outdated_reason="not forwarded: the link was lost"),
    "secondary-outdated": facts("secondary", outdated_since=THEN, outdated_reason="alpha goes on"),
    "primary-error": facts(
        error="not forwarded: the link was lost", error_since=THEN, out_of_sync_bytes=4096
    ),
    "secondary-error": facts("secondary", error="a sync failed", error_since=THEN),
    "peer-disk-error": facts("secondary", peer_disk_error="a sync failed"),
    "suspect": facts("secondary", suspect="an overlay could not be synced"),
    "removed": facts(removed=True),
    "map-incomplete": facts(map_complete=False),
    "out-of-sync": facts(out_of_sync_bytes=8 << 20),
    "primary-waiting": facts(link_state="waiting", link_reason="no answer in 3 s"),
    "primary-lost": facts(link_state="lost", link_reason="no answer in 3 s"),
    "secondary-unverified": facts(
        "secondary", link_state="listening", peer_heard_at=THEN, comparing=(0, 4096)
    ),
    "secondary-alone": facts("secondary", link_state="listening", peer_heard_at=THEN),
    "secondary-unconnected": facts("secondary", link_state="listening"),
    "hangs": facts(hangs="no answer for 5 s: write /dev/sdb"),
    "comparing": facts(comparing=(1 << 20, 4 << 20)),
    "resending": facts(resending_bytes=4096),
    "primary-protected": facts(),
    "secondary-protected": facts("secondary"),
}


def test_every_row_has_a_case() -> None:
    assert [row.name for row in TABLE] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_case_is_its_rows(name: str) -> None:
    row, verdict = row_of(CASES[name]), judge(CASES[name])
    assert row.name == name
    assert verdict.protected == name.endswith("-protected")
    assert verdict.level == row.level
    assert (verdict.advice is None) == verdict.protected
    assert "{" not in verdict.words + (verdict.advice or "")
    assert verdict.since in (None, THEN)
    if "since then" in verdict.words:
        assert verdict.since == THEN


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("primary-error", "beta may miss what is written here: not forwarded: the link was lost"),
        ("secondary-outdated", "this host is outdated: alpha goes on"),
        (
            "secondary-stopped-old",
            "replication is not running, and the disk of this host is old or damaged: alpha goes on",
        ),
        ("primary-lost", "the link to beta is down (no answer in 3 s)"),
        ("out-of-sync", "the disks differ in 8 MiB"),
        ("comparing", "both disks are being compared (1 MiB of 4 MiB)"),
        ("commit", "beta was promoted and serves alone; the commit behind it is under way (commit 45 %)"),
    ],
)
def test_words_have_what_is_known(name: str, words: str) -> None:
    assert words in judge(CASES[name]).words


@pytest.mark.parametrize("name", ["primary-error", "secondary-stopped-old", "map-incomplete", "out-of-sync"])
def test_secondary_is_made_equal_to_the_primary_on_the_primary(name: str) -> None:
    advice = judge(CASES[name]).advice or ""
    assert "start disk0` on beta, then on alpha" in advice
    assert "`tcmu-replication resync disk0` on alpha makes beta equal to it" in advice
    assert advice.index("start disk0`") < advice.index("resync disk0`")


@pytest.mark.parametrize("name", ["primary-outdated", "secondary-outdated", "secondary-error", "suspect"])
def test_secondary_that_misses_writes_is_sent_them_when_it_is_back(name: str) -> None:
    assert "bring back beta" in (judge(CASES[name]).advice or "")


@pytest.mark.parametrize("name", CASES)
def test_nobody_copies_a_disk_by_hand(name: str) -> None:
    assert "copy" not in (judge(CASES[name]).advice or "")


@pytest.mark.parametrize("since", [{"outdated_since": THEN}, {"error": "a sync failed", "error_since": THEN}])
def test_secondary_that_was_stopped_after_a_gap_is_still_old(since: dict[str, Any]) -> None:
    """D7: after `stop` its LUN serves the old disk, and nothing warned of that."""
    verdict = judge(facts("secondary", stage=Stage.DONE, **since))
    assert "old" in verdict.words
    assert verdict.since == THEN
    assert (verdict.advice or "").startswith("let no initiator use the LUN of this host")


@pytest.mark.parametrize("heard", [THEN, None])
def test_secondary_whose_disk_was_not_compared_is_not_told_to_fail_over(heard: str | None) -> None:
    """It may have old data anywhere, and said that it had everything."""
    verdict = judge(facts("secondary", link_state="listening", peer_heard_at=heard, comparing=(0, 4096)))
    assert "has everything" not in verdict.words
    assert "tcmu-replication failover" not in (verdict.advice or "")


@pytest.mark.parametrize("name", CASES)
def test_advice_never_skips_the_comparison(name: str) -> None:
    """D6: the flag that skips it became routine, because a text recommended it."""
    verdict = judge(CASES[name])
    said = f"{verdict.words} {verdict.advice}"
    assert "--assume-clean" not in said
    assert "--force" not in said


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_time_that_is_not_known_is_not_referred_to(role: str) -> None:
    words = judge(facts(role, stage=Stage.DONE, superseded_at=None)).words
    assert "since then" not in words


TEXT = st.none() | st.just("") | st.just("a reason")
TIME = st.none() | st.just(THEN)
ANY = st.builds(
    Facts,
    name=st.just("disk0"),
    host=st.just("alpha"),
    role=st.sampled_from(["primary", "secondary"]),
    peer=st.just("beta"),
    stage=st.sampled_from(Stage) | st.just(Stage.RUNNING),
    link_state=st.just("connected") | st.sampled_from(["none", "listening", "connecting", "waiting", "lost"]),
    link_reason=TEXT,
    peer_heard_at=TIME,
    out_of_sync_bytes=st.just(0) | st.integers(0, 1 << 40),
    map_complete=st.just(True) | st.booleans(),
    error=TEXT,
    outdated_since=TIME,
    verified=st.just(True) | st.booleans(),
    peer_is_qemu=st.booleans(),
    resync=TEXT,
    comparing=st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99)),
    resending_bytes=st.just(0) | st.integers(0, 1 << 40),
    detached_since=TIME,
    not_ready=TEXT,
    superseded_at=TIME,
    promoted_at=TIME,
    suspect=TEXT,
    checkpoint_under_way_since=TIME,
    removed=st.booleans(),
    disk_error=TEXT,
)


@given(ANY)
def test_protected_only_if_every_fact_is_good(found: Facts) -> None:
    bad = [
        found.stage is not Stage.RUNNING,
        found.link_state != "connected",
        found.out_of_sync_bytes,
        not found.map_complete,
        found.error,
        found.outdated_since,
        found.comparing is not None,
        found.resync,
        found.resending_bytes,
        found.detached_since,
        found.hangs,
        found.not_ready,
        found.superseded_at,
        found.suspect,
        found.removed,
        found.disk_error and found.role == "primary",
        found.peer_disk_error,
    ]
    verdict = judge(found)
    assert verdict.protected == (not any(bad))
    assert verdict.words
    assert verdict.protected or verdict.advice


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_row_stands_in_the_documentation(row: Any) -> None:
    """As `| words | what to do |`, with the values in capitals."""
    names = {value: value.upper().replace("_", " ") for value in VALUES}
    words, advice = (text.format_map(names) for text in (row.words, row.advice or "nothing"))
    assert f"| {words} | {advice} |" in FILE.read_text()
