"""A resource against the host it is on, over real files and directories."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tcmu_replication.daemon import config, host_check
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import manifest
from tcmu_replication.replication.stages import Mode, Stage
from tests.support.tools import PATIENCE_S

SIZE = 1 << 20


def make(directory: Path, name: str = "disk0", **changes: Any) -> config.Resource:
    """A resource of 1 MiB whose disk and overlay directory exist, unless `changes` names others."""
    disk, overlays = directory / f"{name}.img", directory / f"{name}.overlays"
    disk.touch()
    os.truncate(disk, SIZE)
    overlays.mkdir(exist_ok=True)
    mine = {"mode": "primary", "address": "192.0.2.1", "disk": str(disk), "overlays": str(overlays)}
    theirs = {"mode": "secondary", "address": "192.0.2.2", "disk": "/nowhere", "overlays": "/nowhere"}
    link = {key: changes.pop(key) for key in ("port", "control-port", "socket") if key in changes}
    if changes.pop("qemu", False):
        theirs = {"mode": "secondary", "address": "192.0.2.2", "qemu": True}
    document = {
        "resource": {"name": name, "size": SIZE},
        "link": {"trust": "address"} | link,
        "host": {"alpha": mine | changes, "beta": theirs},
    }
    path = directory / f"{name}.toml"
    path.touch()
    return config.parse(document, path)


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


def remember(resource: config.Resource, /, **changes: Any) -> None:
    """What a worker of it has written down."""
    said = {"resource": resource.name, "mode": Mode.PRIMARY, "stage": Stage.RUNNING, "length": SIZE}
    before = manifest.Manifest(**(said | changes))
    now = msgspec.structs.replace(before, sequence=1)
    manifest.save(Path(resource.host("alpha").overlays), now, before)


def test_overlay_directory_on_a_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    assert "on a file system with 12 KiB left; expected at least 1 MiB" in refused(make(tmp_path))


def test_overlay_directory_in_use_on_a_full_file_system_is_only_worth_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1: a worker that died is needed again."""
    resource = make(tmp_path)
    remember(resource)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096))
    [warning] = host_check.check_host(resource, "alpha")
    assert "host.alpha.overlays: found" in warning
    assert "on a file system with 12 KiB left; expected at least 1 MiB: make room there" in warning


def test_overlay_directory_of_another_resource(tmp_path: Path) -> None:
    resource = make(tmp_path)
    remember(resource, resource="disk7")
    assert "which belongs to resource 'disk7'; expected an overlay directory of its own" in refused(resource)


def test_overlays_of_another_size(tmp_path: Path) -> None:
    resource = make(tmp_path)
    remember(resource, length=2 * SIZE)
    text = refused(resource)
    assert (
        "with overlays of 2097152 bytes (2 MiB); expected the 1048576 bytes (1 MiB) of resource.size" in text
    )


@pytest.mark.parametrize(
    ("key", "mode", "mended"),
    [("file", 0o664, "go-w"), ("host.alpha.disk", 0o646, "go-w"), ("host.alpha.overlays", 0o1777, "go-w")],
)
def test_what_others_may_write_is_refused(tmp_path: Path, key: str, mode: int, mended: str) -> None:
    """S5."""
    resource = make(tmp_path)
    mine = resource.host("alpha")
    path = {"file": resource.path, "host.alpha.disk": mine.disk, "host.alpha.overlays": mine.overlays}[key]
    os.chmod(path, mode)
    text = refused(resource)
    assert f"{resource.path}: {key}: found {path} with mode {mode:04o}, so that" in text
    assert f"`chmod {mended} {path}`" in text


def test_directory_of_a_resource_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """S5."""
    place = tmp_path / "etc"
    place.mkdir()
    resource = make(place)
    place.chmod(0o777)
    assert f"file: found {place} with mode 0777, so that others may write it" in refused(resource)


def test_disk_behind_a_link_in_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """S5: they could make it another disk."""
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "disk").symlink_to(tmp_path / "disk0.img")
    loose.chmod(0o777)
    resource = make(tmp_path, disk=str(loose / "disk"))
    assert f"host.alpha.disk: found {loose} with mode 0777" in refused(resource)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_worker_that_is_not_root_has_files_of_its_own_and_roots() -> None:
    """S5: and not those of a third."""
    mine, third = 4_000_001, 4_000_002
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        resource = make(place)
        disk, overlays = resource.host("alpha").disk, resource.host("alpha").overlays
        os.chown(disk, mine, -1)
        os.chown(overlays, mine, -1)
        assert told(resource, mine) == ""
        os.chown(disk, 0, -1)
        assert told(resource, mine) == ""
        os.chown(disk, third, -1)
        assert f"belongs to user {third}; expected root or user {mine} as its owner" in told(resource, mine)
        os.chown(disk, mine, -1)
        assert f"belongs to user {mine}; expected root as its owner" in told(resource, 0)


def told(resource: config.Resource, user: int) -> str:
    """What the check says in a process of `user`."""
    inside, outside = multiprocessing.Pipe()

    def look() -> None:
        os.setuid(user)
        try:
            host_check.check_host(resource, "alpha")
            inside.send("")
        except Error as error:
            inside.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=look)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == 0
    return str(outside.recv())


def test_directory_under_tmp_passes(tmp_path: Path) -> None:
    """S5: sticky, and the entry is ours."""
    tmp_path.chmod(0o1777)
    assert host_check.check_host(make(tmp_path), "alpha") == []


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
