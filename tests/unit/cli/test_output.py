"""How status documents are shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tcmu_replication.cli import output
from tcmu_replication.control import schema
from tests.unit.control.documents import status

DOWN = {"resource": "disk1", "stage": "down", "error": "nobody serves"}


def document(**changes: Any) -> dict[str, Any]:
    return schema.COMMANDS["query-status"].encode(status(**changes))


def test_plain_table_is_aligned_and_has_no_trailing_blank() -> None:
    text = output.plain(output.rows([document(), DOWN]))
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    column = lines[0].index("STAGE")
    assert lines[1][column:].startswith("running")
    assert lines[2][column:].startswith("down")


def test_table_of_a_terminal_shows_every_name_whole_in_80_columns() -> None:
    screen = io.StringIO()
    rows = output.rows([document(link=schema.Link(state="lost", peer="192.0.2.1", reason="no answer")), DOWN])
    Console(file=screen, width=80).print(output.rich_table(rows))
    text = screen.getvalue()
    assert all(word in text for word in ("disk0", "secondary", "running", "lost", "disk1", "down"))


def test_dirty_is_what_the_overlays_hold_or_what_the_peer_lacks() -> None:
    column = output.HEADERS.index("dirty")
    secondary = document(overlays=schema.Overlays(active_bytes=4096, hidden_bytes=8192))
    primary = document(mode="primary", out_of_sync_bytes=65536)
    assert [row[column] for row in output.rows([secondary, primary])] == ["12 KiB", "64 KiB"]


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
