"""Devices as UIO shows them, over a made-up /sys and /dev."""

from __future__ import annotations

import errno
import gc
import os

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.tcmu import uio
from tcmu_replication.tcmu.uio import Identity
from tests.support.fake_kernel import FakeKernel


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("tcm-user/0/disk0/replication/alpha", Identity("uio3", "0", "disk0", "replication", "alpha")),
        ("tcm-user/12/d/file/dev/sdb@x=1\n", Identity("uio3", "12", "d", "file", "dev/sdb@x=1")),
        ("tcm-user/0/disk0/file/", Identity("uio3", "0", "disk0", "file", "")),
        ("tcm-user/0/disk0/file", Identity("uio3", "0", "disk0", "file", "")),
        ("tcm-user/0/disk0", None),
        ("tcm-user/0//file/x", None),
        ("uio_pci_generic", None),
        ("", None),
    ],
)
def test_name_of_a_device(text, identity):
    assert uio.parse("uio3", text) == identity


def test_dev_config_is_what_was_given_at_creation():
    assert uio.parse("uio3", "tcm-user/0/d/file/dev/sdb").dev_config == "file/dev/sdb"


@pytest.fixture
def machine(tmp_path):
    """A /sys with a TCMU device and another driver's, and an empty /dev."""
    for name, text in (("uio0", "tcm-user/0/disk0/replication/disk0\n"), ("uio1", "other\n")):
        folder = tmp_path / "sys/class/uio" / name / "maps/map0"
        folder.mkdir(parents=True)
        (tmp_path / "sys/class/uio" / name / "name").write_text(text)
        (folder / "size").write_text("0x2000\n")
    (tmp_path / "dev").mkdir()
    return tmp_path


def test_devices_are_those_of_tcmu(machine):
    expected = Identity("uio0", "0", "disk0", "replication", "disk0")
    assert list(uio.devices(machine / "sys")) == [expected]


def test_machine_without_uio_has_no_devices(tmp_path):
    assert list(uio.devices(tmp_path)) == []


def test_device_that_went_has_no_identity(machine):
    assert uio.identify("uio7", machine / "sys") is None


def test_open_maps_the_size_that_sysfs_says(machine):
    (machine / "dev/uio0").write_bytes(b"mailbox".ljust(0x2000, b"\0"))
    device = uio.Device.open("uio0", machine / "sys", machine / "dev")
    assert (len(device.memory), bytes(device.memory[:7])) == (0x2000, b"mailbox")
    device.close()
    device.close()


def test_open_of_a_missing_device(machine):
    with pytest.raises(Error) as caught:
        uio.Device.open("uio0", machine / "sys", machine / "dev")
    assert caught.value.kind is Kind.NOT_FOUND


def test_open_of_a_device_in_use_says_so(machine, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(uio.os, "open", busy)
    with pytest.raises(Error, match="open in another process") as caught:
        uio.Device.open("uio0", machine / "sys", machine / "dev")
    assert caught.value.kind is Kind.CONFLICT


@pytest.mark.parametrize(("size", "kind"), [("0x4000", Kind.PEER_LIED), ("large", Kind.PEER_LIED)])
def test_failed_mapping_leaves_no_descriptor(machine, size, kind):
    (machine / "dev/uio0").write_bytes(bytes(0x2000))
    (machine / "sys/class/uio/uio0/maps/map0/size").write_text(size)
    gc.collect()  # what other tests have left is not closed in between
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Error) as caught:
        uio.Device.open("uio0", machine / "sys", machine / "dev")
    assert caught.value.kind is kind
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def kernel():
    kernel = FakeKernel(ring_size=4096, data_size=4096)
    yield kernel
    kernel.close()


def test_event_is_drained_once_and_without_one_nothing_happens(kernel):
    device = kernel.open()
    kernel.kick()
    device.drain()
    device.drain()
    device.close()


def test_wake_reaches_the_kernel(kernel):
    device = kernel.open()
    assert not kernel.pump()
    device.wake()
    assert kernel.pump()
    device.close()


def test_removed_device(kernel):
    device = kernel.open()
    kernel.remove()
    for call in (device.drain, device.wake):
        with pytest.raises(Error, match="was removed") as caught:
            call()
        assert caught.value.kind is Kind.NOT_FOUND
    device.close()


def test_close_with_a_buffer_in_use_leaves_the_buffer_usable(kernel):
    device = kernel.open()
    buffer = device.memory[4224:4228]
    device.close()
    buffer[:] = b"late"
    assert bytes(kernel.memory[4224:4228]) == b"late"
