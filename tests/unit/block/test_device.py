"""A file as a block device, where this machine has loop devices; the lab tests real disks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcmu_replication.block.file import File
from tcmu_replication.block.node import Extent
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import make_image

MiB = 1 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    made = subprocess.run(
        ["losetup", "--find", "--show", make_image(tmp_path / "disk", MiB)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(
            f"no loop devices on this machine ({made.stderr.strip()}); tests/lab covers block devices"
        )
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_device_length_data_and_flush(device: str) -> None:
    disk = File(device)
    assert disk.length == MiB
    assert disk.write(MiB - 3, [memoryview(b"abc")], True) is None
    assert bytes(disk.fetch(MiB - 5, 5)) == b"\0\0abc"
    assert disk.flush() is None
    assert disk.extents(0, MiB) == [Extent(MiB, allocated=True, zero=False)]
    disk.close()


@pytest.mark.parametrize("unmap", [True, False])
def test_device_zero_of_any_alignment(device: str, unmap: bool) -> None:
    disk = File(device)
    disk.write(0, [memoryview(b"x" * MiB)])
    disk.zero(100, 70000, True, unmap)
    assert bytes(disk.fetch(0, MiB)) == b"x" * 100 + bytes(70000) + b"x" * (MiB - 70100)
    disk.close()


def test_device_discard_gives_whole_blocks_back(device: str, tmp_path: Path) -> None:
    disk = File(device)
    disk.write(0, [memoryview(b"x" * MiB)], True)
    before = os.stat(tmp_path / "disk").st_blocks
    disk.discard(100, MiB - 100)
    assert bytes(disk.fetch(0, 512)) == b"x" * 512
    disk.flush()
    assert os.stat(tmp_path / "disk").st_blocks < before
    disk.close()


def test_device_open_for_writing_is_exclusive(device: str) -> None:
    disk = File(device)
    with pytest.raises(Error, match=f"{device} is in use: look for a mount") as caught:
        File(device)
    assert caught.value.kind is Kind.CONFLICT
    disk.close()
    File(device).close()
