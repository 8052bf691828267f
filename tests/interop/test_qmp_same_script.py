"""One script, two programs: what a controller says to QEMU it can say to our worker, and hears the same.

QEMU is started with the names that a resource called disk0 has here: the
devices `disk0` (the LUN) and `disk0-disk`, the nodes `replication`, `disk`, and on a
primary `top`. What differs on purpose is not in the scripts; docs/qmp.md lists it.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.units import MiB
from tests.support import qemu as support
from tests.support.nbd import Nbd
from tests.support.processes import Pair, free_port
from tests.support.tools import requires

pytestmark = [pytest.mark.interop, requires(support.PROGRAM, "qemu-img")]

SIZE = 8 * MiB
Step = dict[str, Any] | Callable[["Monitor"], Any]


class Monitor:
    """A QMP connection that keeps whole replies. `directory` is where the script may make a socket.

    `port` is where a secondary listens for its primary.
    """

    def __init__(self, path: Path, directory: Path, port: int = 0) -> None:
        self.directory = directory
        self.port = port
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
        text = json.dumps(message).replace("DIR", str(self.directory)).replace("PORT", str(self.port))
        self._socket.sendall(text.encode() + b"\n")
        while "event" in (reply := json.loads(self._file.readline())):
            self.events.append(reply["event"])
        reply.get("error", {}).pop("data", None)
        return json.loads(json.dumps(reply).replace(str(self.directory), "DIR"))

    def quit(self) -> dict[str, Any]:
        """The reply to `quit`; the events may come before it or after it."""
        reply = self.say(execute("quit"))
        with contextlib.suppress(ConnectionResetError):
            self.events += [json.loads(line)["event"] for line in self._file]
        return reply

    def nbd(self, export: str) -> Nbd:
        """A connection to one of the exports that the script has made."""
        return Nbd(str(self.directory / "n.sock"), export, timeout=support.PATIENCE_S)

    def link(self, export: str) -> Nbd:
        """A connection as the primary's, from its address."""
        return Nbd(("127.0.0.2", self.port), export, timeout=support.PATIENCE_S)

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


def write(export: str, offset: int, byte: int, *, forwarded: bool = False) -> Step:
    """Write 64 KiB of `byte` through an export; `forwarded`: as the primary does."""

    def step(monitor: Monitor) -> None:
        with monitor.link(export) if forwarded else monitor.nbd(export) as nbd:
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
    execute("nbd-server-start", addr=inet("0", ipv4=False, ipv6=False)),
    execute("nbd-server-start", addr=inet("0", ipv4=1)),
    execute("nbd-server-start", addr=inet("0", to=70000)),
    execute("nbd-server-start", addr=inet("0", numeric=True, ipv6=False), max_connections=0),
    execute("nbd-server-stop"),
    execute(
        "nbd-server-start", addr={"type": "inet", "data": {"host": "localhost", "port": "0", "ipv4": True}}
    ),
    execute("nbd-server-stop"),
    execute("nbd-server-stop"),
    execute("nbd-server-add", device="disk0-disk"),
    execute("nbd-server-remove", name="x"),
    execute("block-export-add", type="nbd", id="e", node_name="replication"),
    execute("nbd-server-start", addr=unix()),
    execute("nbd-server-start", addr=unix()),
    execute("nbd-server-add", device="nope"),
    execute("nbd-server-add", device="disk0", bitmap="b"),
    execute("nbd-server-add", device="disk0", bitmap=1),
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

LINK = {"type": "unix", "path": "DIR/link.sock"}
"""Where the secondary listens; it exports its disk as disk0-disk."""


def nbd(name: str | None, **options: Any) -> dict[str, Any]:
    """The connection to it, as blockdev-add has it."""
    named = {} if name is None else {"node-name": name}
    return {"driver": "nbd", "server": LINK, "export": "disk0-disk", **named, **options}


def add(name: str | None, file: Any, **options: Any) -> dict[str, Any]:
    """A replication filter over `file`."""
    named = {} if name is None else {"node-name": name}
    options = {"mode": "primary", **options}
    return {
        "execute": "blockdev-add",
        "arguments": {"driver": "replication", "file": file, **named, **options},
    }


def add_nbd(name: str | None, **options: Any) -> dict[str, Any]:
    return {"execute": "blockdev-add", "arguments": nbd(name, **options)}


