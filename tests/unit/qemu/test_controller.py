"""QEMU's side of a replica that is nothing but the view of it: no engine, no peer, no control socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.remote import Remote
from tcmu_replication.control.command import Document, Privilege
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import config
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.qemu import tables, view
from tcmu_replication.qemu.controller import Controller
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.units import MiB

SESSION = Session({}, (), Privilege.OPERATOR, "test")
RESOURCE = """
[resource]
name = "disk0"
size = 1048576
[link]
trust = "address"
[host.alpha]
mode = "primary"
address = "192.0.2.1"
disk = "{0}/disk.img"
overlays = "{0}"
[host.beta]
mode = "secondary"
address = "192.0.2.2"
disk = "/srv/disk.img"
overlays = "/srv/overlays"
"""


class Replica:
    """All that QEMU's side asks of a replica; what it is told to do is in `done`."""

    name = "disk0"
    stage = Stage.NONE
    filter: Node | None = None
    remote: Remote | None = None
    removed = False
    forwarded: Node | None = None
    job: Job | None = None

    def __init__(self, mode: Mode, node: Node) -> None:
        self.mode = mode
        self.top = Gate(node)
        self.done: list[str] = []

    async def add_replica(self) -> None:
        self.done.append("add")

    async def remove_replica(self) -> None:
        self.done.append("remove")

    async def cancel_commit(self) -> None:
        self.done.append("cancel")

    async def backup_ended(self, reason: str) -> None:
        self.done.append(reason)


class Side:
    """A controller's view of `replica`, and the events that it got."""

    def __init__(self, directory: Path, mode: Mode) -> None:
        (directory / "disk0.toml").write_text(RESOURCE.format(directory))
        (directory / "disk.img").write_bytes(bytes(MiB))
        disk = File(str(directory / "disk.img"))
        primary = mode is Mode.PRIMARY
        self.replica = Replica(mode, Mirror("mirror", disk, report=lambda failure: None) if primary else disk)
        seen: view.Replica = self.replica
        self.events: list[tuple[str, Document]] = []
        self.controller = Controller(
            config.find("disk0", directory), "alpha", seen, disk, self._emit, lambda: None
        )

    def _emit(self, name: str, data: Document) -> None:
        assert isinstance(data, tables.EVENTS[name])
        self.events.append((name, data))

    def ask(self, command: str, **arguments: Any) -> Any:
        """What the command answers, as it travels."""
        row = tables.COMMANDS[command]
        given = row.decode({name.replace("_", "-"): value for name, value in arguments.items()})
        return row.encode(asyncio.run(self.controller.commands[command](given, SESSION)))

    def told(self) -> list[tuple[str, Any]]:
        return [(name, msgspec.to_builtins(data)) for name, data in self.events]


@pytest.fixture
def primary(tmp_path: Path) -> Side:
    return Side(tmp_path, Mode.PRIMARY)


@pytest.fixture
def secondary(tmp_path: Path) -> Side:
    return Side(tmp_path, Mode.SECONDARY)


def failure(child: str, operation: str, offset: int, length: int, *, final: bool = False) -> Failure:
    return Failure(child, operation, offset, length, Error(Kind.IO, "the medium is broken"), final)


@pytest.mark.parametrize(
    ("offset", "length", "first", "count"),
    [(0, 512, 0, 1), (511, 2, 0, 2), (700, 100, 1, 1), (4096, 4096, 8, 8), (0, 0, 0, 0)],
)
def test_failure_is_told_in_the_sectors_that_it_touches(
    primary: Side, offset: int, length: int, first: int, count: int
) -> None:
    primary.controller.failed(failure("disk", "zero", offset, length))
    ((name, told),) = primary.told()
    assert name == "QUORUM_REPORT_BAD"
    assert (told["type"], told["node-name"]) == (
        "write",
        primary.ask("query-block")[1]["inserted"]["node-name"],
    )
    assert (told["sector-num"], told["sectors-count"]) == (first, count)


@pytest.mark.parametrize(("operation", "type"), [("read", "read"), ("flush", "flush"), ("discard", "write")])
def test_failure_that_is_the_callers_too_is_told_of_the_lun(primary: Side, operation: str, type: str) -> None:
    primary.controller.failed(failure("remote", operation, 0, 512, final=True))
    (_, bad), (name, lost) = primary.told()
    assert bad["type"] == type
    assert bad["node-name"] == "remote"
    assert bad["error"] == "the medium is broken"
    assert (name, lost) == ("QUORUM_FAILURE", {"reference": "disk0", "sector-num": 0, "sectors-count": 1})


@pytest.mark.parametrize(
    ("status", "events"),
    [
        (JobStatus.CONCLUDED, ["BLOCK_JOB_COMPLETED"]),
        (JobStatus.FAILED, ["BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED"]),
        (JobStatus.CANCELLED, ["BLOCK_JOB_CANCELLED"]),
    ],
)
def test_end_of_a_job_is_told_once(secondary: Side, status: JobStatus, events: list[str]) -> None:
    job = secondary.replica.job = Job("commit-disk0", "commit")
    secondary.controller.jobs.changed()
    assert [told["status"] for _, told in secondary.told()] == ["created", "running"]
    assert [job["device"] for job in secondary.ask("query-block-jobs")] == ["commit-disk0"]
    secondary.events.clear()
    job.end(status, "the medium is broken" if status is JobStatus.FAILED else None)
    for _ in range(2):
        secondary.controller.jobs.changed()
    assert [name for name, _ in secondary.told() if name != "JOB_STATUS_CHANGE"] == events
    assert secondary.told()[-1] == ("JOB_STATUS_CHANGE", {"id": "commit-disk0", "status": "null"})
    assert secondary.ask("query-block-jobs") == []


def test_job_is_cancelled_through_the_view(secondary: Side) -> None:
    secondary.replica.job = Job("commit-disk0", "commit")
    secondary.ask("block-job-cancel", device="commit-disk0")
    assert secondary.replica.done == ["cancel"]


def test_job_of_a_primary_is_none_of_a_controllers(primary: Side) -> None:
    primary.replica.job = Job("commit-disk0", "commit")
    with pytest.raises(Error, match="Block job 'commit-disk0' not found"):
        primary.ask("block-job-cancel", device="commit-disk0")
    assert primary.replica.done == []


@pytest.mark.parametrize(("mode", "nodes"), [(Mode.PRIMARY, ["top", "disk"]), (Mode.SECONDARY, ["disk"])])
def test_graph_is_what_the_view_shows(tmp_path: Path, mode: Mode, nodes: list[str]) -> None:
    side = Side(tmp_path, mode)
    assert [node["node-name"] for node in side.ask("query-named-block-nodes")] == nodes
