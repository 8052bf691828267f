"""A primary whose secondary is not what the resource file says: `start` and `status` tell what is wrong."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.units import MiB
from tests.support.processes import Worker, free_port
from tests.support.tools import PATIENCE_S, listens, requires

pytestmark = [pytest.mark.interop, requires("qemu-nbd", "qemu-io")]

SIZE = 8 * MiB
LINK: dict[str, object] = {"reconnect-delay": 1.0, "timeout": 10.0}


@contextlib.contextmanager
def exported(
    base: Path, size: int, *options: str, export: str = "disk0"
) -> Iterator[subprocess.Popen[bytes]]:
    """qemu-nbd where the secondary should be, with an image of `size` bytes."""
    image, link = base / f"peer-{size}.img", base / "link"
    with open(image, "ab") as file:
        file.truncate(size)
    words = ["qemu-nbd", "-f", "raw", "-k", str(link), "-x", export, "-t", "-e", "8", *options, str(image)]
    process = subprocess.Popen(words)
    try:
        while not listens(link):
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()
        link.unlink(missing_ok=True)


@pytest.fixture
def alpha(tmp_path: Path) -> Iterator[Worker]:
    """A primary whose peer is somebody else's NBD server."""
    link = {**LINK, "socket": str(tmp_path / "link")}
    worker = Worker(tmp_path, "alpha", {"name": "disk0", "size": SIZE}, link, peer={"qemu": True})
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def until(worker: Worker, said: str) -> None:
    """Until the log says so."""
    end = time.monotonic() + PATIENCE_S
    while said not in worker.log.read_text():
        assert time.monotonic() < end, worker.log.read_text()
        time.sleep(0.02)


SMALLER = SIZE - 4096
WRONG = {
    "smaller": (SMALLER, (), "disk0", f"has {SMALLER} bytes; it must have {SIZE}"),
    "larger": (2 * SIZE, (), "disk0", f"has {2 * SIZE} bytes; it must have {SIZE}"),
    "read-only": (SIZE, ("-r",), "disk0", "is read-only; export it writable"),
    "another export": (SIZE, (), "disk9", "no export 'disk0'; it offers 'disk9'"),
}


@pytest.mark.parametrize("row", WRONG)
def test_start_says_what_is_wrong_with_the_export(tmp_path: Path, alpha: Worker, row: str) -> None:
    size, options, export, said = WRONG[row]
    with exported(tmp_path, size, *options, export=export):
        refused = alpha.cli("start", "disk0", check=False)
    assert refused.returncode != 0
    assert said in refused.stderr
    assert refused.stderr.count("\n") <= 2, refused.stderr
    assert alpha.status()["stage"] == "none"
    assert (tmp_path / f"peer-{size}.img").read_bytes() == bytes(size)


def test_start_without_an_export_can_be_given_again(tmp_path: Path, alpha: Worker) -> None:
    refused = alpha.cli("start", "disk0", check=False)
    assert "No such file" in refused.stderr
    with exported(tmp_path, SIZE):
        alpha.cli("start", "disk0")
        alpha.io("write -P 0x11 0 64k")
        assert (tmp_path / f"peer-{SIZE}.img").read_bytes() == alpha.disk.read_bytes()


@pytest.mark.parametrize("row", ["smaller", "read-only"])
def test_export_that_vanishes_and_comes_back_as_another_gets_nothing(
    tmp_path: Path, alpha: Worker, row: str
) -> None:
    size, options, export, said = WRONG[row]
    with exported(tmp_path, SIZE):
        alpha.cli("start", "disk0")
        alpha.io("write -P 0x11 0 64k")
    until(alpha, "link lost")
    before = {path: path.read_bytes() for path in tmp_path.glob("peer-*.img")}
    with exported(tmp_path, size, *options, export=export):
        until(alpha, said)
        alpha.io("write -P 0x22 0 64k", "read -P 0x22 0 64k")
    status = alpha.status()
    assert status["out-of-sync-bytes"] == 64 * 1024
    assert "not forwarded" in status["error"]
    assert said in status["link"]["reason"]
    assert {path: path.read_bytes() for path in before} == before


def test_export_that_vanishes_under_a_write_is_waited_for(tmp_path: Path, alpha: Worker) -> None:
    with exported(tmp_path, SIZE):
        alpha.cli("start", "disk0")
    alpha.io("write -P 0x11 0 64k")
    status = alpha.status()
    assert status["stage"] == "running"
    assert status["out-of-sync-bytes"] == 64 * 1024
    assert status["link"]["state"] in ("lost", "waiting", "connecting")
    assert "No such file" in status["link"]["reason"]
    alpha.io("read -P 0x11 0 64k")


def test_secondary_of_ours_with_another_size_is_refused(tmp_path: Path) -> None:
    link = {**LINK, "port": free_port(), "control-port": free_port(), "trust": "address"}
    sizes = {"alpha": SIZE, "beta": 2 * SIZE}
    workers = [Worker(tmp_path, host, {"name": "disk0", "size": size}, link) for host, size in sizes.items()]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            worker.start()
            stack.callback(worker.stop)
        alpha, beta = workers
        beta.cli("start", "disk0")
        refused = alpha.cli("start", "disk0", check=False)
        assert refused.returncode != 0
        assert str(2 * SIZE) in refused.stderr
        assert str(SIZE) in refused.stderr
        assert alpha.status()["stage"] == "none"
        assert beta.disk.read_bytes() == bytes(2 * SIZE)
