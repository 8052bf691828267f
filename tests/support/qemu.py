"""QEMU's block layer as judge and peer: processes without a machine, driven over QMP.

    with secondary(directory, 64 * MiB) as qemu:        QEMU's secondary, not started
        qemu.start()
        qemu.export_disk()                              what a primary connects to
        with qemu.nbd("disk") as forwarded, qemu.nbd("top") as lun: ...

The images lie in `directory` (put it on tmpfs: `images()`). Leaving the context
kills the one process that was started. Everything blocks; nothing here uses
our own code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.nbd import Address, Nbd
from tests.support.tools import PATIENCE_S

PROGRAM = "qemu-system-x86_64"


class QmpError(Exception):
    """QEMU's answer to a command that failed; `str()` is its `desc`."""


class Qmp:
    """A QMP client on a connected socket. `events` has all that came and was not taken by `wait_event`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(PATIENCE_S)
        self._received = b""
        self.events: list[dict[str, Any]] = []
        while "QMP" not in (message := self._message()):
            self.events.append(message)
        self.execute("qmp_capabilities")

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """The command's answer; `_` in argument names stands for `-`. Raises `QmpError`."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._sock.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while True:
            message = self._message()
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(message["error"]["desc"])
            elif "QMP" not in message:  # QEMU greets twice when it is connected to while it starts
                return message["return"]

    def wait_event(self, name: str, **data: Any) -> dict[str, Any]:
        """Take the first event of that name with these values in its data; its data."""
        while True:
            for event in self.events:
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    self.events.remove(event)
                    return event.get("data", {})
            message = self._message()
            assert "event" in message, message
            self.events.append(message)

    def close(self) -> None:
        """Hang up. Twice is fine."""
        self._sock.close()

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            received = self._sock.recv(65536)
            if not received:
                raise ConnectionError("QEMU closed its QMP socket")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


class Qemu:
    """A QEMU process without a machine, and its QMP. `output` is where it writes its last words.

    It talks to one client of a QMP socket at a time; `second_qmp` is a socket for another one.
    """

    def __init__(self, directory: Path, arguments: Sequence[str], name: str = "qemu") -> None:
        self.directory = directory
        self.output = directory / f"{name}.log"
        self._servers = 0
        path = directory / f"{name}.qmp"
        self.second_qmp = directory / f"{name}.second.qmp"
        for each in (path, self.second_qmp):
            each.unlink(missing_ok=True)
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, "-machine", "none", "-nodefaults", "-nographic", "-S",
                 "-qmp", f"unix:{path},server=on,wait=off",
                 "-qmp", f"unix:{self.second_qmp},server=on,wait=off", *arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            # One connection only: QEMU may greet the next one once more for one that has gone.
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            until(lambda: self._connects(sock, path), "QEMU's QMP socket")
            self.qmp = Qmp(sock)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """False once the process has ended, however."""
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process: STOP freezes it, CONT thaws it."""
        self.process.send_signal(number)

    def kill(self) -> int:
        """SIGKILL; its exit status."""
        self.process.kill()
        return self.process.wait()

    def quit(self) -> int:
        """End it cleanly, with its images closed; its exit status."""
        with contextlib.suppress(ConnectionError):
            self.qmp.execute("quit")
        return self.process.wait(PATIENCE_S)

    def serve_nbd(self, address: Address) -> None:
        """Start the NBD server on a unix socket's path or on (host, port). Raises `QmpError`."""
        if isinstance(address, str):
            where: dict[str, Any] = {"type": "unix", "data": {"path": address}}
        else:
            where = {"type": "inet", "data": {"host": address[0], "port": str(address[1])}}
        self.qmp.execute("nbd-server-start", addr=where)
        self.address: Address = address

    def export(self, node: str, name: str, *, writable: bool = True) -> None:
        """Export a node by its node-name. Raises `QmpError`."""
        self.qmp.execute(
            "block-export-add", type="nbd", id=name, node_name=node, name=name, writable=writable
        )

    def unexport(self, name: str) -> None:
        """End an export and its connections, and wait until it is gone."""
        self.qmp.execute("block-export-del", id=name, mode="hard")
        self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=name)

    def nbd(self, name: str) -> Nbd:
        """A connection to one of its exports."""
        return Nbd(self.address, name, timeout=PATIENCE_S)

    def _connects(self, sock: socket.socket, path: Path) -> bool:
        assert self.alive, f"QEMU ended at once: {self.output.read_text()}"
        return sock.connect_ex(str(path)) == 0