def human(line: str) -> dict[str, Any]:
    return execute("human-monitor-command", command_line=line)


def instance(name: str) -> dict[str, str]:
    return {"type": "block-node", "node-name": name}


DRIVE = (
    "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.path=DIR/link.sock,"
    "file.export=disk0-disk,node-name=replication0"
)

ADDING: list[Step] = [
    execute("query-yank"),
    execute("blockdev-add"),
    execute("blockdev-add", driver="nope"),
    execute("blockdev-add", driver="nbd", node_name="x"),
    execute("blockdev-add", driver="nbd", node_name="x", server={"type": "unix"}),
    execute(
        "blockdev-add", driver="nbd", node_name="x", server={"type": "inet", "host": "127.0.0.1", "port": 1}
    ),
    execute("blockdev-add", driver="nbd", node_name="x", server=inet("1")),
    add_nbd(None),
    add_nbd("x y"),
    add_nbd("x" * 32),
    add_nbd("disk0"),
    add_nbd("disk"),
    add_nbd("x", no_such_option=1),
    add_nbd("x", **{"reconnect-delay": -1}),
    add_nbd("x", **{"detect-zeroes": "x"}),
    execute("blockdev-add", driver="replication", node_name="r"),
    execute("blockdev-add", driver="replication", node_name="r", mode="primary"),
    add("r", 5),
    add("r", "nope"),
    add("r", {"driver": "nope"}),
    add("r", {"driver": "nbd"}),
    add("r", nbd("nbd0"), mode="x"),
    add("r", nbd("nbd0"), mode="secondary"),
    add("r", nbd("nbd0"), **{"top-id": "disk0"}),
    add("r", nbd("r")),
    add(None, nbd("nbd0")),
    execute("blockdev-del"),
    execute("blockdev-del", node_name="nope"),
    execute("blockdev-del", node_name="disk"),
    execute("blockdev-del", node_name="disk0"),
    execute("blockdev-del", node_name="top"),
    add("r", nbd("nbd0")),
    add("r", nbd("nbd0")),
    add("r", nbd("nbd1")),
    execute("query-yank"),
    execute("blockdev-del", node_name="nbd0"),
    execute("blockdev-del", node_name="r"),
    execute("blockdev-del", node_name="r"),
    execute("query-yank"),
    add_nbd("nbd0"),
    add("nbd0", "nbd0"),
    add("r", "nbd0"),
    execute("blockdev-del", node_name="nbd0"),
    execute("x-blockdev-change", parent="disk0", node="nbd0"),
    execute("x-blockdev-change", parent="top", node="r"),
    execute("x-blockdev-change", parent="top", node="r"),
    execute("blockdev-del", node_name="r"),
    execute("x-blockdev-change", parent="top", child="children.1"),
    execute("x-blockdev-change", parent="top", child="children.1"),
    execute("blockdev-del", node_name="r"),
    execute("blockdev-del", node_name="nbd0"),
    execute("yank"),
    execute("yank", instances=[]),
    execute("yank", instances=[{"type": "x"}]),
    execute("yank", instances=[{"type": "block-node"}]),
    execute("yank", instances=[instance("nbd0")]),
    execute("yank", instances=[{"type": "chardev", "id": "nope"}]),
    execute("yank", instances=[{"type": "migration"}]),
    execute("yank", instances=[{"type": "migration", "x": 1}]),
    execute("query-yank", x=1),
    execute("human-monitor-command"),
    human("no-such-line"),
    human("drive_del nope"),
    human("drive_add -n buddy driver=nope"),
    human(DRIVE.replace("nbd", "nope", 1)),
    human(DRIVE),
    human(DRIVE),
    human("drive_del replication0"),
    human("drive_del replication0"),
]
"""What goes before replication starts, and what is refused."""

