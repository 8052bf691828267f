"""Trims of a replicated LUN: on a pair of real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcmu_replication.units import MiB
from tests.support.nbd import FLUSH, TRIM, WRITE, Nbd
from tests.support.processes import Pair, Worker
from tests.support.tools import requires

pytestmark = requires("qemu-io")

LINK = {"reconnect-delay": 14.0, "timeout": 10.0}
AWAY: dict[str, tuple[Callable[[Worker], None], Callable[[Worker], None]]] = {
    "killed": (Worker.kill, Worker.start),
    "frozen": (Worker.pause, Worker.resume),
}


@pytest.mark.parametrize("how", AWAY)
def test_trim_before_the_link_is_up_reaches_the_secondary(tmp_path: Path, how: str) -> None:
    """Issue section 6: after a restart of the primary's worker it was dropped, and the disks differed."""
    away, back = AWAY[how]
    with Pair(tmp_path, size=64 * MiB, link=LINK) as pair:
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 8M")
        pair.alpha.kill()
        away(pair.beta)
        pair.alpha.start()
        with Nbd(str(pair.alpha.socket), "disk0") as lun:
            trim = lun.start(TRIM, MiB, 4 * MiB)
            write = lun.start(WRITE, 2 * MiB, MiB, b"\x22" * MiB)
            back(pair.beta)
            lun.finish([trim, write])
            lun.finish([lun.start(FLUSH, 0, 0)])
        status = pair.alpha.status()
        assert status["link"]["state"] == "connected"
        assert status["error"] is None
        assert pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()
        expected = b"\x11" * MiB + bytes(MiB) + b"\x22" * MiB + bytes(2 * MiB) + b"\x11" * 3 * MiB
        assert pair.beta.disk.read_bytes()[: 8 * MiB] == expected
        pair.alpha.cli("checkpoint", "disk0")


@contextlib.contextmanager
def without_holes(*workers: Worker) -> Iterator[None]:
    """Their disks on a file system that cannot punch holes. Needs root; before they start."""
    with contextlib.ExitStack() as mounted:
        for worker in workers:
            place = worker.directory / "ramfs"
            place.mkdir()
            image = place / "disk.img"
            for what in (["-t", "ramfs", "ramfs", place], ["--bind", image, worker.disk]):
                subprocess.run(["mount", *map(str, what)], check=True)
                mounted.callback(subprocess.run, ["umount", "--lazy", str(what[-1])], check=True)
                if not image.exists():
                    image.touch()
                    os.truncate(image, worker.disk.stat().st_size)
        yield


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
@pytest.mark.parametrize("rigid", [("alpha",), ("beta",), ("alpha", "beta"), ()], ids="+".join)
def test_trim_leaves_the_same_on_disks_that_can_punch_holes_and_that_cannot(
    tmp_path: Path, rigid: tuple[str, ...]
) -> None:
    """Issue section 6, and N: start compares the disks, and refused a good pair that such a trim had made differ."""
    pair = Pair(tmp_path, size=16 * MiB, link=LINK)
    with without_holes(*(getattr(pair, host) for host in rigid)), pair:
        pair.replicate()
        pair.alpha.io("write -P 0x11 0 8M", "discard 1M 4M", "discard 6291457 10000", "write -z -u 7M 512k")
        content = pair.alpha.disk.read_bytes()
        assert content == pair.beta.disk.read_bytes()
        kept = b"\x11" if "alpha" in rigid else b"\0"
        assert content[: 6 * MiB] == b"\x11" * MiB + kept * 4 * MiB + b"\x11" * MiB
        assert pair.alpha.status()["error"] is None
        for worker in (pair.alpha, pair.beta):
            holes = worker.disk.stat().st_blocks * 512 < 5 * MiB
            assert holes == (not rigid or (rigid == ("beta",) and worker is pair.alpha))
