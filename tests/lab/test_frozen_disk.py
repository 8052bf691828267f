"""An initiator and a pair while a disk hangs for longer than the kernel's time-out of a command (A2)."""

from __future__ import annotations

import json
import time

import pytest

from tests.lab import load, pair, target
from tests.lab.host import Host
from tests.lab.lab import Lab
from tests.lab.pair import Pair

pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800)]

SERIAL = "d15c0000-7463-4d75-8000-0000000000f2"
FROZEN_S = 40
"""More than a command's 30 s in the kernel, and than two deadlines of ours."""
LOAD_S = 600
MAPPED = "/dev/mapper/hanging"


class MappedPair(Pair):
    """Whose primary's disk can be suspended: device-mapper lies between."""

    def resource_file(self, **extra: str) -> str:
        return super().resource_file(**extra).replace(f'"{self.primary.device("data")}"', f'"{MAPPED}"', 1)

    def map(self) -> None:
        device = self.primary.device("data")
        self.primary.run("modprobe dm-mod")
        table = f"0 {pair.SIZE // 512} linear {device} 0"
        # There is no udev in the lab: the program makes the device's node itself.
        self.primary.run(f"DM_DISABLE_UDEV=1 dmsetup create hanging --table '{table}'")


def test_initiator_sees_no_error_through_a_frozen_file_system(alpha: Host) -> None:
    image = f"{pair.STATE}/image"
    daemon = alpha.spawn(f"exec {pair.PROGRAM} daemon")
    alpha.run(f"truncate -s {pair.SIZE} {image}")
    alpha.wait_until("[ -S /run/tcmu-replication/_manager.sock ]")
    with (
        target.user(alpha, "image", SERIAL, f"file/{image}", pair.SIZE) as backstore,
        target.Loop(backstore) as lun,
    ):
        running = load.start(alpha, lun.device)
        load.wait_for_writes(alpha, lun.device)
        began = time.monotonic()
        alpha.run(f"fsfreeze -f {pair.STATE}")
        try:
            while not (hangs := _hangs(alpha)):
                pass
            assert image in hangs
            alpha.run(f"sleep {max(0, FROZEN_S - (time.monotonic() - began)):.0f}")
        finally:
            alpha.run(f"fsfreeze -u {pair.STATE}")
        running.wait(LOAD_S)  # a failed or wrong block ends it with another status than 0
        log = daemon.stderr
        assert "were answered BUSY meanwhile" in log
        assert "I/O error" not in alpha.run("dmesg").stdout
    daemon.signal()
    daemon.wait()


def test_pair_goes_on_after_its_primarys_device_was_suspended(hosts: Lab) -> None:
    replicated = MappedPair(hosts)
    replicated.map()
    replicated.begin()
    alpha = replicated.primary
    with target.Loop(replicated.backstores[alpha.name]) as lun:
        running = load.start(alpha, lun.device)
        load.wait_for_writes(alpha, lun.device)
        alpha.run("DM_DISABLE_UDEV=1 dmsetup suspend --noflush --nolockfs hanging")
        try:
            # Half a block of what was never read: the kernel reads the rest of it from the disk first.
            odd = alpha.spawn(
                f"dd if=/dev/zero of={lun.device} bs=512 count=1 seek={pair.SIZE // 512 - 9} oflag=direct status=none"
            )
            alpha.run(f"sleep {FROZEN_S}")
            assert pair.NAME in alpha.run(f"{pair.PROGRAM} status {pair.NAME}", check=False).stdout
        finally:
            alpha.run("DM_DISABLE_UDEV=1 dmsetup resume hanging")
        odd.wait(LOAD_S)
        running.wait(LOAD_S)
        assert "I/O error" not in alpha.run("dmesg").stdout
    assert replicated.status(alpha)["error"] is None
    replicated.command(alpha, "checkpoint")
    written = [
        host.run(f"sha256sum {host.device('data')}").stdout.split()[0]
        for host in (alpha, replicated.secondary)
    ]
    assert written[0] == written[1]


def _hangs(host: Host) -> str:
    """What `status` says of a hang of the only LUN."""
    documents = json.loads(host.run(f"{pair.PROGRAM} status --json", check=False).stdout)
    return documents[0].get("hangs") or ""