FORMS: dict[str, tuple[list[Step], str, str | None, list[Step]]] = {
    "one-command": (
        [add("replication0", nbd("nbd0", **{"reconnect-delay": 10}))],
        "replication0", "nbd0",
        [execute("blockdev-del", node_name="nbd0"), execute("blockdev-del", node_name="replication0")],
    ),
    "connection-first": (
        [add_nbd("nbd0"), add("replication0", "nbd0")],
        "replication0", "nbd0",
        [execute("blockdev-del", node_name="replication0"), execute("blockdev-del", node_name="nbd0")],
    ),
    "connection-alone": (
        [add_nbd("nbd0", **{"detect-zeroes": "on"})],
        "nbd0", "nbd0",
        [execute("blockdev-del", node_name="nbd0")],
    ),
    "drive-add": ([human(DRIVE)], "replication0", None, [human("drive_del replication0")]),
    "our-names": (
        [add("replication", nbd("remote"))],
        "replication", "remote",
        [execute("blockdev-del", node_name="replication")],
    ),
}  # fmt: skip
"""Ways to add the replica: how, the names of the quorum's child and of the connection, and how it is deleted."""


def replicating(form: str, *, early: bool = True) -> list[Step]:
    """A primary's whole life: set up, start, checkpoint, the secondary is lost, and it goes on alone.

    `early`: the replica is the quorum's child before replication starts, as in QEMU's documents.
    """
    adding, root, connection, deleting = FORMS[form]
    attach = execute("x-blockdev-change", parent="disk0", node=root)
    start = execute("xen-set-replication", enable=True, primary=True)
    cut = (
        []
        if connection is None
        else [{"exec-oob": "yank", "arguments": {"instances": [instance(connection)]}}]
    )
    return [
        execute("nbd-server-start", addr=unix()),
        execute("nbd-server-add", device="disk0", writable=True),
        *adding,
        *([attach, start] if early else [start, attach]),
        attach,
        *([execute("query-yank")] if connection is not None else []),
        deleting[0],
        execute("query-xen-replication-status"),
        write("disk0", 0, 0x11),
        execute("xen-colo-do-checkpoint"),
        write("disk0", 65536, 0x22),
        execute("query-xen-replication-status"),
        *cut,
        *cut,
        execute("x-blockdev-change", parent="disk0", child="children.1"),
        execute("x-blockdev-change", parent="disk0", child="children.1"),
        *deleting,
        *deleting,
        *([execute("query-yank"), *cut] if cut else []),
        execute("xen-set-replication", enable=False, primary=True),
        execute("query-xen-replication-status"),
        write("disk0", 131072, 0x33),
        read("disk0", 65536),
        execute("nbd-server-stop"),
        execute("quit"),
    ]


COLO_SECONDARY: list[Step] = [
    execute("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.2", "port": "PORT"}}),
    execute("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.2", "port": "PORT"}}),
    execute("nbd-server-add", device="disk0-disk", writable=True),
    execute("nbd-server-add", device="disk0-disk", writable=True),
    execute("query-block-exports"),
    write("disk0-disk", 0, 0x11, forwarded=True),
    execute("xen-set-replication", enable=True, primary=False),
    write("disk0-disk", 65536, 0x22, forwarded=True),
    execute("xen-colo-do-checkpoint"),
    write("disk0-disk", 0, 0x33, forwarded=True),
    execute("query-xen-replication-status"),
    execute("nbd-server-stop"),
    execute("nbd-server-stop"),
    execute("nbd-server-add", device="disk0-disk", writable=True),
    execute("query-block-exports"),
    execute("xen-set-replication", enable=False, primary=False, failover=True),
    until_clean,
    execute("nbd-server-start", addr=unix()),
    execute("nbd-server-add", device="disk0", writable=True),
    read("disk0", 0),
    read("disk0", 65536),
    execute("quit"),
]
"""The documents' order: the server and the export, then replication; at a failover the server goes first."""


NODES = {"top", "replication", "active", "hidden", "disk"}


def _nodes(result: list[dict[str, Any]]) -> Any:
    """What both call the same; drivers and files of the layers below differ."""
    return {n["node-name"]: (n["ro"], n["image"]["virtual-size"]) for n in result if n["node-name"] in NODES}


