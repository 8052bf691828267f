"""All four pairings of primary and secondary, ours and QEMU's, over TCP, unix sockets and TLS.

Each end is a real process behind the same few calls, `Ours` or `Qemus`, and
each test is one story that every pairing must tell alike. A QEMU primary does
not command its secondary, and a QEMU secondary aborts if it is checkpointed
with a write in flight: so only ours, on either end, make checkpoints under load.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tcmu_replication.units import MiB
from tests.support import qemu
from tests.support.certificates import Authority
from tests.support.load import Load
from tests.support.nbd import Address, Nbd
from tests.support.processes import HOSTS, Worker, free_port
from tests.support.tools import requires

pytestmark = [pytest.mark.interop, requires("qemu-system-x86_64", "qemu-img", "fio", "openssl")]

SIZE = 32 * MiB
EXPORT = "disk0"
DELAY_S = 14
"""As long as may be: who comes back in this time is to be waited for, also on a slow machine."""
CHECKPOINTS = 3


class Place:
    """Where a pair lives: directories, and where its link is."""

    def __init__(self, base: Path, transport: str) -> None:
        self.base = base
        self.transport = transport
        self.link: dict[str, object] = {
            "reconnect-delay": DELAY_S,
            "timeout": 10,
            "control-port": free_port(),
        }
        self.address: Address
        if transport == "unix":
            self.address = str(base / "link")
            self.link["socket"] = self.address
        else:
            port = free_port()
            self.address = HOSTS["beta"][1], port
            self.link["port"] = port
        if transport != "tls":
            self.link["trust"] = "address"
        self.certificates: dict[str, Path] = {}
        if transport == "tls":
            authority = Authority(base)
            self.certificates = {
                host: authority.issue(base / f"tls-{host}", host, address)
                for host, (_, address) in HOSTS.items()
            }

    def worker(self, host: str, peer: dict[str, object] | None) -> Worker:
        """A process of ours as `host`."""
        resource: dict[str, object] = {"name": EXPORT, "size": SIZE}
        return Worker(
            self.base, host, resource, self.link, certificates=self.certificates.get(host), peer=peer
        )


class End(Protocol):
    """One end of a pair."""

    disk: Path

    def run(self) -> None:
        """Start the process."""

    def start(self) -> None:
        """Start replication."""

    def kill(self) -> None:
        """SIGKILL."""

    def again(self) -> None:
        """After a kill: what the operator does to have this end replicate again."""

    def checkpoint(self) -> None:
        """As the operator of this end gives it."""

    def failover(self) -> None:
        """To the checkpoint; returns when it is merged."""

    def error(self) -> str | None:
        """The recorded error."""

    def lun(self) -> Nbd:
        """A connection to the LUN."""

    @property
    def uri(self) -> str:
        """The LUN's address."""


class Ours:
    """A worker of ours; the peer's table is `peer` if that is QEMU's."""

    def __init__(self, place: Place, host: str, peer: dict[str, object] | None) -> None:
        self.worker = place.worker(host, peer)
        self.disk = self.worker.disk

    @property
    def uri(self) -> str:
        return self.worker.uri

    def run(self) -> None:
        self.worker.start()

    def start(self) -> None:
        self.worker.cli("start", EXPORT, "--wait")

    def kill(self) -> None:
        self.worker.kill()

    def again(self) -> None:
        self.worker.start()  # it takes up what it was

    def checkpoint(self) -> None:
        self.worker.cli("checkpoint", EXPORT)

    def failover(self) -> None:
        self.worker.cli("failover", EXPORT, "--to", "checkpoint", "--force", "--wait")

    def error(self) -> str | None:
        return self.worker.status()["error"]

    def lun(self) -> Nbd:
        return Nbd(str(self.worker.socket), EXPORT)

    def close(self) -> None:
        self.worker.stop()


