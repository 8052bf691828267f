"""The two that are compared, with one face: QEMU's processes and ours.

    with SIDES[name].pair(directory, length) as pair:
        pair.secondary.start()
        loads.fio(pair.secondary.forwarded, load, pair.secondary.pids)

Forwarded writes reach both over TCP on loopback; the LUN of a host is on a
unix socket. QEMU's NBD server has one address, so it is asked for one or the other.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import images
from tests.support import qemu
from tests.support.processes import free_port
from tests.support.tools import PATIENCE_S

NAME = "bench"


class Ours:
    """One of our workers, started as its service does. `forwarded` and `lun` are NBD URIs."""

    side = "ours"
    quiesce = False
    """Whether the client must hold its writes during a checkpoint."""

    def __init__(self, pair: OurPair, host: str) -> None:
        self._run = pair.directory / f"run-{host}"
        self._run.mkdir(exist_ok=True)
        self.forwarded = f"nbd://{OurPair.ADDRESS['beta']}:{pair.port}/{NAME}"
        self.forwarded_address = (OurPair.ADDRESS["beta"], pair.port), NAME
        path = pair.directory / f"{host}.nbd"
        self.lun = f"nbd+unix:///{NAME}?socket={path}"
        self.lun_address = str(path), NAME
        began = time.monotonic()
        self._log = pair.directory / f"{host}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tcmu_replication", "--config", str(pair.directory / f"etc-{host}"),
                 "--run", str(self._run), "--host", host, "serve", NAME],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self.qmp = self._connect()
        except BaseException:
            self.close()
            raise
        self.started_s = time.monotonic() - began

    @property
    def pids(self) -> list[int]:
        return [self.process.pid]

    def _connect(self) -> qemu.Qmp:
        path = self._run / f"{NAME}.sock"
        deadline = time.monotonic() + PATIENCE_S
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(path))
                return qemu.Qmp(sock)
            except OSError:
                sock.close()
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"our worker does not answer: {self._log.read_text()[-2000:]}"
                    ) from None
                time.sleep(0.002)

    def start(self) -> None:
        self.qmp.execute("start")

    def checkpoint(self) -> None:
        self.qmp.execute("xen-colo-do-checkpoint")

    def failover(self) -> None:
        """To the checkpoint; returns while the commit runs."""
        self.qmp.execute("failover", to="checkpoint", force=True)

    def wait_committed(self) -> None:
        """Wait for the end of the commit."""
        ended = self.qmp.wait_event("BLOCK_JOB_COMPLETED", type="commit")
        if "error" in ended:
            raise RuntimeError(f"our commit failed: {ended['error']}")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class OurPair:
    """A resource on two hosts of the loopback. The hosts are started when they are asked for.

    Disks and overlays lie in `disks`, everything else (and they too, if that is None) in `directory`.
    """

    ADDRESS = {"alpha": "127.0.0.1", "beta": "127.0.0.2"}
    MODE = {"alpha": "primary", "beta": "secondary"}

    def __init__(self, directory: Path, length: int, durable: bool, disks: Path | None = None) -> None:
        self.directory = directory
        self.disks = disks or directory
        self.length = length
        self.durable = durable
        self.port, self._control_port = free_port(), free_port()
        for host in self.ADDRESS:
            (directory / f"etc-{host}").mkdir()
            (self.disks / f"overlays-{host}").mkdir()
            (directory / f"etc-{host}" / f"{NAME}.toml").write_text(self._resource(host))

    def _resource(self, here: str) -> str:
        hosts = "".join(
            f'[host.{host}]\nmode = "{self.MODE[host]}"\naddress = "{address}"\n'
            f'disk = "{self.disks}/{host}.img"\noverlays = "{self.disks}/overlays-{host}"\n'
            for host, address in self.ADDRESS.items()
        )
        return (
            f'[resource]\nname = "{NAME}"\nsize = {self.length}\ndurable = {str(self.durable).lower()}\n'
            f'[link]\nport = {self.port}\ncontrol-port = {self._control_port}\ntrust = "address"\n'
            f'[nbd]\nlisten = "unix:{self.directory}/{here}.nbd"\n{hosts}'
        )


@contextlib.contextmanager
def our_secondary(
    directory: Path, length: int, *, tcp: bool, durable: bool = True, disks: Path | None = None
) -> Iterator[Ours]:
    """Our secondary, started."""
    pair = OurPair(directory, length, durable, disks)
    images.full(pair.disks / "beta.img", length)
    images.sparse(pair.disks / "alpha.img", length)
    host = Ours(pair, "beta")
    try:
        host.start()
        yield host
    finally:
        host.close()


@contextlib.contextmanager
def our_primary(directory: Path, length: int) -> Iterator[Ours]:
    """Our primary, with our secondary behind it; both started. Its `pids` are of both."""
    images.full(directory / "beta.img", length)
    images.full(directory / "alpha.img", length)
    pair = OurPair(directory, length, True)
    secondary = Ours(pair, "beta")
    try:
        secondary.start()
        primary = OurPrimary(pair, secondary)
        try:
            primary.start()
            yield primary
        finally:
            primary.close()
    finally:
        secondary.close()


class OurPrimary(Ours):
    """The primary of a pair."""

    def __init__(self, pair: OurPair, secondary: Ours) -> None:
        super().__init__(pair, "alpha")
        self._secondary = secondary

    def start(self) -> None:
        """Without a look at the disks: QEMU does not look either, and they differ if they served before."""
        self.qmp.execute("start", assume_clean=True)

    @property
    def pids(self) -> list[int]:
        return [self.process.pid, *self._secondary.pids]


class Theirs:
    """QEMU's secondary, with the face of ours."""

    side = "QEMU"
    quiesce = True
    """QEMU aborts in a checkpoint while a write is in flight."""

    def __init__(self, process: qemu.QemuSecondary) -> None:
        self._qemu = process
        self.forwarded, self.lun = _uri(process.address, "disk"), _uri(process.address, "top")
        self.forwarded_address = process.address, "disk"
        self.lun_address = process.address, "top"

    @property
    def pids(self) -> list[int]:
        return [self._qemu.pid]

    def checkpoint(self) -> None:
        self._qemu.checkpoint()

    def failover(self) -> None:
        self._qemu.failover()

    def wait_committed(self) -> None:
        error = self._qemu.wait_merged()
        if error is not None:
            raise RuntimeError(f"QEMU's merge failed: {error}")