SHOWN: dict[str, Callable[[Any], Any]] = {
    "query-block": lambda result: {device["device"] for device in result},
    "query-named-block-nodes": _nodes,
    "query-yank": lambda result: [one for one in result if one["type"] == "block-node"],
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
        command = step.get("execute") or step.get("exec-oob")
        reply = monitor.quit() if command == "quit" else monitor.say(step)
        if "return" in reply and command in SHOWN:
            reply["return"] = SHOWN[str(command)](reply["return"])
        description = reply.get("error", {}).get("desc", "")
        if description.startswith("Permission conflict"):  # by whom is said in words of its own
            reply["error"]["desc"] = description.partition(" by ")[0]
        heard.append((json.dumps(step), reply))
    return heard


def until_quit(events: list[str]) -> list[str]:
    """Without what closing makes of exports, of which there is more or less when the connection ends."""
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
    return Monitor(worker.directory / "run/disk0.sock", directory, pair.port)


@contextlib.contextmanager
def qemu_secondary(directory: Path) -> Iterator[Monitor]:
    """QEMU's, not started, with our names."""
    qemu = directory / "qemu"
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
        monitor = Monitor(qemu / "qemu.qmp", qemu, free_port())
        yield monitor
        monitor.close()


def test_secondary_in_the_documents_order(directory: Path) -> None:
    """The server that the script starts is where ours listens for the primary already."""
    with qemu_secondary(directory) as monitor:
        heard = play(COLO_SECONDARY, monitor)
        qemu_events = monitor.events
    with Pair(directory / "ours", size=SIZE, link={"trust": "address"}) as pair:
        monitor = our_monitor(pair, "beta", directory / "ours")
        compare(heard, play(COLO_SECONDARY, monitor))
        assert [e for e in until_quit(monitor.events) if e in qemu_events] == until_quit(qemu_events)
        monitor.close()


def test_secondary(directory: Path) -> None:
    ours = directory / "ours"
    with qemu_secondary(directory) as monitor:
        heard = play(SECONDARY, monitor)
        qemu_events = monitor.events
    with Pair(ours, size=SIZE, link={"trust": "address"}) as pair:
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


@contextlib.contextmanager
def qemu_primary(directory: Path) -> Iterator[Monitor]:
    """QEMU's, without a replica, and a secondary of QEMU's that has been started."""
    qemu, peer = directory / "qemu", directory / "peer"
    support.make_raw(qemu / "disk.img", SIZE)
    arguments = (
        "-drive", f"if=none,id=disk0-disk,node-name=disk,driver=raw,file.driver=file,file.filename={qemu}/disk.img",
        "-drive", "if=none,id=disk0,node-name=top,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=disk",
    )  # fmt: skip
    with (
        support.secondary(peer, SIZE, address=str(qemu / "link.sock")) as secondary,
        support.qemu(qemu, *arguments) as process,
    ):
        secondary.qmp.execute("nbd-server-add", device="disk0", name="disk0-disk", writable=True)
        secondary.start()
        process.qmp.close()
        monitor = qemu_monitor(qemu)
        yield monitor
        monitor.close()


@contextlib.contextmanager
def our_pair(directory: Path) -> Iterator[tuple[Pair, Monitor]]:
    """Ours, with the secondary started."""
    ours = directory / "ours"
    with Pair(ours, size=SIZE, link={"socket": str(ours / "link.sock")}) as pair:
        pair.beta.cli("start", "disk0")
        monitor = our_monitor(pair, "alpha", ours)
        yield pair, monitor
        monitor.close()


def test_replica_that_is_added_and_deleted(directory: Path) -> None:
    with qemu_primary(directory) as monitor:
        heard = play(ADDING, monitor)
    with our_pair(directory) as (_, monitor):
        compare(heard, play(ADDING, monitor))


@pytest.mark.parametrize("early", [True, False], ids=["attached-before-start", "attached-after-start"])
@pytest.mark.parametrize("form", FORMS)
def test_primary_from_set_up_to_the_loss_of_its_secondary(directory: Path, form: str, early: bool) -> None:
    with qemu_primary(directory) as monitor:
        heard = play(replicating(form, early=early), monitor)
    with our_pair(directory) as (pair, monitor):
        compare(heard, play(replicating(form, early=early), monitor))
        disk = pair.beta.disk.read_bytes()
        assert (disk[0], disk[65536], disk[131072]) == (0x11, 0x22, 0)


class Schema:
    """A program's answer to query-qmp-schema."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.types = {row["name"]: row for row in rows}

    def names(self, kind: str) -> set[str]:
        return {name for name, row in self.types.items() if row["meta-type"] == kind}

    def json_type(self, name: str) -> str:
        """What a value of a type is in JSON."""
        row = self.types[name]
        kinds = {kind: kind for kind in ("array", "object", "alternate")}
        kinds |= {"builtin": str(row.get("json-type")), "enum": "string"}
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
