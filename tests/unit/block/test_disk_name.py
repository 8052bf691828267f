import os

import pytest

from tcmu_replication.block import disk_name as names
from tcmu_replication.block.disk_name import disk_name
from tcmu_replication.errors import Error, Kind


def test_image_has_one_name_under_every_path(tmp_path):
    image, other = tmp_path / "a", tmp_path / "b"
    image.write_bytes(b"x")
    other.write_bytes(b"x")
    (tmp_path / "link").symlink_to(image)
    assert disk_name(str(image)) == disk_name(str(tmp_path / "link")) != ""
    assert disk_name(str(image)) != disk_name(str(other))


def test_image_that_was_replaced_has_another_name(tmp_path):
    image = tmp_path / "a"
    image.write_bytes(b"x")
    before = disk_name(str(image))
    (tmp_path / "new").write_bytes(b"x")
    os.replace(tmp_path / "new", image)
    assert disk_name(str(image)) != before


def test_missing_disk_is_an_error(tmp_path):
    with pytest.raises(Error) as refused:
        disk_name(str(tmp_path / "none"))
    assert refused.value.kind is Kind.NOT_FOUND


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"dm/uuid": "LVM-1\n", "wwid": "naa.5\n"}, "LVM-1"),
        ({"dm/uuid": "\n", "wwid": "naa.5\n"}, "naa.5"),
        ({"device/wwid": "t10.ATA disk  \n"}, "t10.ATA disk"),
        ({"uevent": "MAJOR=8\nPARTN=1\nPARTUUID=0f-01\n"}, "PARTUUID=0f-01"),
        ({"uevent": "MAJOR=7\nDEVNAME=loop0\n"}, ""),
        ({}, ""),
    ],
)
def test_device_is_named_by_the_best_that_sysfs_has(tmp_path, monkeypatch, files, name):
    directory = tmp_path / "8:1"
    for path, text in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    monkeypatch.setattr(names, "SYSFS", tmp_path)
    monkeypatch.setattr(names.os, "stat", lambda path: _Device())
    assert disk_name("/dev/sda1") == name


class _Device:
    """What stat(2) says of a device node."""

    st_mode = 0o060660
    st_rdev = os.makedev(8, 1)
