"""The steps of QEMU's documents on COLO and block replication, given to a pair of workers as they stand there.

In single quotes, with drive_add; the names are what a resource called disk0
has. Instead of a migration, which starts and ends replication with the
machines, there are Xen's commands. What differs from QEMU's answers is in
docs/qmp.md; test_qmp_same_script.py compares the answers themselves.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tcmu_replication.units import MiB
from tests.support import nbd, qemu
from tests.support.certificates import Authority
from tests.support.processes import Pair, Worker, free_port
from tests.support.tools import requires

pytestmark = [pytest.mark.interop, requires("qemu-io")]

SIZE = 8 * MiB

SECONDARY = """
{'execute':'qmp_capabilities'}
{'execute': 'nbd-server-start', 'arguments': {'addr': {'type': 'inet', 'data': {'host': '0.0.0.0', 'port': 'PORT'} } } }
{'execute': 'nbd-server-add', 'arguments': {'device': 'disk0-disk', 'writable': true } }
{'execute': 'xen-set-replication', 'arguments': {'enable': true, 'primary': false} }
"""
DRIVE_ADD = (
    "drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host=127.0.0.2,file.port=PORT,"
    "file.export=disk0-disk,node-name=replication0"
)
PRIMARY = f"""
{{'execute':'qmp_capabilities'}}
{{'execute': 'human-monitor-command', 'arguments': {{'command-line': '{DRIVE_ADD}'}} }}
{{'execute': 'x-blockdev-change', 'arguments': {{'parent': 'disk0', 'node': 'replication0' }} }}
{{'execute': 'xen-set-replication', 'arguments': {{'enable': true, 'primary': true}} }}
"""
PRIMARY_WITH_NAMES = """
{'execute':'qmp_capabilities'}
{'execute': 'blockdev-add', 'arguments': {'driver': 'replication', 'mode': 'primary', 'node-name': 'replication0', \
'file': {'driver': 'nbd', 'node-name': 'nbd0', 'export': 'disk0-disk', 'server': {'type': 'inet', \
'host': '127.0.0.2', 'port': 'PORT'}} } }
{'execute': 'x-blockdev-change', 'arguments': {'parent': 'disk0', 'node': 'replication0' } }
{'execute': 'xen-set-replication', 'arguments': {'enable': true, 'primary': true} }
"""
YANK = """
{'execute': 'yank', 'arguments': {'instances': [{'type': 'block-node', 'node-name': 'nbd0'}]} }
"""
PRIMARY_FAILOVER = """
{'execute': 'x-blockdev-change', 'arguments': {'parent': 'disk0', 'child': 'children.1'} }
{'execute': 'human-monitor-command', 'arguments': {'command-line': 'drive_del replication0' } }
{'execute': 'x-colo-lost-heartbeat' }
"""
SECONDARY_FAILOVER = """
{'execute': 'nbd-server-stop'}
{'execute': 'x-colo-lost-heartbeat'}
"""
MACHINES = """
stop cont migrate migrate-set-capabilities migrate-set-parameters object-add object-del chardev-add chardev-remove
device_add device_del qom-set drive-mirror blockdev-mirror
"""


class Monitor:
    """A connection to a control socket, to which text is said line by line."""

    def __init__(self, path: Path, port: int) -> None:
        self.events: list[str] = []
        self._port = port
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(qemu.PATIENCE_S)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        assert "QMP" in json.loads(self._file.readline())

    def say(self, text: str) -> list[Any]:
        """The answers to the lines."""
        answers = []
        for line in text.strip().splitlines():
            self.send(line)
            answers.append(self.answer())
        return answers

    def done(self, text: str) -> None:
        """Say it; every line succeeds, also one for the human monitor."""
        for line, answer in zip(text.strip().splitlines(), self.say(text), strict=True):
            assert answer.get("return") in ({}, ""), (line, answer)

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def send(self, line: str) -> None:
        """Say a line, and do not wait for the answer."""
        self._socket.sendall(line.replace("PORT", str(self._port)).encode() + b"\n")

    def answer(self) -> Any:
        """The next answer."""
        while "event" in (message := json.loads(self._file.readline())):
            self.events.append(message["event"])
        return message


def control(worker: Worker) -> Path:
    return worker.directory / "run/disk0.sock"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """A frozen end is waited for as long as may be: what the test does about it comes first."""
    with Pair(tmp_path, size=SIZE, link={"timeout": 23.0, "reconnect-delay": 1.0}) as pair:
        yield pair


@pytest.fixture
def primary(pair: Pair) -> Iterator[Monitor]:
    monitor = Monitor(control(pair.alpha), pair.port)
    yield monitor
    monitor.close()


@pytest.fixture
def secondary(pair: Pair) -> Iterator[Monitor]:
    monitor = Monitor(control(pair.beta), pair.port)
    yield monitor
    monitor.close()


def test_secondary_is_lost(pair: Pair, primary: Monitor, secondary: Monitor) -> None:
    """Frozen, so that a write of the primary hangs until the link is cut."""
    secondary.done(SECONDARY)
    primary.done(PRIMARY_WITH_NAMES)
    pair.alpha.io("write -P 0x11 0 64k")
    primary.done("{'execute': 'xen-colo-do-checkpoint'}")
    assert pair.beta.status()["epoch"] == 2
    pair.beta.pause()
    with nbd.Nbd(str(pair.alpha.socket), "disk0") as lun:
        hanging = lun.start(nbd.WRITE, 0, 65536, b"\x22" * 65536)
        qemu.until(lambda: pair.alpha.status()["link"]["in-flight"] > 0, "the write")
        primary.done(YANK)
        lun.finish([hanging])
        assert hanging.error == 0
    assert "was closed" in pair.alpha.status()["error"]  # by us, not by a time-out
    primary.done(PRIMARY_FAILOVER)
    assert primary.say("{'execute': 'query-colo-status'}") == [
        {"return": {"mode": "none", "last-mode": "primary", "reason": "request"}}
    ]
    assert "COLO_EXIT" in primary.events
    pair.alpha.io("write -P 0x33 64k 64k", "read -P 0x22 0 64k")
    pair.beta.resume()
    assert pair.beta.disk.read_bytes()[0] == 0x11


def test_primary_is_lost(pair: Pair, primary: Monitor, secondary: Monitor) -> None:
    secondary.done(SECONDARY)
    primary.done(PRIMARY)
    pair.alpha.io("write -P 0x11 0 64k")
    primary.done("{'execute': 'xen-colo-do-checkpoint'}")
    pair.alpha.io("write -P 0x22 0 64k")
    pair.alpha.kill()
    secondary.done(SECONDARY_FAILOVER)
    qemu.until(lambda: pair.beta.status()["stage"] == "done", "the commit")
    secondary.done(SECONDARY.strip().splitlines()[1])
    assert "COLO_EXIT" in secondary.events
    pair.beta.io("read -P 0x11 0 64k", "write -P 0x33 0 64k")


def test_new_secondary_is_attached_once_the_disks_are_equal(
    pair: Pair, primary: Monitor, secondary: Monitor
) -> None:
    """Where QEMU's documents mirror the disk, the operator copies it and starts both anew."""
    secondary.done(SECONDARY)
    primary.done(PRIMARY)
    primary.done(PRIMARY_FAILOVER)
    pair.alpha.io("write -P 0x44 0 64k")
    add, attach, _ = PRIMARY.strip().splitlines()[1:]
    primary.done(add)
    [refused] = primary.say(attach)
    assert "copy this host's disk to the secondary's and start both" in refused["error"]["desc"]
    assert secondary.say("{'execute': 'stop-replication'}") == [
        {"return": {"ignored": False, "stage": "done"}}
    ]
    pair.beta.disk.write_bytes(pair.alpha.disk.read_bytes())
    for monitor in (secondary, primary):
        [started] = monitor.say("{'execute': 'start'}")
        assert started["return"]["stage"] == "running"
    primary.done(attach)
    pair.alpha.io("write -P 0x55 64k 64k")
    disk = pair.beta.disk.read_bytes()
    assert (disk[0], disk[65536]) == (0x44, 0x55)