class Replication(Qemu):
    """What both ends have in common: the commands of replication."""

    primary: bool

    def start(self, primary: bool | None = None) -> None:
        """Raises `QmpError`."""
        mode = self.primary if primary is None else primary
        self.qmp.execute("xen-set-replication", enable=True, primary=mode)

    def checkpoint(self) -> None:
        """Raises `QmpError`. On a secondary no write may be in flight, or QEMU aborts."""
        self.qmp.execute("xen-colo-do-checkpoint")

    def stop(self, failover: bool = False) -> None:
        """Raises `QmpError`, but never with `failover`: QEMU throws that away."""
        self.qmp.execute("xen-set-replication", enable=False, primary=self.primary, failover=failover)

    def error(self) -> str | None:
        """get_error: None, or its text."""
        return self.qmp.execute("query-xen-replication-status").get("desc")


class QemuSecondary(Replication):
    """Nodes: `top` (quorum) > `replication` > `active` > `hidden` > `disk`. Exports: `top`, and `disk` on demand."""

    primary = False

    def export_disk(self) -> None:
        """What the primary connects to, as `disk`: by device name, so that writes pass the copy filter."""
        self.qmp.execute("nbd-server-add", device="disk0", name="disk", writable=True)

    def failover(self) -> None:
        """To the checkpoint, in the order that is safe; returns while the merge runs."""
        exports = {export["id"] for export in self.qmp.execute("query-block-exports")}
        if "disk" in exports:
            self.unexport("disk")
        self.stop(failover=True)

    def merging(self) -> bool:
        """Whether the merge still runs: its filter is in the graph (no job shows it)."""
        nodes = self.qmp.execute("query-named-block-nodes", flat=True)
        return any(node["drv"] == "mirror_top" for node in nodes)

    def wait_merged(self) -> str | None:
        """Wait for the end of the merge; the error that it left."""
        until(lambda: not self.merging(), "the end of QEMU's merge")
        return self.error()


class QemuPrimary(Replication):
    """Nodes: `top` (quorum of `disk` and, once attached, `replication` > `peer`). Export: `top`."""

    primary = True

    def attach(self, peer: Address, export: str, *, reconnect_delay: int = 0) -> None:
        """Hang the replication filter over an NBD client of `peer` below the quorum. Raises `QmpError`."""
        if isinstance(peer, str):
            server: dict[str, Any] = {"type": "unix", "path": peer}
        else:
            server = {"type": "inet", "host": peer[0], "port": str(peer[1])}
        nbd = {"driver": "nbd", "node-name": "peer", "server": server, "export": export}
        self.qmp.execute(
            "blockdev-add", driver="replication", mode="primary", node_name="replication",
            file=nbd | {"reconnect-delay": reconnect_delay},
        )  # fmt: skip
        self.qmp.execute("x-blockdev-change", parent="top", node="replication")

    def detach(self) -> None:
        """Take the filter out again."""
        self.qmp.execute("x-blockdev-change", parent="top", child="children.1")
        self.qmp.execute("blockdev-del", node_name="replication")


@contextlib.contextmanager
def qemu(directory: Path, *arguments: str, kind: type[Qemu] = Qemu, name: str = "qemu") -> Iterator[Any]:
    """A process with these arguments, killed at the end."""
    process = kind(directory, arguments, name)
    try:
        yield process
    finally:
        process.qmp.close()
        process.kill()


