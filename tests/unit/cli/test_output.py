"""How status documents are shown."""

from __future__ import annotations

import io
from typing import Any

import click
import pytest

from tcmu_replication.cli import output
from tcmu_replication.control import schema
from tests.unit.control.documents import status

DOWN = {"resource": "disk1", "stage": "down", "error": "nobody serves"}


def document(**changes: Any) -> dict[str, Any]:
    return schema.COMMANDS["query-status"].encode(status(**changes))


LOST = schema.Protection(
    protected=False,
    level="unprotected",
    words="the link to beta is down (no answer in 3 s)",
    since="2026-01-02T03:04:05.678+00:00",
    advice="see whether beta is on, and whether the network carries the link; " * 3,
)


class Terminal(io.StringIO):
    """What takes the place of a terminal."""

    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns takes the place of standard output."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", Terminal())


def test_plain_table_is_aligned_and_has_no_trailing_blank() -> None:
    text = output.plain(output.rows([document(), DOWN]))
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    column = lines[0].index("PROTECTED")
    assert lines[1][column:].startswith("yes")
    assert lines[2][column:].startswith("NO")


@pytest.mark.parametrize("mode", ["primary", "secondary"])
def test_status_of_a_terminal_fits_80_columns_and_shows_every_word_whole(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """At 80 columns an error was folded to 8 characters a line."""
    use_terminal(monkeypatch)
    link = schema.Link(state="connecting", peer="beta", reason="no answer")
    text = output.table([document(mode=mode, link=link, protection=LOST, out_of_sync_bytes=1 << 40), DOWN])
    assert max(map(len, click.unstyle(text).splitlines())) <= 80
    lun = schema.Frontend(type="nbd", device="unix:/run/tcmu-replication/disk0.sock", commands=10**9)
    job = schema.Job(
        id="commit", type="commit", offset=1 << 40, length=3 << 40, speed=1 << 30, status="running"
    )
    detail = output.detail(
        document(mode=mode, link=link, protection=LOST, error="a reason " * 30, frontends=[lun], jobs=[job])
    )
    assert max(map(len, detail.splitlines())) <= 80
    joined = " ".join(click.unstyle(text).split())
    for words in (
        "disk0",
        mode,
        "NO",
        "connecting",
        "2026-01-02 03:04:05",
        "1 TiB",
        "disk1: DOWN: nobody serves",
    ):
        assert words in joined
    assert "disk0: NOT PROTECTED since 2026-01-02 03:04:05 UTC: the link to beta is down (no answer" in joined
    assert "what to do: see whether beta is on" in joined


def test_protected_or_not_comes_first_in_the_detail() -> None:
    first, second, *_ = output.detail(document(protection=LOST)).splitlines()
    assert first == (
        "disk0: NOT PROTECTED since 2026-01-02 03:04:05 UTC: the link to beta is down (no answer in 3 s)"
    )
    assert second.startswith("  what to do: ")
    assert output.detail(document()).startswith("disk0: protected since 2026-01-02 03:00:00 UTC: every write")


def test_detail_has_what_was_heard_and_what_is_under_way() -> None:
    link = schema.Link(state="connected", peer="beta", heard="2026-01-02T03:04:05Z")
    since = "2026-01-02T03:04:06Z"
    text = output.detail(document(link=link, last_forwarded=since, checkpoint_under_way_since=since))
    assert "beta at 2026-01-02 03:04:05 UTC, last write at 2026-01-02 03:04:06 UTC" in text
    assert "a checkpoint, since 2026-01-02 03:04:06 UTC" in text


def test_call_of_a_disk_that_hangs_is_told_below_the_table() -> None:
    assert "disk0: a write has not returned" in output.table([document(hangs="a write has not returned")])


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in output.table([document(protection=LOST)])
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", Terminal())
    assert "\x1b[31m" in output.table([document(protection=LOST)])


@pytest.mark.parametrize(
    ("offset", "length", "bar"),
    [
        (0, 100, "[--------------------]   0 %"),
        (99, 100, "[###################-]  99 %"),
        (100, 100, "[####################] 100 %"),
        (0, 0, "[####################] 100 %"),
    ],
)
def test_job_has_a_bar(offset: int, length: int, bar: str) -> None:
    job = schema.Job(id="commit", type="commit", offset=offset, length=length, status="running")
    assert bar in output.job_line(document(jobs=[job])["jobs"][0])


def test_job_that_failed_says_why() -> None:
    job = schema.Job(id="c", type="commit", offset=0, length=1, speed=2048, status="failed", error="no space")
    line = output.job_line(document(jobs=[job])["jobs"][0])
    assert line.endswith("2 KiB/s, failed: no space")


def test_luns_on_a_terminal_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    long = {
        "device": "uio123",
        "backstore": "a-store-with-a-long-name",
        "config": "replication/" + "a-long-name-of-a-resource" * 3,
        "state": "unserved",
        "since": "2026-01-02T03:04:05+00:00",
        "worker": "a-long-name-of-a-resource" * 3,
        "pid": 4194304,
        "reason": "a reason " * 30,
        "advice": "what to do " * 30,
    }
    for text in (output.luns([long, {**long, "state": "starting"}]), output.table([long, document()])):
        lines = click.unstyle(text).splitlines()
        assert max(len(line) for line in lines if long["config"] not in line) <= 80
        assert "uio123" in text
        assert "NOT SERVED since 2026-01-02 03:04:05 UTC" in " ".join(click.unstyle(text).split())


def test_resync_says_how_long_it_takes_as_far_as_that_is_known() -> None:
    job = {
        "id": "resync-disk0",
        "type": "resync",
        "offset": 64 << 20,
        "length": 256 << 20,
        "status": "running",
    }
    moving = schema.Job(**job, speed=16 << 20, seconds_left=12.4)
    line = output.job_line(document(jobs=[moving])["jobs"][0])
    assert "25 %  64 MiB of 256 MiB, 16 MiB/s, 12 s left, running" in line
    waiting = schema.Job(**job, error="waits for the peer: it is lost")
    line = output.job_line(document(jobs=[waiting])["jobs"][0])
    assert line.endswith("64 MiB of 256 MiB, running: waits for the peer: it is lost")