@pytest.mark.parametrize("command", MACHINES.split())
def test_machines_are_not_here(command: str, served: Monitor) -> None:
    """And nothing ends that a script would not have ended in QEMU."""
    [answer] = served.say(f"{{'execute': '{command}'}}")
    assert answer["error"]["class"] == "CommandNotFound"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitor]:
    """A running primary; it still runs at the end."""
    with Pair(tmp_path_factory.mktemp("machines"), size=SIZE) as pair:
        pair.replicate()
        monitor = Monitor(control(pair.alpha), pair.port)
        monitor.done("{'execute': 'qmp_capabilities'}")
        yield monitor
        monitor.close()
        assert pair.alpha.status()["stage"] == pair.beta.status()["stage"] == "running"


EXPORT_BY_NAME = """
{'execute':'qmp_capabilities'}
{'execute': 'nbd-server-start', 'arguments': {'addr': {'type': 'inet', 'data': {'host': '127.0.0.2', 'port': 'PORT'}}} }
{'execute': 'nbd-server-add', 'arguments': {'device': 'disk0-disk', 'name': 'disk0', 'writable': true } }
{'execute': 'xen-set-replication', 'arguments': {'enable': true, 'primary': false} }
"""
"""The export that both kinds of primaries ask for."""
LUN = """
{'execute': 'nbd-server-start', 'arguments': {'addr': {'type': 'unix', 'data': {'path': 'SOCKET'} } } }
{'execute': 'nbd-server-add', 'arguments': {'device': 'disk0', 'writable': true } }
"""
FAILOVER = """
{'execute': 'nbd-server-stop'}
{'execute': 'xen-set-replication', 'arguments': {'enable': false, 'primary': false, 'failover': true} }
"""
DISK = "if=none,id=disk0-disk,node-name=disk,driver=raw,file.driver=file,file.filename={0}/disk.img"
QEMU = {
    "primary": [
        "-drive", DISK,
        "-drive", "if=none,id=disk0,node-name=top,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=disk",
    ],
    "secondary": [
        "-drive", DISK,
        "-drive", "if=none,id=disk0,node-name=replication,driver=replication,mode=secondary,top-id=disk0,"
        "file.driver=qcow2,file.file.filename={0}/active.qcow2,file.backing.driver=qcow2,"
        "file.backing.file.filename={0}/hidden.qcow2,file.backing.backing=disk",
    ],
}  # fmt: skip


