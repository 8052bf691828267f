"""A full file system below the overlays forbids no restart (A1): what a worker needs is there already."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.units import KiB, MiB
from tests.support.processes import Pair
from tests.support.tools import requires

pytestmark = requires("qemu-io")

SIZE = 16 * MiB


@contextlib.contextmanager
def small(folder: Path) -> Iterator[None]:
    """A file system of its own, of 8 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine mounts no tmpfs ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Until `leave` bytes are left."""
    room = os.statvfs(folder)
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - leave)


@pytest.mark.parametrize("left", [600 * KiB, 0], ids=["600 KiB left", "full"])
@pytest.mark.parametrize("host", ["alpha", "beta"])
def test_worker_that_dies_on_a_full_overlay_file_system_is_started_again(
    tmp_path: Path, host: str, left: int
) -> None:
    pair = Pair(tmp_path, size=SIZE)
    worker = getattr(pair, host)
    with small(worker.overlays), pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        pair.alpha.cli("checkpoint", "disk0")
        fill(worker.overlays, left)
        worker.kill()
        worker.start()
        pair.alpha.io("read -P 0x22 0 1M")
        pair.beta.io("read -P 0x22 0 1M")
        said = worker.cli("check")
        assert "left; expected at least 1 MiB: make room there" in " ".join(said.stdout.split())


@pytest.mark.parametrize("to", ["latest", "checkpoint"])
def test_overlay_that_fills_its_file_system_forbids_neither_restart_nor_failover(
    tmp_path: Path, to: str
) -> None:
    pair = Pair(tmp_path, size=SIZE)
    with small(pair.beta.overlays), pair:
        pair.replicate()
        pair.alpha.io("write -P 0x22 0 1M", "flush")
        pair.alpha.cli("checkpoint", "disk0")
        for at in range(0, 16, 2):  # pre-images that are not zeroes come with the second round
            pair.alpha.io(f"write -P 0x33 {at}M 2M")
        pair.alpha.cli("checkpoint", "disk0")
        for at in range(0, 16, 2):
            pair.alpha.io(f"write -P 0x44 {at}M 2M")
        assert "make room there" in pair.beta.log.read_text()
        room = os.statvfs(pair.beta.overlays)
        assert room.f_bavail * room.f_frsize >= MiB, "an eighth is left"
        pair.alpha.kill()
        pair.beta.kill()
        pair.beta.start()
        pair.beta.cli("failover", "disk0", "--to", to, "--force", "--wait")
        pair.beta.io("read -P 0x44 0 1M" if to == "latest" else "read -P 0x33 0 16M")
