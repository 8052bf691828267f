"""Whether what a resource listens at is free on this host. Looks, and disturbs nobody.

A port is tried by binding to it and letting it go: who listens there notices
nothing, and who is about to listen there (with SO_REUSEADDR, as every server of
ours) is not kept from it. The resource's own worker, where it runs, has its ports:
it would have ended otherwise.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tcmu_replication import ownership
from tcmu_replication.control import lock
from tcmu_replication.daemon.config import Resource, refusal
from tcmu_replication.daemon.places import socket_path

LONGEST = 107
"""Bytes of the path of a unix socket (struct sockaddr_un, include/uapi/linux/un.h, less the last zero)."""
_LISTENING = 0x10000
"""Of the flags in /proc/net/unix: __SO_ACCEPTCON, include/linux/net.h."""


class _Port(NamedTuple):
    key: str
    address: str
    port: int


def check_listeners(resource: Resource, host: str, run: Path) -> list[str]:
    """Raise BAD_CONFIG for the first address, port or socket that `resource` cannot listen at on `host`.

    Returns what is worth a word. `run` is where the control sockets are.
    """
    mine = resource.host(host)
    _check_port(resource, _Port(f"host.{host}.address", mine.address, 0))
    warnings = [
        word for key, path in _sockets(resource, host) for word in _check_directory(resource, key, path, run)
    ]
    control = socket_path(run, resource.name)
    if lock.holder(control) is not None:
        return warnings
    if lock.lock_path(control).exists() and not os.access(lock.lock_path(control), os.R_OK | os.W_OK):
        return [*warnings, "only root can tell whether its ports are free: its own worker may have them"]
    for port in _ports(resource, host):
        _check_port(resource, port)
    for key, path in _sockets(resource, host):
        _check_socket(resource, key, path)
    return warnings


def _ports(resource: Resource, host: str) -> Iterator[_Port]:
    """Where it listens on `host`: the link's ports on the secondary, and the LUN's."""
    mine = resource.host(host)
    if mine.mode == "secondary":
        if resource.link.socket is None:
            yield _Port("link.port", mine.address, resource.link.port)
        if not resource.peer(host)[1].qemu:
            yield _Port("link.control-port", mine.address, resource.link.control_port)
    if resource.nbd is not None and resource.nbd.listen.unix is None:
        yield _Port("nbd.listen", *resource.nbd.listen.tcp)


def _sockets(resource: Resource, host: str) -> Iterator[tuple[str, Path]]:
    """The same, of unix sockets."""
    if resource.host(host).mode == "secondary" and resource.link.socket is not None:
        yield "link.socket", Path(resource.link.socket)
    if resource.nbd is not None and (path := resource.nbd.listen.unix) is not None:
        yield "nbd.listen", path


def _check_port(resource: Resource, wanted: _Port) -> None:
    found = f"{wanted.address} port {wanted.port}" if wanted.port else wanted.address
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            wanted.address, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            found, expected = (
                f"{found}, where another process listens",
                (
                    f"a free port: `ss -ltnp 'sport = :{wanted.port}'` says whose it is; end that, or give "
                    "this resource another port, on both hosts"
                ),
            )
        elif error.errno == errno.EADDRNOTAVAIL:
            found, expected = (
                f"{found}, which no interface of this host has",
                ("an address of this host (`ip -brief address`), as the other host knows it"),
            )
        else:
            found, expected = f"{found} ({error.strerror})", "an address and a port where we may listen"
        raise refusal(resource.path, wanted.key, found, expected) from error


def _check_directory(resource: Resource, key: str, path: Path, run: Path) -> list[str]:
    """Where a socket will be. Raises BAD_CONFIG; a word if others could put theirs there instead."""
    if (length := len(os.fsencode(path))) > LONGEST:
        raise refusal(
            resource.path, key, f"{path}, a path of {length} bytes", f"at most {LONGEST}, the kernel's limit"
        )
    directory = path.parent
    expected = f"a directory that exists: `mkdir {directory}`"
    try:
        if not stat.S_ISDIR(os.stat(directory).st_mode):
            raise refusal(
                resource.path,
                key,
                f"{path} in {directory}, which is not a directory",
                "a directory that exists",
            )
    except FileNotFoundError as error:
        if directory == run:
            return []  # the worker makes it
        raise refusal(resource.path, key, f"{path} in {directory}, which does not exist", expected) from error
    except OSError as error:
        raise refusal(resource.path, key, f"{directory} ({error.strerror})", expected) from error
    wrong = ownership.fault(directory, ownership.WAY, ownership.users())
    return [] if wrong is None else [str(refusal(resource.path, key, *wrong))]


def _check_socket(resource: Resource, key: str, path: Path) -> None:
    """That nobody listens there yet. A socket that a dead process left is replaced. Raises BAD_CONFIG."""
    if path.exists() and not path.is_socket():
        raise refusal(resource.path, key, f"{path}, which is there and no socket", "a path that is free")
    if str(path) in _listening():
        raise refusal(
            resource.path,
            key,
            f"{path}, where another process listens",
            f"a path that is free: `fuser -v {path}` says whose it is; end that, or name another",
        )


def _listening() -> set[str]:
    """The paths of unix sockets that take connections (/proc/net/unix; proc(5))."""
    try:
        rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    except OSError:
        return set()
    return {row[7] for row in rows if len(row) == 8 and int(row[3], 16) & _LISTENING}