class Place(NamedTuple):
    """Where a pair is, and the port between its ends."""

    base: Path
    ports: dict[str, object]


@contextlib.contextmanager
def end_of(place: Place, mode: str, kind: str) -> Iterator[tuple[Monitor, Path]]:
    """One end, not started: its monitor and its disk. `kind`: whose it is; the other end may be anybody's."""
    port = int(str(place.ports["port"]))
    if kind == "ours":
        host = "alpha" if mode == "primary" else "beta"
        worker = Worker(place.base, host, {"name": "disk0", "size": SIZE}, place.ports, peer={"qemu": True})
        worker.start()
        try:
            monitor = Monitor(control(worker), port)
            yield monitor, worker.disk
            monitor.close()
        finally:
            worker.stop()
        return
    directory = place.base / mode
    directory.mkdir()
    qemu.make_raw(directory / "disk.img", SIZE)
    for overlay in ("active", "hidden"):
        qemu.make_qcow2(directory / f"{overlay}.qcow2", SIZE)
    with qemu.qemu(directory, *(argument.format(directory) for argument in QEMU[mode])) as process:
        process.qmp.close()
        monitor = Monitor(directory / "qemu.qmp", port)
        yield monitor, directory / "disk.img"
        monitor.close()


@requires(qemu.PROGRAM, "qemu-img")
@pytest.mark.parametrize(("first", "second"), [("ours", "qemu"), ("qemu", "ours"), ("qemu", "qemu")])
def test_either_end_may_be_qemus(tmp_path: Path, first: str, second: str) -> None:
    """The same lines, whoever they are said to; `first` is the primary's kind, `second` the secondary's."""
    port = free_port()
    place = Place(tmp_path, {"port": port, "control-port": free_port(), "trust": "address"})
    with (
        end_of(place, "secondary", second) as (secondary, copy),
        end_of(place, "primary", first) as (primary, disk),
    ):
        secondary.done(EXPORT_BY_NAME)
        primary.done(PRIMARY.replace("disk0-disk", "disk0"))
        luns = [str(tmp_path / f"{name}.sock") for name in ("first", "second")]
        primary.done(LUN.replace("SOCKET", luns[0]))
        with nbd.Nbd(luns[0], "disk0") as lun:
            lun.write(0, b"\x11" * 65536)
            secondary.done("{'execute': 'xen-colo-do-checkpoint'}")
            lun.write(0, b"\x22" * 65536)
            lun.flush()
        assert [path.read_bytes()[0] for path in (disk, copy)] == [0x22, 0x22]
        secondary.done(FAILOVER)
        status = "{'execute': 'query-xen-replication-status'}"
        qemu.until(lambda: secondary.say(status) == [{"return": {"error": False}}], "the end of the failover")
        secondary.done(LUN.replace("SOCKET", luns[1]))
        with nbd.Nbd(luns[1], "disk0") as lun:
            assert lun.read(0, 65536) == b"\x11" * 65536
        primary.done(
            PRIMARY_FAILOVER.replace(
                "x-colo-lost-heartbeat'",
                "xen-set-replication', 'arguments': {'enable': false, 'primary': true}",
            )
        )
        with nbd.Nbd(luns[0], "disk0") as lun:
            assert lun.read(0, 65536) == b"\x22" * 65536


