"""`events`: what exists, what happens, and what has gone, as lines and as documents."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tcmu_replication.cli import events, exits
from tcmu_replication.control import schema
from tcmu_replication.errors import Error, Kind
from tests.unit.cli.test_main import Workers, command, place, workers
from tests.unit.control.documents import status

__all__ = ["place", "workers"]

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def test_what_is_there_now_is_told_and_that_is_all(workers: Workers) -> None:
    workers.serve("disk0", query_status=status())
    result = command("events", "--now")
    one, other = result.stdout.splitlines()
    assert result.exit_code == 0
    assert re.match(rf"{TIME} exists disk0 role:\w+ stage:\w", one)
    assert re.match(rf"{TIME} down disk1 reason:\"nobody serves at ", other)


def test_documents_have_what_the_lines_have(workers: Workers) -> None:
    workers.serve("disk0", query_status=status(error="a sync failed"))
    (document,) = map(json.loads, command("events", "disk0", "--now", "--json").stdout.splitlines())
    assert (document["resource"], document["what"]) == ("disk0", "exists")
    assert document["data"]["error"] == "a sync failed"
    assert re.fullmatch(TIME, document["at"])


@pytest.fixture
def follow() -> Iterator[Callable[..., Iterator[events.Happened]]]:
    """`events.follow`, closed at the end."""
    with ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(closing(events.follow(*arguments)))


def test_events_of_all_resources_come_as_they_happen(workers: Workers, follow: Callable[..., Any]) -> None:
    for name in ("disk0", "disk1"):
        workers.serve(name, query_status=status(resource=name))
    following = follow(workers.run, ["disk0", "disk1"])
    assert {happened.what for happened in itertools.islice(following, 2)} == {"exists"}
    stage = schema.StageChanged(stage="failover", epoch=7, error="it is said")
    workers.loop.call_soon_threadsafe(workers.servers[1].emit, "REPLICATION_STAGE", stage)
    happened = next(following)
    assert (happened.resource, happened.what) == ("disk1", "stage")
    assert events.line(happened).endswith('stage disk1 stage:failover epoch:7 error:"it is said"')


def test_worker_that_goes_and_comes_back_is_down_once_and_exists_again(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, follow: Callable[..., Any]
) -> None:
    monkeypatch.setattr(events, "RETRY_S", 0.01)
    following = follow(workers.run, ["disk0"])
    assert next(following).what == "down"
    workers.serve("disk0", query_status=status())
    assert next(following).what == "exists"
    workers.end("disk0")
    assert next(following).what == "down"
    workers.serve("disk0", query_status=status())
    assert next(following).what == "exists"


def test_who_may_not_ask_is_told_so(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise Error(Kind.PERMISSION, f"{path}: only root may control a resource")

    monkeypatch.setattr(events.Client, "unix", refuse)
    for words in (["events"], ["events", "--now"]):
        result = command(*words)
        assert result.exit_code == exits.DENIED
        assert "only root may ask" in result.stderr
