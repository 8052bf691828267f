"""Strangers at the ports of a real pair: they exhaust nothing, and the peer comes in all the same (S2, A7)."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.units import MiB
from tests.support.certificates import Authority
from tests.support.processes import Pair
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("qemu-io", "openssl", "nbdinfo")

SIZE = 16 * MiB
LINK: dict[str, object] = {"reconnect-delay": 14.0, "timeout": 10.0}
CROWD = 1100
"""More than the 1024 descriptors that a process has where nobody gives it more."""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    authority = Authority(tmp_path)
    certificates = {
        host: authority.issue(tmp_path / f"tls-{host}", address)
        for host, address in (("alpha", "127.0.0.1"), ("beta", "127.0.0.2"))
    }
    with Pair(tmp_path, size=SIZE, link=LINK, certificates=certificates) as pair:
        pair.replicate()
        yield pair


@contextlib.contextmanager
def crowd(address: tuple[str, int] | str, *, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    """CROWD connections from a host that say nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CROWD), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        clients = []
        for _ in range(CROWD):
            sock = stack.enter_context(
                socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
            )
            if not isinstance(address, str):
                sock.bind((source, 0))
            sock.connect(address)
            sock.settimeout(PATIENCE_S)
            clients.append(sock)
        yield clients


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def reconnects(pair: Pair) -> None:
    """The pair's primary loses its connections and must make them anew."""
    pair.alpha.kill()
    pair.alpha.start()
    pair.alpha.io("write -P 0x33 0 1M", "flush")
    pair.alpha.cli("checkpoint", "disk0")
    status = pair.alpha.status()
    assert (status["error"], status["link"]["state"]) == (None, "connected")
    assert pair.beta.disk.read_bytes() == pair.alpha.disk.read_bytes()


@pytest.mark.parametrize("port", ["link", "control"])
def test_crowd_without_a_certificate_is_kept_small_and_the_peer_comes_in(pair: Pair, port: str) -> None:
    assert pair.beta.process is not None
    before = descriptors(pair.beta.process.pid)
    with crowd(("127.0.0.2", pair.port if port == "link" else pair.control_port)) as clients:
        pair.alpha.cli("checkpoint", "disk0")
        assert descriptors(pair.beta.process.pid) < before + 100
        reconnects(pair)
        for sock in clients[:100]:  # the oldest made way
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(4096):
                    pass
    pair.alpha.cli("checkpoint", "disk0")


def test_silent_clients_of_the_lun_lock_nobody_out(pair: Pair) -> None:
    with crowd(str(pair.alpha.socket)):
        done = subprocess.run(["nbdinfo", "--size", pair.alpha.uri], capture_output=True, text=True)
    assert done.stdout.strip() == str(SIZE), done.stderr


def test_ten_thousand_failures_leave_a_bounded_log_that_tells_their_number(tmp_path: Path) -> None:
    """A5."""
    with Pair(tmp_path, size=SIZE, link=LINK) as pair:
        for _ in range(10_000):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(pair.alpha.socket))
                sock.sendall(b"\xff" * 64)
                with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                    while sock.recv(4096):
                        pass
        pair.alpha.stop()
        lines = [line for line in pair.alpha.log.read_text().splitlines() if "NBD client" in line]
    told = [line for line in lines if " more like it, the last: " in line]
    counts = [int(line.split(" more like it")[0].rpartition(" ")[2].replace(",", "")) for line in told]
    assert len(lines) < 1000
    assert sum(counts) + len(lines) - len(told) == 10_000
