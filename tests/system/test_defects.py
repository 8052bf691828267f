"""An exception that nobody foresaw, on the path of forwarded writes of a real secondary. (A3)"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.daemon.worker import DEFECT
from tcmu_replication.units import MiB
from tests.support.processes import Pair
from tests.support.tools import PATIENCE_S, requires

pytestmark = requires("qemu-io")

LINK = {"reconnect-delay": 14.0, "timeout": 10.0}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with Pair(tmp_path, size=16 * MiB, link=LINK) as pair:
        yield pair


@pytest.mark.parametrize("defect", ["MemoryError", "AssertionError", "KeyError"])
def test_secondary_that_meets_a_defect_ends_and_takes_up_where_it_was(pair: Pair, defect: str) -> None:
    """What was sent meanwhile is sent again: no write waits for ever, and a failover does not either."""
    pair.beta.stop()
    pair.beta.module = "tests.support.defective"
    pair.beta.start()
    pair.replicate()
    pair.alpha.io("write -P 0x11 0 1M")
    marker = pair.beta.directory / "defect"
    marker.write_text(defect)
    writer = threading.Thread(target=pair.alpha.io, args=("write -P 0x22 2M 1M", "flush"))
    writer.start()
    assert pair.beta.process is not None
    assert pair.beta.process.wait(PATIENCE_S) == DEFECT
    assert f"{defect}: injected" in pair.beta.log.read_text().replace("'", "")
    marker.unlink()
    pair.beta.start()
    writer.join(PATIENCE_S)
    assert not writer.is_alive()
    pair.alpha.io("write -P 0x33 2M 64k", "flush")
    pair.beta.cli("errors", "disk0")
    assert pair.alpha.disk.read_bytes() == pair.beta.disk.read_bytes()
    pair.alpha.kill()
    pair.beta.cli("failover", "disk0", "--to", "latest", "--fenced")
    pair.beta.io("read -P 0x11 0 1M", "read -P 0x33 2M 64k", "read -P 0x22 2112k 960k")
