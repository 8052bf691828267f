"""The kernel's own target and initiator in the lab, without this project's code: the ground the rest stands on."""

from __future__ import annotations

import pytest

from tcmu_replication.units import MiB
from tests.lab import target
from tests.lab.host import Host
from tests.lab.initiator import Session

pytestmark = pytest.mark.lab

NAME = "iqn.2026-01.org.example:lab"
SERIAL = "6b2c1f0a-0000-4000-8000-000000000001"


def test_iscsi_lun_carries_a_file_system_over_the_network(alpha: Host, client: Host) -> None:
    with (
        target.fileio(alpha, "file0", SERIAL, "/srv/file0", 64 * MiB) as backstore,
        target.Export(backstore, NAME, "10.77.0.1"),
        Session(client, NAME, "10.77.0.1") as session,
    ):
        disk = session.device
        client.run(f"mkfs.ext4 -q {disk} && mkdir -p /mnt/lun && mount {disk} /mnt/lun")
        written = client.run("head -c 8M /dev/urandom | tee /mnt/lun/file | sha256sum").stdout
        client.run("umount /mnt/lun")
        assert client.run(f"mount -o ro {disk} /mnt/lun && sha256sum < /mnt/lun/file").stdout == written
        client.run(f"umount /mnt/lun && fsck.ext4 -f -n {disk}")


def test_block_backstore_is_a_local_disk_through_loopback(beta: Host) -> None:
    with (
        target.block(beta, "block0", SERIAL, beta.device("data")) as backstore,
        target.Loop(backstore) as loop,
    ):
        beta.run(f"printf through | dd of={loop.device} bs=512 seek=1 conv=fsync,notrunc status=none")
        serial = beta.run(f"cat /sys/block/{loop.device.removeprefix('/dev/')}/device/vpd_pg80 | tail -c +5")
        assert serial.stdout.rstrip("\0") == SERIAL
    there = beta.run(f"dd if={beta.device('data')} bs=512 skip=1 count=1 status=none | head -c 7")
    assert there.stdout == "through"
