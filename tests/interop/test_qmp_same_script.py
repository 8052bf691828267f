"""One script, two programs: what a controller says to QEMU it can say to our worker, and hears the same.

QEMU is started with the names that a resource called disk0 has here: the
devices `disk0` (the LUN) and `disk0-disk`, the nodes `replication`, `disk`, and on a
primary `top`. What differs on purpose is not in the scripts; docs/qmp.md lists it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.units import MiB
from tests.support import qemu as support
from tests.support.nbd import Nbd
from tests.support.processes import Pair
from tests.support.tools import requires

pytestmark = [pytest.mark.interop, requires(support.PROGRAM, "qemu-img")]

SIZE = 8 * MiB
Step = dict[str, Any] | Callable[["Monitor"], Any]


class Monitor:
    """A QMP connection that keeps whole replies. `directory` is where the script may make a socket."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.directory = directory
        self.events: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(support.PATIENCE_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        while "QMP" not in (message := json.loads(self._file.readline())):
            pass
        self.greeting = message["QMP"]
        self.say(execute("qmp_capabilities", enable=["oob"]))

    def say(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply, without what ours adds to errors and with this program's directory called DIR."""
        self._socket.sendall(json.dumps(message).replace("DIR", str(self.directory)).encode() + b"\n")
        while "event" in (reply := json.loads(self._file.readline())):
            self.events.append(reply["event"])
        reply.get("error", {}).pop("data", None)
        return json.loads(json.dumps(reply).replace(str(self.directory), "DIR"))

    def nbd(self, export: str) -> Nbd:
        """A connection to one of the exports that the script has made."""
        return Nbd(str(self.directory / "n.sock"), export, timeout=support.PATIENCE_S)

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


def execute(command: str, /, **arguments: Any) -> dict[str, Any]:
    """A request; `_` in argument names stands for `-`."""
    return {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}


def unix(name: str = "DIR/n.sock") -> dict[str, Any]:
    return {"type": "unix", "data": {"path": name}}


def inet(port: Any, **data: Any) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": "127.0.0.1", "port": port, **data}}


def write(export: str, offset: int, byte: int) -> Step:
    """Write 64 KiB of `byte` through an export."""

    def step(monitor: Monitor) -> None:
        with monitor.nbd(export) as nbd:
            nbd.write(offset, bytes([byte]) * 65536)

    return step


def read(export: str, offset: int) -> Step:
    def step(monitor: Monitor) -> Any:
        with monitor.nbd(export) as nbd:
            return sorted(set(nbd.read(offset, 65536)))

    return step


def until_clean(monitor: Monitor) -> Any:
    """The reference order's third step: poll until the failover has ended. Where it is a job, that is gone too."""
    reply: dict[str, Any] = {}

    def clean() -> bool:
        jobs = monitor.say(execute("query-block-jobs"))
        reply.update(monitor.say(execute("query-xen-replication-status")))
        return not reply["return"]["error"] and jobs == {"return": []}

    support.until(clean, "the end of the failover")
    return reply


MONITOR: list[Step] = [
    execute("query-version", x=1),
    execute("qmp_capabilities"),
    execute("no-such-command"),
    {"execute": "query-jobs", "id": {"a": [1, None]}},
    {"execute": "query-jobs", "id": None},
    {"execute": 1, "id": 2},
    {"execute": "query-jobs", "arguments": []},
    {"execute": "query-jobs", "arguments": None},
    {"execute": "query-jobs", "more": 1},
    {},
    {"id": 7},
    {"exec-oob": "query-jobs", "id": 3},
    {"exec-oob": "no-such-command", "id": 4},
    {"exec-oob": "query-jobs", "execute": "query-jobs"},
    execute("query-block-jobs"),
    execute("block-job-cancel"),
    execute("block-job-cancel", device="j"),
    execute("block-job-cancel", device=1),
    execute("job-cancel", id="j"),
    execute("query-colo-status"),
    execute("x-colo-lost-heartbeat"),
    execute("xen-set-replication", enable=True),
    execute("xen-set-replication", enable=1, primary=False),
    execute("xen-set-replication", enable=True, primary=False, x=1),
    execute("xen-set-replication", enable=True, primary=False, failover=False),
    execute("xen-set-replication", enable=False, primary=False),
    execute("query-xen-replication-status"),
]

EXPORTS: list[Step] = [
    execute("nbd-server-start"),
    execute("nbd-server-start", addr=inet(10)),
    execute("nbd-server-start", addr=inet("0", x=1)),
    execute("nbd-server-start", addr={"type": "x", "data": {}}),
    execute("nbd-server-start", addr={"type": "inet"}),
    execute("nbd-server-start", addr={"data": {"path": "x"}}),
    execute("nbd-server-start", addr=5),
    execute("nbd-server-start", addr=inet("0"), max_connections=-1),
    execute("nbd-server-start", addr=unix("/nonexistent/n.sock")),
    execute("nbd-server-start", addr={"type": "inet", "data": {"host": "192.0.2.1", "port": "10809"}}),
    execute("nbd-server-stop"),
    execute("nbd-server-add", device="disk0-disk"),
    execute("nbd-server-remove", name="x"),
    execute("block-export-add", type="nbd", id="e", node_name="replication"),
    execute("nbd-server-start", addr=unix()),
    execute("nbd-server-start", addr=unix()),
    execute("nbd-server-add", device="nope"),
    execute("nbd-server-add", device="disk0-disk", writable=True, description="forwarded writes"),
    execute("nbd-server-add", device="disk0-disk"),
    execute("block-export-add", type="nbd", id="lun", node_name="replication", name="lun", writable=True),
    execute("block-export-add", type="nbd", id="lun", node_name="replication"),
    execute("block-export-add", type="nbd", id="other", node_name="replication", name="lun"),
    execute("block-export-add", type="nbd", id="not an id", node_name="replication"),
    execute("block-export-add", type="nbd", id="e", node_name="nope"),
    execute("block-export-add", type="x", id="e", node_name="nope"),
    execute("block-export-add", type="nbd", id="e"),
    execute("query-block-exports"),
    execute("nbd-server-remove", name="x"),
    execute("nbd-server-remove", name="lun", mode="x"),
    execute("nbd-server-remove", name="lun", mode="hard"),
    execute("nbd-server-remove", name="lun"),
    execute("block-export-del", id="lun"),
    execute("nbd-server-add", device="disk0", name="lun", writable=True),
]

SECONDARY: list[Step] = [
    *MONITOR,
    execute("xen-colo-do-checkpoint"),
    execute("xen-set-replication", enable=True, primary=True),
    execute("query-block"),
    execute("x-blockdev-change", parent="nope"),
    execute("x-blockdev-change", parent="disk"),
    execute("x-blockdev-change", parent="disk", child="file", node="disk"),
    execute("x-blockdev-change", parent="disk", child="nope"),
    execute("x-blockdev-change", parent="disk", child="file"),
    execute("x-blockdev-change", parent="disk0", child="file"),
    execute("x-blockdev-change", parent="disk", node="replication"),
    execute("x-blockdev-change", parent="disk", node="nope"),
    *EXPORTS,
    write("disk0-disk", 0, 0x11),  # the first copy of the primary's disk
    execute("xen-set-replication", enable=True, primary=False),
    execute("xen-set-replication", enable=True, primary=False),
    execute("query-xen-replication-status"),
    execute("query-named-block-nodes", flat=True),
    execute("query-named-block-nodes", flat=1),
    execute("query-block-jobs"),
    execute("query-jobs"),
    execute("block-export-add", type="nbd", id="w", node_name="disk", writable=True),
    write("disk0-disk", 65536, 0x22),
    read("lun", 0),
    read("lun", 65536),
    execute("xen-colo-do-checkpoint"),
    read("lun", 65536),
    write("disk0-disk", 0, 0x33),
    write("lun", 131072, 0x44),
    read("lun", 0),
    execute("nbd-server-stop"),
    execute("nbd-server-stop"),
    execute("xen-set-replication", enable=False, primary=False, failover=True),
    until_clean,
    execute("query-block-jobs"),
    execute("query-jobs"),
    execute("xen-colo-do-checkpoint"),
    execute("xen-set-replication", enable=True, primary=True),
    execute("xen-set-replication", enable=False, primary=False),
    execute("xen-set-replication", enable=False, primary=False, failover=True),
    execute("nbd-server-start", addr=unix()),
    execute("nbd-server-add", device="disk0", name="lun"),
    read("lun", 0),
    read("lun", 65536),
    read("lun", 131072),
    execute("quit"),
]

PRIMARY: list[Step] = [
    execute("xen-set-replication", enable=True, primary=True),
    execute("query-xen-replication-status"),
    execute("xen-colo-do-checkpoint"),
    execute("query-named-block-nodes", flat=True),
    execute("x-blockdev-change", parent="nope", child="children.1"),
    execute("x-blockdev-change", parent="top"),
    execute("x-blockdev-change", parent="top", child="children.1", node="replication"),
    execute("x-blockdev-change", parent="top", child="children.2"),
    execute("x-blockdev-change", parent="top", node="nope"),
    execute("x-blockdev-change", parent="top", node="replication"),
    execute("x-blockdev-change", parent="top", node="disk"),
    execute("x-blockdev-change", parent="disk", child="file"),
    execute("x-blockdev-change", parent="top", child="children.1"),
    execute("x-blockdev-change", parent="top", child="children.1"),
    execute("x-blockdev-change", parent="disk0", child="children.0"),
    execute("query-xen-replication-status"),
    execute("x-blockdev-change", parent="disk0", node="replication"),
    execute("query-xen-replication-status"),
    execute("xen-set-replication", enable=False, primary=True),
    execute("query-xen-replication-status"),
    execute("xen-colo-do-checkpoint"),
    execute("xen-set-replication", enable=True, primary=True),
    execute("quit"),
]

NODES = {"top", "replication", "active", "hidden", "disk"}


def _nodes(result: list[dict[str, Any]]) -> Any:
    """What both call the same; drivers and files of the layers below differ."""
    return {n["node-name"]: (n["ro"], n["image"]["virtual-size"]) for n in result if n["node-name"] in NODES}


SHOWN: dict[str, Callable[[Any], Any]] = {
    "query-block": lambda result: {device["device"] for device in result},
    "query-named-block-nodes": _nodes,
    "query-block-exports": lambda result: sorted((e["id"], e["type"], e["shutting-down"]) for e in result),
}
"""Of these results a part is compared."""


def play(script: list[Step], monitor: Monitor) -> list[tuple[str, Any]]:
    """What was said, and what came back."""
    heard = []
    for step in script:
        if callable(step):
            heard.append((str(step), step(monitor)))
            continue
        reply = monitor.say(step)
        command = step.get("execute")
        if "return" in reply and command in SHOWN:
            reply["return"] = SHOWN[str(command)](reply["return"])
        description = reply.get("error", {}).get("desc", "")
        if description.startswith("Permission conflict"):  # by whom is said in words of its own
            reply["error"]["desc"] = description.partition(" by ")[0]
        heard.append((json.dumps(step), reply))
    return heard


def until_quit(events: list[str]) -> list[str]:
    """What closing makes of exports comes before or after the answer to quit."""
    return events[: events.index("SHUTDOWN") + 1]


def compare(qemus: list[tuple[str, Any]], ours: list[tuple[str, Any]]) -> None:
    for (said, theirs), (_, mine) in zip(qemus, ours, strict=True):
        assert mine == theirs, said


@pytest.fixture
def directory() -> Iterator[Path]:
    with support.images() as directory:
        for name in ("qemu", "ours", "peer"):
            (directory / name).mkdir()
        yield directory


def qemu_monitor(directory: Path) -> Monitor:
    return Monitor(directory / "qemu.qmp", directory)


def our_monitor(pair: Pair, host: str, directory: Path) -> Monitor:
    worker = getattr(pair, host)
    return Monitor(worker.directory / "run/disk0.sock", directory)


def test_secondary(directory: Path) -> None:
    qemu, ours = directory / "qemu", directory / "ours"
    support.make_raw(qemu / "disk.img", SIZE)
    for overlay in ("hidden", "active"):
        support.make_qcow2(qemu / f"{overlay}.qcow2", SIZE)
    arguments = (
        "-drive", "if=none,id=disk0-disk,node-name=disk,driver=raw,file.driver=file,"
        f"file.filename={qemu}/disk.img",
        "-drive", "if=none,id=disk0,node-name=replication,driver=replication,mode=secondary,top-id=disk0,"
        f"file.driver=qcow2,file.node-name=active,file.file.filename={qemu}/active.qcow2,"
        f"file.backing.driver=qcow2,file.backing.node-name=hidden,file.backing.file.filename={qemu}/hidden.qcow2,"
        "file.backing.backing=disk",
    )  # fmt: skip
    with support.qemu(qemu, *arguments) as process:
        process.qmp.close()
        monitor = qemu_monitor(qemu)
        heard = play(SECONDARY, monitor)
        qemu_events = monitor.events
        monitor.close()
    with Pair(ours, size=SIZE) as pair:
        monitor = our_monitor(pair, "beta", ours)
        compare(heard, play(SECONDARY, monitor))
        assert [e for e in until_quit(monitor.events) if e in qemu_events] == until_quit(qemu_events)
        assert {"REPLICATION_STAGE", "JOB_STATUS_CHANGE", "BLOCK_JOB_COMPLETED"} <= set(monitor.events)
        monitor.close()


def test_primary(directory: Path) -> None:
    qemu, ours, peer = directory / "qemu", directory / "ours", directory / "peer"
    support.make_raw(qemu / "disk.img", SIZE)
    arguments = (
        "-drive", f"if=none,id=disk0-disk,node-name=disk,driver=raw,file.driver=file,file.filename={qemu}/disk.img",
        "-drive", "if=none,id=disk0,node-name=top,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=disk",
    )  # fmt: skip
    with (
        support.secondary(peer, SIZE) as secondary,
        support.qemu(qemu, *arguments, kind=support.QemuPrimary) as process,
    ):
        secondary.export_disk()
        secondary.start()
        process.attach(secondary.address, "disk")
        process.start()
        process.qmp.close()
        monitor = qemu_monitor(qemu)
        heard = play(PRIMARY, monitor)
        monitor.close()
    with Pair(ours, size=SIZE) as pair:
        pair.replicate()
        monitor = our_monitor(pair, "alpha", ours)
        compare(heard, play(PRIMARY, monitor))
        monitor.close()


class Schema:
    """A program's answer to query-qmp-schema."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.types = {row["name"]: row for row in rows}

    def names(self, kind: str) -> set[str]:
        return {name for name, row in self.types.items() if row["meta-type"] == kind}

    def json_type(self, name: str) -> str:
        """What a value of a type is in JSON."""
        row = self.types[name]
        kinds = {"builtin": row.get("json-type"), "enum": "string", "array": "array", "object": "object"}
        return "int" if kinds[row["meta-type"]] == "int" else str(kinds[row["meta-type"]])

    def members(self, name: str) -> dict[str, tuple[str, bool]]:
        """Of an object's members the JSON type, and whether one must be there; of an array's element."""
        row = self.types[name]
        if row["meta-type"] == "array":
            return self.members(row["element-type"])
        if row["meta-type"] != "object":
            return {}
        found: dict[str, tuple[str, bool]] = {}
        for variant in row.get("variants", []):  # may be there
            found |= {member: (kind, False) for member, (kind, _) in self.members(variant["type"]).items()}
        members = row.get("members", [])
        return found | {m["name"]: (self.json_type(m["type"]), "default" not in m) for m in members}


OURS = {"query-status": "a document of our own, with QEMU's members"}


def test_schema_of_what_both_have(directory: Path) -> None:
    """Arguments that we take QEMU takes too; what QEMU always answers we answer too, and in the same types."""
    with support.qemu(directory / "qemu", "-machine", "none") as process:
        qemu = Schema(process.qmp.execute("query-qmp-schema"))
    with Pair(directory / "ours", size=SIZE) as pair:
        monitor = our_monitor(pair, "beta", directory)
        ours = Schema(monitor.say(execute("query-qmp-schema"))["return"])
        monitor.close()
    both = ours.names("command") & qemu.names("command")
    assert {"x-blockdev-change", "nbd-server-start", "query-block", "block-job-cancel"} <= both
    for name in sorted(both - set(OURS)):
        mine, theirs = ours.types[name], qemu.types[name]
        taken, known = ours.members(mine["arg-type"]), qemu.members(theirs["arg-type"])
        assert taken.items() <= known.items(), name
        assert {member for member, (_, needed) in known.items() if needed} <= set(taken), name
        assert ours.json_type(mine["ret-type"]) == qemu.json_type(theirs["ret-type"]), name
        if name != "query-qmp-schema":
            check_given(ours.members(mine["ret-type"]), qemu.members(theirs["ret-type"]), name)
    for name in sorted(ours.names("event") & qemu.names("event")):
        check_given(
            ours.members(ours.types[name]["arg-type"]), qemu.members(qemu.types[name]["arg-type"]), name
        )


def check_given(mine: dict[str, tuple[str, bool]], theirs: dict[str, tuple[str, bool]], name: str) -> None:
    """What a client of QEMU's may rely on is there, and nothing is of another type."""
    assert {member for member, (_, needed) in theirs.items() if needed} <= set(mine), name
    assert {m: kind for m, (kind, _) in mine.items()}.items() <= {
        m: k for m, (k, _) in theirs.items()
    }.items(), name