@requires("openssl")
def test_with_tls_whatever_the_script_calls_its_credentials(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificates = {
        "alpha": authority.issue(tmp_path / "tls-alpha", "127.0.0.1"),
        "beta": authority.issue(tmp_path / "tls-beta", "127.0.0.2"),
    }
    tls = "'tls-creds': 'tls0'"
    with Pair(tmp_path, size=SIZE, certificates=certificates) as pair:
        monitors = secondary, primary = [
            Monitor(control(worker), pair.port) for worker in (pair.beta, pair.alpha)
        ]
        secondary.done(SECONDARY.replace("'addr'", f"{tls}, 'tls-authz': 'authz0', 'addr'"))
        primary.done(PRIMARY_WITH_NAMES.replace("'export'", f"{tls}, 'export'"))
        pair.alpha.io("write -P 0x11 0 64k")
        assert pair.beta.disk.read_bytes()[0] == 0x11
        with pytest.raises(ConnectionError):
            nbd.Nbd(("127.0.0.2", pair.port), "disk0-disk")  # without TLS
        for monitor in monitors:
            monitor.close()


def test_yank_frees_a_command_that_waits_for_the_secondary(
    pair: Pair, primary: Monitor, secondary: Monitor
) -> None:
    """Out of band, on the connection whose command hangs, as QEMU's own."""
    secondary.done(SECONDARY)
    primary.done(
        PRIMARY_WITH_NAMES.replace("qmp_capabilities'", "qmp_capabilities', 'arguments': {'enable': ['oob']}")
    )
    pair.beta.pause()
    with nbd.Nbd(str(pair.alpha.socket), "disk0") as lun:
        hanging = lun.start(nbd.WRITE, 0, 65536, b"\x22" * 65536)
        qemu.until(lambda: pair.alpha.status()["link"]["in-flight"] > 0, "the write")
        remove = PRIMARY_FAILOVER.strip().splitlines()[0].replace("{", "{'id': 'removed', ", 1)
        primary.send(remove)
        primary.send(YANK.strip().replace("{'execute'", "{'id': 'yanked', 'exec-oob'", 1))
        assert [primary.answer(), primary.answer()] == [
            {"return": {}, "id": "yanked"},
            {"return": {}, "id": "removed"},
        ]
        lun.finish([hanging])
        assert hanging.error == 0
    pair.beta.resume()
