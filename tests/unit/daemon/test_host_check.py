"""A resource against the host it is on, over real files and directories."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tcmu_replication.daemon import config, host_check
from tcmu_replication.errors import Error, Kind

SIZE = 1 << 20


def make(directory: Path, name: str = "disk0", **changes: Any) -> config.Resource:
    """A resource of 1 MiB whose disk and overlay directory exist, unless `changes` names others."""
    disk, overlays = directory / f"{name}.img", directory / f"{name}.overlays"
    disk.touch()
    os.truncate(disk, SIZE)
    overlays.mkdir(exist_ok=True)
    mine = {"mode": "primary", "address": "192.0.2.1", "disk": str(disk), "overlays": str(overlays)}
    theirs = {"mode": "secondary", "address": "192.0.2.2", "disk": "/nowhere", "overlays": "/nowhere"}
    ports = {key: changes.pop(key) for key in ("port", "control-port", "socket") if key in changes}
    if changes.pop("qemu", False):
        theirs = {"mode": "secondary", "address": "192.0.2.2", "qemu": True}
    document = {
        "resource": {"name": name, "size": SIZE},
        "link": ports,
        "host": {"alpha": mine | changes, "beta": theirs},
    }
    return config.parse(document, directory / f"{name}.toml")


def snapshot(directory: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in directory.rglob("*"))


def refused(resource: config.Resource, others: tuple[config.Resource, ...] = ()) -> str:
    before = snapshot(resource.path.parent)
    with pytest.raises(Error) as caught:
        host_check.check_host(resource, "alpha", others)
    assert caught.value.kind is Kind.BAD_CONFIG
    assert snapshot(resource.path.parent) == before
    return str(caught.value)


def test_good_host_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    resource = make(tmp_path)
    before = snapshot(tmp_path)
    host_check.check_host(resource, "alpha", [resource])
    assert snapshot(tmp_path) == before


def test_missing_disk(tmp_path: Path) -> None:
    text = refused(make(tmp_path, disk="/nonexistent/disk"))
    assert "host.alpha.disk: found /nonexistent/disk (No such file or directory)" in text
    assert "1048576 bytes (1 MiB)" in text


def test_disk_that_is_a_directory_or_a_character_device(tmp_path: Path) -> None:
    for disk in (str(tmp_path), "/dev/null"):
        assert "neither a block device nor a file" in refused(make(tmp_path, disk=disk))


@pytest.mark.parametrize("length", [0, SIZE - 512, SIZE + 512])
def test_disk_of_another_size(tmp_path: Path, length: int) -> None:
    resource = make(tmp_path)
    os.truncate(resource.host("alpha").disk, length)
    text = refused(resource)
    assert f"of {length} bytes" in text
    assert "expected the 1048576 bytes (1 MiB) of resource.size" in text


def test_overlay_directory_missing(tmp_path: Path) -> None:
    assert "host.alpha.overlays: found /nonexistent (No such" in refused(
        make(tmp_path, overlays="/nonexistent")
    )


def test_overlay_directory_that_is_a_file(tmp_path: Path) -> None:
    resource = make(tmp_path)
    resource = make(tmp_path, overlays=resource.host("alpha").disk)
    assert "which is not a directory" in refused(resource)


def test_overlay_directory_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "which is not writable" in refused(make(tmp_path))


def test_overlay_directory_on_a_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    assert "on a file system with 12 KiB left; expected at least 1 MiB" in refused(make(tmp_path))


def test_same_disk_twice_by_a_link_in_another_file(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0")
    alias = tmp_path / "alias"
    alias.symlink_to(first.host("alpha").disk)
    second = make(tmp_path, "disk1", disk=str(alias), port=1, **{"control-port": 2})
    text = refused(second, (first, second))
    assert f"{alias}, which {first.path} uses too (as {first.host('alpha').disk})" in text


def test_same_disk_twice_by_a_hard_link(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0")
    alias = tmp_path / "alias"
    alias.hardlink_to(first.host("alpha").disk)
    assert "uses too" in refused(make(tmp_path, "disk1", disk=str(alias)), (first,))


def test_same_overlay_directory_twice(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0")
    second = make(tmp_path, "disk1", overlays=first.host("alpha").overlays + "/.")
    assert "host.alpha.overlays" in refused(second, (first,))


def test_same_port_on_the_same_address(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0")
    second = make(tmp_path, "disk1", port=10810, **{"control-port": 20000})
    assert "link.port: found 10810, which is link.control-port of" in refused(second, (first,))


def test_same_socket_twice(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0", socket="/run/link")
    second = make(tmp_path, "disk1", socket="/run/link", **{"control-port": 20000})
    assert "link.socket: found /run/link, which is link.socket of" in refused(second, (first,))


def test_ports_that_are_not_used_may_be_the_same(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0", socket="/run/link0", qemu=True)
    host_check.check_host(make(tmp_path, "disk1", socket="/run/link1", qemu=True), "alpha", [first])
    host_check.check_host(make(tmp_path, "disk2"), "alpha", [first])


def test_same_port_on_another_address_is_fine(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0")
    host_check.check_host(make(tmp_path, "disk1", address="192.0.2.3"), "alpha", [first])


def test_resource_of_other_hosts_is_no_matter(tmp_path: Path) -> None:
    first = make(tmp_path, "disk0")
    elsewhere = config.Resource(
        **{
            **{name: getattr(first, name) for name in first.__struct_fields__},
            "name": "disk1",
            "hosts": {"gamma": first.hosts["alpha"], "delta": first.hosts["beta"]},
        }
    )
    host_check.check_host(first, "alpha", [elsewhere])
