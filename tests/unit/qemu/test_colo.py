"""QEMU's names for our commands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tcmu_replication.control import schema
from tcmu_replication.control.command import Document, Privilege
from tcmu_replication.control.server import Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu import colo, tables
from tcmu_replication.qemu.schema import ColoExit, SetReplication
from tests.unit.control.documents import status

SESSION = Session({}, (), Privilege.OPERATOR, "test")
OURS = ("query-status", "start", "checkpoint", "failover", "stop-replication", "query-errors")


class Worker:
    """A secondary; `asked` is which of its commands were called and with what."""

    def __init__(self, stage: str = "none") -> None:
        self.asked: list[tuple[str, Any]] = []
        self.events: list[tuple[str, Document]] = []
        self.handlers = {name: self._body(name) for name in OURS}
        self.results = {
            "query-status": status(stage=stage, mode="secondary"),
            "query-errors": schema.ErrorStatus(error=True, desc="I/O error occurred"),
        }

    def _body(self, name: str) -> Handler:
        async def body(arguments: Any, session: Session) -> Any:
            self.asked.append((name, arguments))
            return self.results.get(name)

        return body

    def call(self, name: str, arguments: Any) -> Any:
        """Call a command by QEMU's name."""
        return asyncio.run(self._call(name, arguments))

    def _emit(self, name: str, data: Document) -> None:
        assert isinstance(data, tables.EVENTS[name])
        self.events.append((name, data))

    async def _call(self, name: str, arguments: Any) -> Any:
        return await colo.names(self.handlers, self._emit)[name](arguments, SESSION)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (SetReplication(enable=True, primary=False), ("start", colo.ControllersStart())),
        (SetReplication(enable=False, primary=False), ("stop-replication", schema.Stop(force=True))),
        (
            SetReplication(enable=False, primary=True, failover=False),
            ("stop-replication", schema.Stop(force=True)),
        ),
        (
            SetReplication(enable=False, primary=False, failover=True),
            ("failover", schema.Failover(to="checkpoint", force=True)),
        ),
    ],
    ids=["start", "stop", "stop-whatever-primary-says", "failover"],
)
def test_set_replication(arguments: SetReplication, asked: tuple[str, Any]) -> None:
    worker = Worker()
    assert worker.call("xen-set-replication", arguments) is None
    assert [call for call in worker.asked if call[0] != "query-status"] == [asked]


def test_failover_of_a_primary_is_a_stop_as_in_qemu() -> None:
    worker = Worker()
    worker.results["query-status"] = status(stage="running", mode="primary")
    worker.call("xen-set-replication", SetReplication(enable=False, primary=True, failover=True))
    assert worker.asked[-1] == ("stop-replication", schema.Stop(force=True))


def test_start_in_the_other_mode_is_refused_in_qemus_words() -> None:
    worker = Worker()
    with pytest.raises(Error, match="The parameter mode's value is invalid, needs 1, but got 0") as caught:
        worker.call("xen-set-replication", SetReplication(enable=True, primary=True))
    assert caught.value.kind is Kind.INVALID_STATE
    assert [name for name, _ in worker.asked] == ["query-status"]


def test_start_of_one_that_is_done_is_left_to_start_whatever_the_mode() -> None:
    worker = Worker(stage="done")
    worker.call("xen-set-replication", SetReplication(enable=True, primary=True))
    assert worker.asked[-1][0] == "start"


def test_failover_is_only_for_stopping() -> None:
    with pytest.raises(Error, match="Parameter 'failover' is only for stopping replication"):
        Worker().call("xen-set-replication", SetReplication(enable=True, primary=False, failover=False))


def test_checkpoint_and_status() -> None:
    worker = Worker()
    assert worker.call("xen-colo-do-checkpoint", schema.Nothing()) is None
    result = worker.call("query-xen-replication-status", schema.Nothing())
    assert (result.error, result.desc) == (True, "I/O error occurred")
    assert [name for name, _ in worker.asked] == ["checkpoint", "query-errors"]


@pytest.mark.parametrize(
    ("mode", "stage", "answer"),
    [
        ("secondary", "none", {"mode": "none", "last-mode": "none", "reason": "none"}),
        ("secondary", "running", {"mode": "secondary", "last-mode": "secondary", "reason": "none"}),
        ("secondary", "failover", {"mode": "secondary", "last-mode": "secondary", "reason": "processing"}),
        ("secondary", "failover-failed", {"mode": "none", "last-mode": "secondary", "reason": "error"}),
        ("primary", "done", {"mode": "none", "last-mode": "primary", "reason": "request"}),
    ],
)
def test_colo_status(mode: str, stage: str, answer: dict[str, str]) -> None:
    worker = Worker(stage=stage)
    worker.results["query-status"] = status(stage=stage, mode=mode)
    result = worker.call("query-colo-status", schema.Nothing())
    assert tables.COMMANDS["query-colo-status"].encode(result) == answer


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("secondary", ("failover", schema.Failover(to="checkpoint", force=True))),
        ("primary", ("stop-replication", schema.Stop(force=True))),
    ],
)
def test_lost_heartbeat_of_a_running_end(mode: str, asked: tuple[str, Any]) -> None:
    worker = Worker()
    worker.results["query-status"] = status(stage="running", mode=mode)
    worker.call("x-colo-lost-heartbeat", schema.Nothing())
    assert worker.asked[-1] == asked
    assert worker.events == [("COLO_EXIT", ColoExit(mode=mode, reason="request"))]


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("none", "The feature 'colo' is not enabled"),
        ("failover", "COLO failover is already activated"),
        ("failover-failed", "The feature 'colo' is not enabled"),
        ("done", "The feature 'colo' is not enabled"),
    ],
)
def test_lost_heartbeat_where_nothing_runs(stage: str, text: str) -> None:
    worker = Worker(stage=stage)
    with pytest.raises(Error, match=text):
        worker.call("x-colo-lost-heartbeat", schema.Nothing())
    assert [name for name, _ in worker.asked] == ["query-status"]
    assert worker.events == []


def test_reason_of_an_error_is_in_our_own_answer_only() -> None:
    worker = Worker()
    worker.results["query-errors"] = schema.ErrorStatus(
        error=True, desc="I/O error occurred: the link is lost"
    )
    result = worker.call("query-xen-replication-status", schema.Nothing())
    assert result.desc == "I/O error occurred"


@pytest.mark.parametrize("command", ["stop", "cont"])
def test_what_stops_a_machine_ends_no_replication(command: str) -> None:
    """A script of QEMU's that pauses its machine must not end replication here."""
    assert command not in tables.COMMANDS
