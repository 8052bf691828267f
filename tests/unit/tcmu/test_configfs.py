"""A backstore's directory, over ordinary files."""

from __future__ import annotations

import errno
import os

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.tcmu import configfs
from tcmu_replication.tcmu.configfs import Backstore

FILES = {
    "enable": "1\n",
    "attrib/dev_size": "268435456\n",
    "attrib/hw_block_size": "512\n",
    "attrib/hw_max_sectors": "2048\n",
    "attrib/cmd_time_out": "30\n",
    "attrib/emulate_write_cache": "1\n",
    "attrib/tmr_notification": "0\n",
    "wwn/vendor_id": "LIO-ORG\n",
    "wwn/product_id": "disk0           \n",
    "wwn/revision": "0002\n",
    "wwn/vpd_unit_serial": "T10 VPD Unit Serial Number: 1e8bb5e8-9ee1-4a64\n",
    "action/block_dev": "",
    "action/reset_ring": "",
    "action/free_kept_buf": "",
}


@pytest.fixture
def backstore(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "user_0/disk0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Backstore("0", "disk0", core=tmp_path)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("size", 256 << 20),
        ("block_size", 512),
        ("max_blocks", 2048),
        ("time_out_s", 30),
        ("write_cache", True),
        ("vendor", "LIO-ORG"),
        ("product", "disk0"),
        ("revision", "0002"),
        ("serial", "1e8bb5e8-9ee1-4a64"),
    ],
)
def test_attribute(backstore, attribute, value):
    assert getattr(backstore, attribute) == value


def test_serial_that_is_not_set_yet_is_empty(backstore):
    (backstore.path / "wwn/vpd_unit_serial").write_text("T10 VPD Unit Serial Number: \n")
    assert backstore.serial == ""


@pytest.mark.parametrize(("text", "ready"), [("0\n", False), ("1\n", True)])
def test_ready_follows_enable(backstore, text, ready):
    (backstore.path / "enable").write_text(text)
    assert backstore.ready() is ready


@pytest.mark.parametrize(
    ("call", "file", "written"),
    [
        (Backstore.block, "action/block_dev", "1"),
        (Backstore.unblock, "action/block_dev", "0"),
        (Backstore.reset_ring, "action/reset_ring", "1"),
        (lambda b: b.free_kept(4711), "action/free_kept_buf", "4711"),
        (Backstore.notify_task_management, "attrib/tmr_notification", "1\n"),
    ],
)
def test_switch_writes(backstore, call, file, written):
    call(backstore)
    assert (backstore.path / file).read_text() == written


def test_backstore_that_has_gone(tmp_path):
    gone = Backstore("0", "disk0", core=tmp_path)
    for call in (gone.ready, gone.block):
        with pytest.raises(Error) as caught:
            call()
        assert caught.value.kind is Kind.NOT_FOUND
    assert not gone.path.exists()


def test_attribute_that_is_no_number(backstore):
    (backstore.path / "attrib/dev_size").write_text("many")
    with pytest.raises(Error, match="dev_size is 'many'"):
        _ = backstore.size


def test_action_before_enable_has_finished_says_what_is_wrong(backstore, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(configfs.os, "write", refuse)
    with pytest.raises(Error, match="enabled") as caught:
        backstore.reset_ring()
    assert caught.value.kind is Kind.INVALID_STATE


def test_switch_is_opened_for_writing_only_as_some_cannot_be_read(backstore, monkeypatch):
    flags = []

    def opened(_path, how):
        flags.append(how)
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(configfs.os, "open", opened)
    with pytest.raises(Error) as caught:
        backstore.reset_ring()
    assert (flags, caught.value.kind) == ([os.O_WRONLY], Kind.PERMISSION)