class Qemus:
    """A QEMU as `host`."""

    def __init__(self, place: Place, host: str) -> None:
        self.place = place
        self.host = host
        self.directory = place.base / host
        self.directory.mkdir()
        self.disk = self.directory / "disk.img"
        qemu.make_raw(self.disk, SIZE)
        self._stack = contextlib.ExitStack()
        self.process: Any = None

    @property
    def front(self) -> str:
        """The unix socket of the LUN of a primary; a secondary has one NBD server for all."""
        return str(self.directory / "primary.nbd")

    @property
    def uri(self) -> str:
        assert self.host == "alpha"
        return f"nbd+unix:///top?socket={self.front}"

    def run(self) -> None:
        if self.host == "alpha":
            self.process = self._stack.enter_context(qemu.primary(self.directory, SIZE))
            return
        # With TLS the LUN is looked at before the link is served, and afterwards by QMP.
        self.process = self._stack.enter_context(
            qemu.secondary(self.directory, SIZE, address=self.place.address)
        )
        if self.place.transport == "tls":
            self.process.qmp.execute("nbd-server-stop")
            self._credentials("server")
            host, port = self.place.address
            where = {"type": "inet", "data": {"host": host, "port": str(port)}}
            self.process.qmp.execute("nbd-server-start", addr=where, tls_creds="tls0")
            self.process.export("top", "top")

    def _credentials(self, endpoint: str) -> None:
        directory = str(self.place.certificates[self.host])
        self.process.qmp.execute(
            "object-add", qom_type="tls-creds-x509", id="tls0", endpoint=endpoint, dir=directory
        )

    def start(self) -> None:
        if self.host == "beta":
            self.process.start()
            self.process.qmp.execute("nbd-server-add", device="disk0", name=EXPORT, writable=True)
        elif self.place.transport == "tls":
            self._credentials("client")
            host, port = self.place.address
            nbd = {"driver": "nbd", "server": {"type": "inet", "host": host, "port": str(port)}}
            nbd |= {"export": EXPORT, "tls-creds": "tls0", "reconnect-delay": DELAY_S}
            self.process.qmp.execute(
                "blockdev-add", driver="replication", mode="primary", node_name="replication", file=nbd
            )
            self.process.qmp.execute("x-blockdev-change", parent="top", node="replication")
            self.process.start()
        else:
            self.process.attach(self.place.address, EXPORT, reconnect_delay=DELAY_S)
            self.process.start()

    def kill(self) -> None:
        self.process.kill()

    def again(self) -> None:
        self._stack.close()
        self.run()
        self.start()

    def checkpoint(self) -> None:
        self.process.checkpoint()

    def failover(self) -> None:
        self.process.unexport(EXPORT)
        self.process.failover()
        assert self.process.wait_merged() is None

    def error(self) -> str | None:
        return self.process.error()

    def lun(self) -> Nbd:
        if self.host == "alpha":
            return Nbd(self.front, "top")
        if self.place.transport == "tls":
            self.process.qmp.execute("nbd-server-stop")  # the primary is gone when this is asked for
            self.process.serve_nbd(str(self.directory / "top.nbd"))
            self.process.export("top", "top")
            return Nbd(str(self.directory / "top.nbd"), "top")
        return Nbd(self.place.address, "top")

    def close(self) -> None:
        self._stack.close()


class Pair:
    """Two ends with the same content, running and not yet replicating."""

    def __init__(self, place: Place, primary: str, secondary: str, *, qmp: bool = True) -> None:
        self.names = primary, secondary
        table: dict[str, object] = {"qemu": True}
        if primary == "qemu":
            self.primary: Any = Qemus(place, "alpha")
        else:
            path = {"qmp": str(place.base / "beta/secondary.second.qmp")} if qmp else {}
            self.primary = Ours(place, "alpha", table | path if secondary == "qemu" else None)
        self.secondary: Any = (
            Qemus(place, "beta")
            if secondary == "qemu"
            else Ours(place, "beta", table if primary == "qemu" else None)
        )
        self.content = bytearray(random.randbytes(4 * MiB) + bytes(SIZE - 4 * MiB))
        for end in (self.primary, self.secondary):
            end.disk.write_bytes(self.content)

    @property
    def checkpoint_end(self) -> Any:
        """Who can make checkpoints under load: our primary, or else our secondary; None if there is neither."""
        for end in (self.primary, self.secondary):
            if isinstance(end, Ours):
                return end
        return None

    def checkpoint(self) -> None:
        """On each end, as QEMU wants it, with nothing in flight; ours does it for both."""
        if isinstance(self.primary, Ours):
            self.primary.checkpoint()
        else:
            self.primary.checkpoint()
            self.secondary.checkpoint()

    def same(self) -> bool:
        return bool(self.primary.disk.read_bytes() == self.secondary.disk.read_bytes())

    def write(self, offset: int, data: bytes) -> None:
        """On the primary's LUN, at rest."""
        with self.primary.lun() as lun:
            lun.write(offset, data)
        self.content[offset : offset + len(data)] = data


@contextlib.contextmanager
def pair(transport: str, primary: str, secondary: str, *, qmp: bool = True) -> Iterator[Pair]:
    with qemu.images() as base:
        made = Pair(Place(base, transport), primary, secondary, qmp=qmp)
        try:
            made.secondary.run()
            made.primary.run()
            made.secondary.start()
            made.primary.start()
            yield made
        finally:
            made.primary.close()
            made.secondary.close()


PAIRINGS = [(p, s) for p in ("ours", "qemu") for s in ("ours", "qemu")]
OVER = [
    pytest.param(transport, *names, id=f"{names[0]} to {names[1]}, {transport}")
    for names in PAIRINGS
    for transport in ("tcp", "unix", "tls")
    if not (transport == "tls" and names == ("qemu", "qemu"))
]


def load(end: End) -> Load:
    """fio with verify on the LUN, at depth 16; returns when it writes."""
    before = end.disk.read_bytes()
    running = Load(end.disk.parent, end.uri, f"--size={SIZE}", "--iodepth=16")
    qemu.until(lambda: end.disk.read_bytes() != before, "the first writes")
    return running


def read(nbd: Nbd) -> bytes:
    return b"".join(nbd.read(at, MiB) for at in range(0, SIZE, MiB))