@contextlib.contextmanager
def secondary(
    directory: Path,
    length: int,
    *,
    disk: Path | None = None,
    disk_options: str = "",
    cluster: int | None = None,
    address: Address | None = None,
    fresh: bool = True,
    options: str = "",
) -> Iterator[QemuSecondary]:
    """QEMU's secondary of `disk` (default `directory`/disk.img, made if missing), `top` exported, not started.

    `disk_options` replace those of the disk's node (which must be named `disk`), e.g. to put blkdebug there.
    `cluster` is the overlays' cluster size; without `fresh` the overlays that lie there are used.
    """
    disk = disk or directory / "disk.img"
    if not disk.exists():
        make_raw(disk, length)
    for overlay in ("hidden", "active"):
        if fresh:
            make_qcow2(directory / f"{overlay}.qcow2", length, cluster)
    file = f"driver=raw,file.driver=file,file.filename={disk}"
    with qemu(
        directory,
        "-drive", f"if=none,id=disk0,node-name=disk,{disk_options or file}",
        "-drive", "if=none,id=replication0,node-name=replication,driver=replication,mode=secondary,top-id=top0,"
        f"file.driver=qcow2,file.node-name=active,file.file.filename={directory}/active.qcow2,"
        f"file.backing.driver=qcow2,file.backing.node-name=hidden,file.backing.file.filename={directory}/hidden.qcow2,"
        f"file.backing.backing=disk{options}",
        "-drive", "if=none,id=top0,node-name=top,driver=quorum,read-pattern=fifo,vote-threshold=1,"
        "children.0=replication",
        kind=QemuSecondary, name="secondary",
    ) as process:  # fmt: skip
        process.serve_nbd(address or str(directory / "secondary.nbd"))
        process.export("top", "top")
        yield process


@contextlib.contextmanager
def primary(
    directory: Path,
    length: int,
    *,
    disk: Path | None = None,
    disk_options: str = "",
    address: Address | None = None,
) -> Iterator[QemuPrimary]:
    """QEMU's primary of `disk` (default `directory`/disk.img, made if missing), `top` exported, not attached."""
    disk = disk or directory / "disk.img"
    if not disk.exists():
        make_raw(disk, length)
    file = f"driver=raw,file.driver=file,file.filename={disk}"
    with qemu(
        directory,
        "-drive", f"if=none,id=disk0,node-name=disk,{disk_options or file}",
        "-drive", "if=none,id=top0,node-name=top,driver=quorum,read-pattern=fifo,vote-threshold=1,children.0=disk",
        kind=QemuPrimary, name="primary",
    ) as process:  # fmt: skip
        process.serve_nbd(address or str(directory / "primary.nbd"))
        process.export("top", "top")
        yield process


@contextlib.contextmanager
def images() -> Iterator[Path]:
    """A directory for images, on tmpfs where there is one, with a path short enough for sockets."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="qemu-", dir=base))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def make_raw(path: Path, length: int) -> None:
    """An empty raw image."""
    with path.open("wb") as file:
        file.truncate(length)


def make_qcow2(path: Path, length: int, cluster: int | None = None) -> None:
    """An empty qcow2 image, in place of what was there."""
    path.write_bytes(_empty_qcow2(length, cluster))


@functools.cache
def _empty_qcow2(length: int, cluster: int | None) -> bytes:
    """The same empty image is made once: qemu-img takes as long as a QEMU to start."""
    options = [] if cluster is None else ["-o", f"cluster_size={cluster}"]
    with images() as directory:
        path = directory / "empty.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(length)], check=True
        )
        return path.read_bytes()


def allocated(path: Path) -> list[tuple[int, int]]:
    """The (offset, length) runs that a qcow2 image itself holds, without what lies below. Nobody may have it open."""
    said = subprocess.run(
        ["qemu-img", "map", "--output=json", "-f", "qcow2", str(path)], check=True, capture_output=True
    )
    return [
        (run["start"], run["length"]) for run in json.loads(said.stdout) if run.get("present") or run["data"]
    ]


def until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again until the condition holds; for what QEMU has no event for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)
