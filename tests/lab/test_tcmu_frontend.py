"""The frontend on the kernel's own ring: taking over, late and aborted commands, a full data area, removal."""

from __future__ import annotations

import json
import pathlib
import shlex
import sys
from collections.abc import Iterator

import pytest

from tcmu_replication.units import MiB
from tests.lab import target
from tests.lab.channel import Command
from tests.lab.host import Host

pytestmark = pytest.mark.lab

SERIAL = "6b2c1f0a-0000-4000-8000-0000000000a7"
SERVE = pathlib.Path(__file__).parent / "guest" / "serve_disk.py"
STUCK = "/run/stuck"


class Served:
    """A LUN of beta's data disk as a local disk there, and whoever serves it."""

    def __init__(self, host: Host, backstore: target.Backstore):
        self.host = host
        self.backstore = backstore
        uio = host.run(f"grep -l /{backstore.name}/ /sys/class/uio/*/name").stdout.strip()
        self.uio = pathlib.PurePath(uio).parent.name
        self.worker = self.serve()
        self.loop = target.Loop(backstore)
        self.disk = self.loop.device

    def serve(self, deadline_s: float = 2) -> Command:
        arguments = [sys.executable, str(SERVE), self.uio, self.host.device("data"), str(deadline_s)]
        self.worker = self.host.spawn(arguments)
        return self.worker.wait_for("serving")

    def end(self) -> dict:
        """The last words of the worker."""
        self.worker.wait()
        return json.loads(self.worker.stdout.splitlines()[-1])

    def load(self, file: str, count: int = 8) -> Command:
        """Starts writing `count` MiB of random bytes, kept in `file`, past the page cache."""
        self.host.run(f"head -c {count}M /dev/urandom > {file}")
        return self.host.spawn(f"dd if={file} of={self.disk} bs=1M oflag=direct status=none")

    def holds(self, file: str) -> bool:
        return self.host.run(f"cmp -n $(stat -c %s {file}) {file} {self.disk}", check=False).returncode == 0


@pytest.fixture
def served(beta: Host) -> Iterator[Served]:
    control = "nl_reply_supported=-1,max_data_area_mb=2"
    backstore = target.user(beta, "ring0", SERIAL, "file/ring0", 256 * MiB, control)
    served = Served(beta, backstore)
    yield served
    beta.run(f"rm -f {STUCK}")
    served.loop.delete()
    backstore.delete()
    said = served.end()
    assert said["why"] == "closed: None"


def test_more_data_in_flight_than_the_data_area_holds(served: Served) -> None:
    served.host.run(
        f"fio --name=full --filename={shlex.quote(served.disk)} --rw=randwrite --bsrange=4k-1m --iodepth=16"
        " --ioengine=libaio --direct=1 --verify=crc32c --size=48M --output-format=terse"
    )


def test_killed_worker_is_followed_by_one_that_takes_the_ring_up(served: Served) -> None:
    served.host.run(f"touch {STUCK}")
    load = served.load("/run/written")
    served.host.run(
        f"while ! grep -q [1-9] /sys/block/{served.disk.removeprefix('/dev/')}/inflight; do :; done"
    )
    served.host.run(["pkill", "-9", "-f", SERVE.name])
    served.worker.wait(check=False)
    served.host.run(f"rm {STUCK}")
    served.serve()
    load.wait()
    assert served.holds("/run/written")


def test_device_in_use_is_not_taken_from_its_worker(served: Served) -> None:
    code = f"from tcmu_replication.tcmu.uio import Device; Device.open('{served.uio}')"
    second = served.host.run([sys.executable, "-c", code], check=False)
    assert "open in another process" in second.stderr
    served.load("/run/written").wait()
    assert served.holds("/run/written")


def test_late_writes_are_answered_busy_and_succeed_when_the_disk_goes_on(served: Served) -> None:
    served.host.run(f"touch {STUCK}")
    load = served.load("/run/late")
    served.worker.wait_for("took longer than 2 s")
    served.host.run(f"rm {STUCK}")
    load.wait()
    assert served.holds("/run/late")
    assert "lost" not in served.worker.stderr


def test_reset_of_the_lun_does_not_wait_for_a_stuck_disk(served: Served) -> None:
    served.host.run(["pkill", "-f", SERVE.name])
    assert served.end()["why"] == "stopped"
    served.serve(deadline_s=60)
    served.host.run(f"touch {STUCK}")
    load = served.load("/run/reset")
    served.host.run(
        f"while ! grep -q [1-9] /sys/block/{served.disk.removeprefix('/dev/')}/inflight; do :; done"
    )
    served.host.run(["sg_reset", "-d", served.disk])
    served.host.run(f"rm {STUCK}")
    load.wait()
    assert served.holds("/run/reset")
    served.host.run(["pkill", "-f", SERVE.name])
    said = served.end()
    assert said["aborted"] > 0
    served.serve()
