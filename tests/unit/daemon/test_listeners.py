"""What a resource listens at, against what is there: real sockets on this machine's loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.control import lock
from tcmu_replication.daemon import config
from tcmu_replication.daemon.listeners import LONGEST, check_listeners
from tcmu_replication.errors import Error, Kind
from tests.support.processes import free_port


def make(directory: Path, *, listen: str | None = None, **changes: Any) -> config.Resource:
    """disk0 with the link's ports of `beta`, the secondary at 127.0.0.2 unless `changes` say otherwise."""
    ports = {"port": free_port(), "control-port": free_port()}
    link = ports | {key.replace("_", "-"): changes.pop(key) for key in list(changes) if key in LINK}
    disk = {"disk": "/nowhere", "overlays": "/nowhere"}
    document: dict[str, Any] = {
        "resource": {"name": "disk0", "size": 1 << 20},
        "link": link,
        "host": {
            "alpha": {"mode": "primary", "address": "127.0.0.1"} | disk,
            "beta": {"mode": "secondary", "address": "127.0.0.2"} | disk | changes,
        },
    }
    if changes.get("mode") == "primary":
        document["host"]["alpha"]["mode"] = "secondary"
    if listen is not None:
        document["nbd"] = {"listen": listen}
    return config.parse(document, directory / "disk0.toml")


LINK = ("port", "control_port", "socket")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.2 where somebody listens."""
    with socket.create_server(("127.0.0.2", free_port())) as server:
        yield server.getsockname()[1]
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has disturbed it
            server.accept()


def refused(resource: config.Resource, run: Path) -> str:
    with pytest.raises(Error) as caught:
        check_listeners(resource, "beta", run)
    assert caught.value.kind is Kind.BAD_CONFIG
    return str(caught.value)


def test_free_ports_pass_and_stay_free(tmp_path: Path) -> None:
    resource = make(tmp_path, listen=f"127.0.0.3:{free_port()}")
    assert check_listeners(resource, "beta", tmp_path) == []
    for address in (("127.0.0.2", resource.link.port), ("127.0.0.2", resource.link.control_port)):
        with socket.create_server(address):
            pass


@pytest.mark.parametrize("key", ["port", "control_port"])
def test_port_of_the_link_that_is_taken_is_refused(tmp_path: Path, taken: int, key: str) -> None:
    text = refused(make(tmp_path, **{key: taken}), tmp_path)
    assert (
        f"link.{key.replace('_', '-')}: found 127.0.0.2 port {taken}, where another process listens" in text
    )
    assert f"expected a free port: `ss -ltnp 'sport = :{taken}'` says whose it is" in text


def test_port_of_the_lun_that_is_taken_is_refused(tmp_path: Path, taken: int) -> None:
    assert f"nbd.listen: found 127.0.0.2 port {taken}, where" in refused(
        make(tmp_path, listen=f"127.0.0.2:{taken}"), tmp_path
    )


def test_ports_of_the_link_are_the_secondarys(tmp_path: Path, taken: int) -> None:
    assert check_listeners(make(tmp_path, port=taken, mode="primary"), "beta", tmp_path) == []


def test_ports_that_the_resources_own_worker_has_pass(tmp_path: Path, taken: int) -> None:
    resource = make(tmp_path, port=taken)
    held = lock.hold(tmp_path / "disk0.sock")
    try:
        assert check_listeners(resource, "beta", tmp_path) == []
    finally:
        os.close(held)
    assert "another process listens" in refused(resource, tmp_path)


def test_address_that_this_host_does_not_have_is_refused(tmp_path: Path) -> None:
    text = refused(make(tmp_path, address="203.0.113.7"), tmp_path)
    assert "host.beta.address: found 203.0.113.7, which no interface of this host has" in text
    assert "`ip -brief address`" in text


def test_address_of_no_interface_at_all_is_refused(tmp_path: Path) -> None:
    assert "host.beta.address: found fe80::1%nosuch" in refused(
        make(tmp_path, address="fe80::1%nosuch"), tmp_path
    )


@pytest.mark.parametrize("key", ["link.socket", "nbd.listen"])
def test_socket_in_a_directory_that_is_missing_or_none_is_refused(tmp_path: Path, key: str) -> None:
    def at(path: Path) -> str:
        changes = {"listen": f"unix:{path}"} if key == "nbd.listen" else {"socket": str(path)}
        return refused(make(tmp_path, **changes), tmp_path / "run")

    missing, file = tmp_path / "missing", tmp_path / "file"
    file.touch()
    text = at(missing / "a.sock")
    assert f"{key}: found {missing}/a.sock in {missing}, which does not exist" in text
    assert f"expected a directory that exists: `mkdir {missing}`" in text
    assert f"{key}: found {file}/a.sock in {file}, which is not a directory" in at(file / "a.sock")


def test_socket_in_the_run_directory_that_the_worker_makes_passes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert check_listeners(make(tmp_path, listen=f"unix:{run / 'disk0.nbd'}"), "beta", run) == []


def test_socket_of_somebody_else_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "lun.sock"
    resource = make(tmp_path, listen=f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        text = refused(resource, tmp_path)
        assert f"nbd.listen: found {path}, where another process listens" in text
        assert f"`fuser -v {path}`" in text
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert check_listeners(resource, "beta", tmp_path) == []
    path.unlink()
    path.touch()
    assert f"found {path}, which is there and no socket" in refused(resource, tmp_path)


def test_socket_with_a_path_that_the_kernel_does_not_take_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("x" * LONGEST)
    assert f"a path of {len(str(path))} bytes; expected at most 107" in refused(
        make(tmp_path, socket=str(path)), tmp_path
    )


def test_socket_in_a_directory_that_others_may_write_is_worth_a_word(tmp_path: Path) -> None:
    """S5: they could put theirs there instead. In /tmp they cannot."""
    place = tmp_path / "place"
    place.mkdir()
    resource = make(tmp_path, listen=f"unix:{place / 'lun.sock'}")
    place.chmod(0o777)
    [warning] = check_listeners(resource, "beta", tmp_path)
    assert f"nbd.listen: found {place} with mode 0777, so that others may write it" in warning
    place.chmod(0o1777)
    assert check_listeners(resource, "beta", tmp_path) == []
