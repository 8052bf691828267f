"""QEMU's addresses of an NBD server: what they resolve to, and listening there, in its words when it fails."""

from __future__ import annotations

import asyncio
import errno
import functools
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable

from msgspec import UNSET

from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd import Server
from tcmu_replication.nbd import uri
from tcmu_replication.nbd.uri import Address
from tcmu_replication.qemu import block_schema as schema

_PORT = re.compile("[0-9]{1,5}")
_EVERY = {socket.AF_UNSPEC: "", socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


async def addresses(host: str, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[str]:
    """The addresses that a host's name has, in the resolver's order. Raises BAD_CONFIG if it has none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, None, family=family, type=socket.SOCK_STREAM
        )
    except (OSError, ValueError) as error:  # ValueError: no name at all, too long or with a NUL
        reason = error.strerror if isinstance(error, OSError) else "Name or service not known"
        raise Error(Kind.BAD_CONFIG, f"address resolution failed for {host}: {reason}") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def leads_to(addr: schema.Inet | schema.Unix, place: Address) -> bool:
    """Whether a server at that address would be the one at `place`; every address of this host includes ours."""
    if isinstance(addr, schema.Unix):
        return isinstance(place, uri.Unix) and addr.data.path == place.path
    if isinstance(place, uri.Unix) or addr.data.port != str(place.port):
        return False
    if addr.data.host in _EVERY.values():
        return True
    try:
        return place.host in await addresses(addr.data.host)
    except Error:
        return False


async def listening(make: Callable[[], Server], addr: schema.Inet | schema.Unix) -> Server:
    """A server of `make` that listens there; over TCP on the first port from `port` to `to` that is free.

    Raises `Error`.
    """
    if isinstance(addr, schema.Unix):
        if not addr.data.path or "\0" in addr.data.path:
            raise Error(Kind.BAD_REQUEST, f"UNIX socket path '{addr.data.path}' is no file's")
        try:
            return await _try(make, lambda server: server.listen_unix(addr.data.path))
        except Error as error:
            raise _bind_error(error, f"Failed to bind socket to {addr.data.path}") from error
    data = addr.data
    first = port(data)
    last = first if data.to is UNSET else max(first, data.to)
    hosts = await _hosts(data)
    for number in range(first, last + 1):
        try:
            return await _try(make, functools.partial(_listen_on_all, hosts, number))
        except Error as error:
            if not _is_busy(error):
                raise _bind_error(error, "Failed to bind socket") from error
            if number == last:
                raise _bind_error(error, "Failed to find an available port") from error
    raise AssertionError("the range has a first port")


def port(address: schema.InetSocketAddress) -> int:
    """Its port. Raises BAD_REQUEST if that is not a number."""
    if not _PORT.fullmatch(address.port) or int(address.port) > 0xFFFF:
        raise Error(
            Kind.BAD_REQUEST,
            f"address resolution failed for {address.host}:{address.port}: the port must be a number up to 65535",
        )
    return int(address.port)


async def _try(make: Callable[[], Server], listen: Callable[[Server], Awaitable[object]]) -> Server:
    server = make()
    try:
        await listen(server)
    except Error:
        await server.close()
        raise
    return server


async def _listen_on_all(hosts: list[str], number: int, server: Server) -> None:
    """The same port of each, also where it is the system's choice."""
    for host in hosts:
        number = await server.listen_tcp(host, number)


async def _hosts(data: schema.InetSocketAddress) -> list[str]:
    """The addresses to listen on."""
    family = _family(data)
    if not data.host:
        return [_EVERY[family]]
    if data.numeric:
        _check_numeric(data)
    return await addresses(data.host, family)


def _is_busy(error: Error) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE


def _family(data: schema.InetSocketAddress) -> socket.AddressFamily:
    """As QEMU's inet_ai_family_from_address."""
    if data.ipv4 is False and data.ipv6 is False:
        raise Error(Kind.BAD_REQUEST, "Cannot disable IPv4 and IPv6 at same time")
    if data.ipv4 is True and data.ipv6 is True:
        return socket.AF_UNSPEC
    if data.ipv6 is True or data.ipv4 is False:
        return socket.AF_INET6
    if data.ipv4 is True or data.ipv6 is False:
        return socket.AF_INET
    return socket.AF_UNSPEC


def _check_numeric(data: schema.InetSocketAddress) -> None:
    try:
        ipaddress.ip_address(data.host.partition("%")[0])
    except ValueError as error:
        raise Error(
            Kind.BAD_REQUEST,
            f"address resolution failed for {data.host}:{data.port}: Name or service not known",
        ) from error


def _bind_error(error: Error, text: str) -> Error:
    """QEMU's words for a socket that could not be bound (util/qemu-sockets.c)."""
    cause = error.__cause__
    if not isinstance(cause, OSError) or not cause.strerror:
        return error
    return Error(error.kind, f"{text}: {cause.strerror}")