class TheirPrimary:
    """QEMU's primary with QEMU's secondary behind it."""

    side = "QEMU"

    def __init__(self, primary: qemu.QemuPrimary, secondary: qemu.QemuSecondary) -> None:
        self._primary, self._secondary = primary, secondary
        self.lun = _uri(primary.address, "top")
        self.pids = [primary.pid, secondary.pid]

    def checkpoint(self) -> None:
        self._primary.checkpoint()
        self._secondary.checkpoint()


@contextlib.contextmanager
def their_secondary(directory: Path, length: int, *, tcp: bool) -> Iterator[Theirs]:
    """QEMU's secondary, started, with both exports on TCP or on a unix socket."""
    images.full(directory / "disk.img", length)
    address = ("127.0.0.1", free_port()) if tcp else None
    with qemu.secondary(directory, length, address=address) as process:
        process.start()
        process.export_disk()
        yield Theirs(process)


@contextlib.contextmanager
def their_primary(directory: Path, length: int) -> Iterator[TheirPrimary]:
    """QEMU's primary and secondary, connected over TCP and started."""
    places = [directory / "primary", directory / "secondary"]
    for place in places:
        place.mkdir()
        images.full(place / "disk.img", length)
    address = ("127.0.0.1", free_port())
    with (
        qemu.secondary(places[1], length, address=address) as secondary,
        qemu.primary(places[0], length) as primary,
    ):
        secondary.start()
        secondary.export_disk()
        primary.attach(address, "disk")
        primary.start()
        yield TheirPrimary(primary, secondary)


def _uri(address: qemu.Address, export: str) -> str:
    if isinstance(address, str):
        return f"nbd+unix:///{export}?socket={address}"
    return f"nbd://{address[0]}:{address[1]}/{export}"


SECONDARY = {"QEMU": their_secondary, "ours": our_secondary}
PRIMARY = {"QEMU": their_primary, "ours": our_primary}
