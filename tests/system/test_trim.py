"""Trims of a replicated LUN: on a pair of real processes."""

from __future__ import annotations

from collections.abc import Callable
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