@pytest.mark.parametrize(("transport", "primary", "secondary"), OVER)
def test_load_checkpoints_and_failover_to_the_checkpoint(
    transport: str, primary: str, secondary: str
) -> None:
    with pair(transport, primary, secondary) as both:
        running = load(both.primary)
        for _ in range(CHECKPOINTS if both.checkpoint_end is not None else 0):
            both.checkpoint_end.checkpoint()
        running.end()
        assert both.same()
        assert both.primary.error() is None
        assert both.secondary.error() is None

        both.content[:] = both.primary.disk.read_bytes()
        both.write(MiB, os.urandom(MiB + 512))
        both.checkpoint()
        checkpoint = bytearray(both.content)
        both.write(0, os.urandom(2 * MiB))
        both.write(20 * MiB, os.urandom(512))
        assert both.same()
        both.primary.kill()
        if transport == "tls" and secondary == "qemu":
            both.secondary.failover()
            lun = both.secondary.lun()
        else:
            lun = both.secondary.lun()
            assert read(lun) == checkpoint
            own = os.urandom(3000)
            lun.write(MiB + 100, own)
            checkpoint[MiB + 100 : MiB + 3100] = own
            both.secondary.failover()
        with lun:
            assert read(lun) == checkpoint
            lun.write(5 * MiB, b"after")
            assert lun.read(5 * MiB, 5) == b"after"
        checkpoint[5 * MiB : 5 * MiB + 5] = b"after"
        if isinstance(both.secondary, Ours):
            assert both.secondary.disk.read_bytes() == checkpoint


@pytest.mark.parametrize(("transport", "primary", "secondary"), OVER)
def test_secondary_killed_under_load_is_reached_again(transport: str, primary: str, secondary: str) -> None:
    with pair(transport, primary, secondary) as both:
        running = load(both.primary)
        before = both.secondary.disk.read_bytes()
        qemu.until(lambda: both.secondary.disk.read_bytes() != before, "forwarded writes")
        both.secondary.kill()
        both.secondary.again()
        running.end()
        assert both.same()
        assert both.primary.error() is None
        both.content[:] = both.primary.disk.read_bytes()
        both.checkpoint()
        both.write(0, os.urandom(MiB))
        assert both.same()


@pytest.mark.parametrize("secondary", ["ours", "qemu"])
def test_our_primary_killed_and_back_goes_on(secondary: str) -> None:
    with pair("tcp", "ours", secondary) as both:
        both.write(MiB, os.urandom(MiB))
        both.primary.kill()
        both.primary.again()
        both.write(2 * MiB, os.urandom(MiB))
        both.checkpoint()
        assert both.same()
        assert both.primary.error() is None


def test_checkpoint_without_qmp_leaves_qemus_epoch_alone() -> None:
    with pair("tcp", "ours", "qemu", qmp=False) as both:
        before = bytes(both.content)
        both.write(0, os.urandom(MiB))
        both.primary.checkpoint()
        with both.secondary.lun() as lun:
            assert read(lun) == before
            both.secondary.checkpoint()
            assert read(lun) == both.content


def test_qemu_secondary_that_does_not_replicate_is_refused_and_says_so() -> None:
    with qemu.images() as base:
        both = Pair(Place(base, "tcp"), "ours", "qemu")
        try:
            both.secondary.run()
            both.primary.run()
            refused = both.primary.worker.cli("start", EXPORT, check=False)
            assert refused.returncode == 3
            assert "QEMU's secondary: Block replication is not running" in refused.stderr
        finally:
            both.primary.close()
            both.secondary.close()


@pytest.mark.parametrize("wrong", ["another size", "read-only", "another name"])
def test_qemu_export_that_is_not_the_disk_is_refused_and_says_so(wrong: str) -> None:
    said = {
        "another size": f"it must have {SIZE}",
        "read-only": "is read-only",
        "another name": "no export 'disk0'",
    }
    with qemu.images() as base:
        both = Pair(Place(base, "tcp"), "ours", "qemu", qmp=False)
        try:
            both.secondary.run()
            both.primary.run()
            execute = both.secondary.process.qmp.execute
            if wrong == "another size":
                qemu.make_raw(base / "other.img", SIZE + MiB)
                execute("blockdev-add", driver="file", filename=str(base / "other.img"), node_name="other")
                both.secondary.process.export("other", EXPORT)
            else:
                name = "disk" if wrong == "another name" else EXPORT
                both.secondary.process.start()
                execute("nbd-server-add", device="disk0", name=name, writable=wrong != "read-only")
            refused = both.primary.worker.cli("start", EXPORT, check=False)
            assert refused.returncode != 0
            assert said[wrong] in refused.stderr
        finally:
            both.primary.close()
            both.secondary.close()


def test_qemu_export_that_vanishes_is_recorded_and_the_primary_goes_on() -> None:
    with pair("tcp", "ours", "qemu") as both:
        both.write(0, os.urandom(MiB))
        both.secondary.process.unexport(EXPORT)
        both.write(MiB, os.urandom(MiB))  # waits for reconnect-delay, then goes on alone
        error = both.primary.error()
        assert error is not None
        assert "not forwarded" in error
        assert both.primary.disk.read_bytes() == both.content
        assert not both.same()
