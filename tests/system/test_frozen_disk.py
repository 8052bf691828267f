"""A pair of real processes, one with a disk that hangs: fsfreeze, the wait that not even SIGKILL ends (A2)."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcmu_replication.units import MiB
from tests.support.freezing import FreezingDisk
from tests.support.processes import Pair, Worker
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("qemu-io", "mkfs.ext4", "fsfreeze")

SIZE = 64 * MiB
LINK: dict[str, object] = {"reconnect-delay": 14.0, "timeout": 10.0}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Not started yet."""
    made = Pair(tmp_path, size=SIZE, link=LINK)
    yield made
    made.__exit__()


@contextlib.contextmanager
def frozen(disk: FreezingDisk) -> Iterator[None]:
    disk.freeze()
    try:
        yield
    finally:
        disk.thaw()


@contextlib.contextmanager
def io(worker: Worker, *commands: str) -> Iterator[None]:
    """qemu-io on the LUN meanwhile; at the end it has ended, without an error."""
    words = [word for command in commands for word in ("-c", command)]
    with subprocess.Popen(["qemu-io", "-f", "raw", worker.uri, *words], stdout=subprocess.PIPE) as running:
        yield
        out, _ = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, out
    assert b"failed" not in out, out


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def hangs(worker: Worker) -> str:
    """What `status` says of a hang; empty if nothing hangs."""
    answer = worker.cli("status", "disk0", "--json", check=False)
    return json.loads(answer.stdout).get("hangs") or ""


def test_primary_whose_disk_hangs_says_so_and_refuses_commands(pair: Pair, tmp_path: Path) -> None:
    with FreezingDisk(tmp_path, pair.alpha.disk) as disk, pair:
        pair.replicate()
        with contextlib.ExitStack() as meanwhile, frozen(disk):
            meanwhile.enter_context(io(pair.alpha, "write -P 0x22 0 1M", "read -P 0x22 0 1M"))
            until(lambda: f"write {pair.alpha.disk}" in hangs(pair.alpha))
            assert not pair.alpha.status()["protection"]["protected"]
            told = pair.alpha.cli("errors", "disk0", check=False)
            assert f"write {pair.alpha.disk}" in told.stdout + told.stderr
            refused = pair.alpha.cli("checkpoint", "disk0", check=False)
            assert refused.returncode == 1
            assert "The command was not carried out" in refused.stderr
        until(lambda: not hangs(pair.alpha))
        pair.alpha.cli("checkpoint", "disk0")
        pair.beta.io("read -P 0x22 0 1M")
        assert pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()


def test_manager_hears_that_a_worker_lives_which_it_could_not_kill(pair: Pair, tmp_path: Path) -> None:
    with FreezingDisk(tmp_path, pair.alpha.disk) as disk, pair:
        address = pair.alpha.directory / "notify"
        address.unlink()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
            contextlib.ExitStack() as meanwhile,
            frozen(disk),
        ):
            manager.bind(str(address))
            manager.settimeout(PATIENCE_S)
            meanwhile.enter_context(io(pair.alpha, "write 0 1M"))
            said = manager.recv(4096).decode().splitlines()
            while "STATUS" not in " ".join(said):  # it may have something else to say
                said = manager.recv(4096).decode().splitlines()
            assert "WATCHDOG=1" in said
            assert f"write {pair.alpha.disk}" in said[-1]


@pytest.mark.parametrize("durable", [True, False])
def test_secondary_whose_overlays_hang_says_so_and_goes_on(durable: bool, tmp_path: Path) -> None:
    """The old data is zero: its mark is the first that the frozen file system meets."""
    pair = Pair(tmp_path, size=SIZE, link=LINK, durable=durable)
    with FreezingDisk(tmp_path, pair.beta.overlays) as disk, pair:
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 1M")
        with contextlib.ExitStack() as meanwhile, frozen(disk):
            meanwhile.enter_context(io(pair.alpha, "write -P 0x22 1M 1M", "flush"))
            until(lambda: bool(hangs(pair.beta)))
            assert pair.beta.cli("stop", "disk0", check=False).returncode == 1
        until(lambda: not hangs(pair.beta))
        pair.alpha.cli("checkpoint", "disk0")
        assert pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()


def test_flush_of_the_secondarys_lun_on_frozen_overlays_says_so(pair: Pair, tmp_path: Path) -> None:
    """What was written before: its marks are made to last by the flush."""
    with FreezingDisk(tmp_path, pair.beta.overlays) as disk, pair:
        pair.replicate()
        with contextlib.ExitStack() as meanwhile:
            running = subprocess.Popen(
                ["qemu-io", "-f", "raw", "-t", "writeback", pair.beta.uri],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            meanwhile.enter_context(running)
            assert running.stdin is not None
            running.stdin.write("write -P 0x33 0 1M\n")
            until(lambda: pair.beta.status()["overlays"]["active-bytes"] == MiB)
            with frozen(disk):
                running.stdin.write("flush\n")
                until(lambda: bool(hangs(pair.beta)))
            running.communicate("quit\n", timeout=PATIENCE_S)
            assert running.returncode == 0
        pair.beta.io("read -P 0x33 0 1M")


def test_failover_on_the_secondary_while_the_primarys_disk_hangs(pair: Pair, tmp_path: Path) -> None:
    with FreezingDisk(tmp_path, pair.alpha.disk) as disk, pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 1M")
        with contextlib.ExitStack() as meanwhile, frozen(disk):
            running = subprocess.Popen(["qemu-io", "-f", "raw", pair.alpha.uri, "-c", "write -P 0x44 2M 1M"])
            meanwhile.callback(running.wait)
            until(lambda: bool(hangs(pair.alpha)))
            pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced")
            pair.beta.io("read -P 0x22 0 1M", "write -P 0x55 0 1M", "read -P 0x55 0 1M")
