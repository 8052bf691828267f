"""What the kernel says about files."""

import os

import pytest

from tcmu_replication.block import space


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="not mounted: /dev/shm")
def test_tmpfs_is_in_memory():
    assert space.in_memory("/dev/shm")


def test_another_file_system_is_not_in_memory():
    assert not space.in_memory("/proc")


def test_in_memory_of_what_is_not_there():
    with pytest.raises(FileNotFoundError):
        space.in_memory("/proc/nothing")
