"""lio-findings 7: LUNs that the kernel has and nobody can serve, on a real daemon and workers, without a kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.cli import exits
from tcmu_replication.units import MiB
from tests.support.files_kernel import FilesKernel
from tests.support.processes import SECRET, Worker, free_port
from tests.support.qemu import until
from tests.support.tools import PATIENCE_S

SIZE = 16 * MiB


class Daemon:
    """`tcmu-replication daemon` as alpha, with the resource disk0, on a kernel of files."""

    def __init__(self, base: Path, kernel: FilesKernel) -> None:
        self.kernel = kernel
        self.resource = Worker(
            base,
            "alpha",
            {"name": "disk0", "size": SIZE},
            {"port": free_port(), "control-port": free_port()},
            secret=SECRET,
        )
        self.directory = self.resource.directory
        with open(self.directory / "daemon.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.files_kernel", *self._options, "daemon"],
                env=kernel.environment,
                stdout=log,
                stderr=log,
            )

    @property
    def _options(self) -> list[str]:
        return [f"--config={self.directory / 'etc'}", f"--run={self.directory / 'run'}", "--host=alpha"]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def luns(self) -> dict[str, dict]:
        """What `devices --json` says, by device; nothing while there is no daemon yet."""
        done = self.resource.cli("devices", "--json", check=False)
        return {row["device"]: row for row in json.loads(done.stdout or "[]")}

    def log(self) -> str:
        return (self.directory / "daemon.log").read_text()

    def add_resource(self, name: str) -> None:
        """One like disk0, with files of its own."""
        text = (self.directory / "etc/disk0.toml").read_text().replace("disk0", name)
        for mine, its in (("disk.img", f"{name}.img"), ("overlays", name), ("lun.sock", f"{name}-lun.sock")):
            text = text.replace(f"{self.directory}/{mine}", f"{self.directory}/{its}")
        lines = [
            f"{line.split()[0]} = {free_port()}" if line.startswith(("port", "control-port")) else line
            for line in text.splitlines()
        ]
        with open(self.directory / f"{name}.img", "wb") as image:
            image.truncate(SIZE)
        (self.directory / name).mkdir(mode=0o700)
        secret = self.directory / f"etc/{name}.secret"
        secret.touch(mode=0o600)
        secret.write_bytes(SECRET)
        (self.directory / f"etc/{name}.toml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[FilesKernel]:
    kernel = FilesKernel(tmp_path / "kernel")
    yield kernel
    kernel.close()


@pytest.fixture
def daemon(tmp_path: Path, kernel: FilesKernel) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, kernel)
    yield daemon
    daemon.stop()
    print(daemon.log())


def test_each_lun_that_cannot_be_served_says_why_and_is_served_when_that_is_mended(daemon: Daemon) -> None:
    kernel, image = daemon.kernel, daemon.directory / "image"
    toml = daemon.directory / "etc/nope.toml"
    kernel.create("uio0", "replication/disk0", SIZE)
    kernel.create("uio1", "replication/nope", SIZE)
    kernel.create("uio2", "replication/disk0", SIZE // 2)
    kernel.create("uio3", "replication/disk0", SIZE, block=4096)
    kernel.create("uio4", "replication/disk0", SIZE, version=3)
    kernel.create("uio5", f"file/{image}", SIZE)
    kernel.create("uio6", "replicatoin/disk0", SIZE)
    wrong = {
        "uio1": (f"{toml}: file: found No such file", "this host has disk0"),
        "uio2": (f"created with {SIZE // 2} bytes, disk0 has {SIZE}", f"create it with size={SIZE}"),
        "uio3": ("blocks of 4096 bytes, disk0 has blocks of 512", "create it with hw_block_size=512"),
        "uio4": ("the mailbox has version 3; this handler speaks 2", "serves it when it can"),
        "uio5": (f"file/{image}: found: No such file", "expected an image file or a block device"),
    }

    def state(lun: dict) -> str:
        return lun["state"]

    def all_are_told() -> bool:
        luns = daemon.luns()
        return all(
            device in luns and state(luns[device]) == "unserved" and words[0] in luns[device]["reason"]
            for device, words in wrong.items()
        )

    until(lambda: daemon.luns().get("uio0", {}).get("state") == "served", "the good LUN")
    until(all_are_told, "the reasons")
    luns = daemon.luns()
    assert state(luns["uio6"]) == "foreign"
    assert "If replication/disk0 was meant" in luns["uio6"]["advice"]
    told = daemon.resource.cli("status", check=False)
    assert told.returncode == exits.ABSENT
    for device, words in wrong.items():
        assert f"{device} (store-{device}, {luns[device]['config']}): NOT SERVED since" in told.stdout
        assert all(word in told.stdout for word in words)
    assert "uio6" not in told.stdout
    assert daemon.resource.cli("devices", check=False).returncode == exits.ABSENT

    daemon.add_resource("nope")
    kernel.change("uio2", size=SIZE)
    kernel.change("uio3", block=512)
    kernel.change("uio4", version=2)
    with open(image, "wb") as file:
        file.truncate(SIZE)
    until(lambda: daemon.resource.cli("devices", check=False).returncode == 0, "all of them")
    luns = daemon.luns()
    assert {device: lun["worker"] for device, lun in luns.items() if state(lun) == "served"} == {
        "uio0": "disk0",
        "uio1": "nope",
        "uio2": "disk0",
        "uio3": "disk0",
        "uio4": "disk0",
        "uio5": "uio5",
    }
    assert all(lun["reason"] is None for lun in luns.values() if state(lun) == "served")
    told = daemon.resource.cli("status", check=False)
    assert told.returncode == exits.UNPROTECTED
    assert "NOT SERVED" not in told.stdout

    for device in luns:
        kernel.remove(device)
    until(lambda: not daemon.luns(), "their removal")
