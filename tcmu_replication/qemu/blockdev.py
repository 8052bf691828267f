"""QEMU's blockdev-add, blockdev-del and yank for the one replica that a primary has.

Where the secondary is, and how it is reached, says the resource file; a
command that says the same is obeyed, any other refused. The connection is made
at start, when the secondary lets it in, so blockdev-add itself makes none.
"""

from __future__ import annotations

from typing import NoReturn

from msgspec import UNSET

from tcmu_replication.control.command import Nothing
from tcmu_replication.control.framing import NO_DEVICE, ClassError
from tcmu_replication.control.server import Handler
from tcmu_replication.control.session import Session
from tcmu_replication.daemon.config import Resource
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu import blockdev_schema as schema
from tcmu_replication.qemu.address import addresses
from tcmu_replication.qemu.graph import WELL_FORMED, Graph
from tcmu_replication.qemu.replica import NamedReplica, Names

_MAX_NAME = 31


class Blockdev:
    """The commands, for `host`'s end of a resource."""

    def __init__(self, resource: Resource, host: str, graph: Graph, replica: NamedReplica) -> None:
        self._resource = resource
        self._host = host
        self._is_primary = resource.host(host).mode == "primary"
        self._graph = graph
        self._replica = replica
        self.commands: dict[str, Handler] = {
            "blockdev-add": self._add,
            "blockdev-del": self._delete,
            "yank": self._yank,
            "query-yank": self._query_yank,
        }

    # --- blockdev-add, its checks in QEMU's order

    async def _add(
        self, arguments: schema.BlockdevNbd | schema.BlockdevReplication, session: Session
    ) -> None:
        if not self._is_primary:
            raise Error(
                Kind.UNSUPPORTED,
                f"{self._host} is the secondary of {self._graph.lun}: its chain is what [host.{self._host}] of "
                f"{self._resource.path} says, and no node is added to it. To make it the primary, exchange the "
                "hosts' `mode` there and restart both workers",
            )
        if arguments.node_name is UNSET:
            raise Error(Kind.BAD_REQUEST, "'node-name' must be specified for the root node")
        if isinstance(arguments, schema.BlockdevNbd):
            await self._add_connection(arguments.node_name, arguments)
        else:
            await self._add_filter(arguments.node_name, arguments)

    async def _add_connection(self, name: str, options: schema.BlockdevNbd) -> None:
        self._check_name(name)
        await self._check_peer(options)
        self._check_none()
        self._replica.give(Names(name, None, nested=False))

    async def _add_filter(self, name: str, options: schema.BlockdevReplication) -> None:
        remote, nested = await self._below(options.file)
        if name == remote:
            raise Error(Kind.CONFLICT, f"Duplicate nodes with node-name='{name}'")
        self._check_name(name)
        if options.mode == "secondary":
            if options.top_id is UNSET:
                raise Error(Kind.BAD_REQUEST, "Missing the option top-id")
            raise Error(
                Kind.UNSUPPORTED,
                f"{self._host} is the primary of {self._graph.lun}, as {self._resource.path} says; "
                "the secondary's chain is there too",
            )
        if options.top_id is not UNSET:
            raise Error(Kind.BAD_REQUEST, "The primary side does not support option top-id")
        names = self._replica.names
        if nested or names is None or names.filter is not None or self._replica.attached:
            self._check_none()
        self._replica.give(Names(remote, name, nested))

    async def _below(self, file: str | schema.BlockdevNbd) -> tuple[str, bool]:
        """The name of the filter's connection, and whether it is made together with the filter."""
        if isinstance(file, schema.BlockdevNbd):
            if file.node_name is not UNSET:
                self._check_name(file.node_name)
            await self._check_peer(file)
            # As QEMU's own names: no name that a controller gives begins so.
            return "#remote" if file.node_name is UNSET else file.node_name, True
        self._graph.find(file)
        names = self._replica.names
        if names is None or file != names.remote:
            raise Error(
                Kind.UNSUPPORTED,
                f"'{file}' is no connection to the secondary; add one first, with the driver nbd",
            )
        return file, False

    def _check_name(self, name: str) -> None:
        if not WELL_FORMED.match(name):
            raise Error(Kind.BAD_REQUEST, f"Invalid node-name: '{name}'")
        if name in self._graph.devices():
            raise Error(Kind.CONFLICT, f"node-name={name} is conflicting with a device id")
        if name in self._graph.nodes():
            raise Error(Kind.CONFLICT, f"Duplicate nodes with node-name='{name}'")
        if len(name) > _MAX_NAME:
            raise Error(Kind.BAD_REQUEST, "Node name too long")

    def _check_none(self) -> None:
        names = self._replica.names
        if names is not None:
            raise Error(
                Kind.CONFLICT,
                f"{self._graph.lun} has one replica, which is there as '{names.root}'; x-blockdev-change takes it "
                "out, and blockdev-del forgets it",
            )

    async def _check_peer(self, options: schema.BlockdevNbd) -> None:
        """Is it the configured secondary? Raises `Error(BAD_CONFIG)` if not."""
        name, theirs = self._resource.peer(self._host)
        link = self._resource.link
        exports = [self._graph.lun]
        if not theirs.qemu:
            exports.append(self._graph.disk)  # so our secondary calls it, where QEMU's scripts name it
        server = options.server
        if isinstance(server, schema.UnixServer):
            same = server.path == link.socket
        elif link.socket is None:
            same = server.port == str(link.port) and theirs.address in await _known(server.host)
        else:
            same = False
        where = f"{theirs.address} port {link.port}" if link.socket is None else link.socket
        if not same or options.export not in exports:
            choice = " or ".join(exports)
            self._refuse(f"the secondary is {name}, export {choice} at {where}")
        if options.tls_creds is not UNSET and self._resource.tls is None:
            raise Error(
                Kind.NOT_FOUND,
                f"No TLS credentials with id '{options.tls_creds}': {self._resource.path} has no [tls]",
            )
        if options.reconnect_delay is not UNSET and options.reconnect_delay != link.reconnect_delay:
            self._refuse(f"reconnect-delay is {link.reconnect_delay:g}")

    def _refuse(self, truth: str) -> NoReturn:
        raise Error(
            Kind.BAD_CONFIG,
            f"{self._resource.path} says: {truth}. Say the same, or change the file on both hosts and restart the "
            "workers",
        )

    # --- the others

    async def _delete(self, arguments: schema.BlockdevDel, session: Session) -> None:
        self.delete(arguments.node_name)

    def delete(self, name: str) -> None:
        """blockdev-del. Raises `Error` in QEMU's words."""
        graph, names = self._graph, self._replica.names
        node = graph.nodes().get(name)
        if node is None:
            raise Error(Kind.NOT_FOUND, f"Failed to find node with node-name='{name}'")
        if node in graph.devices().values():
            raise Error(Kind.CONFLICT, f"Node {name} is in use")
        if (
            names is None
            or name not in (names.remote, names.filter)
            or (names.nested and name == names.remote)
        ):
            raise Error(Kind.CONFLICT, f"Node {name} is not owned by the monitor")
        if self._replica.attached or name != names.root:
            raise Error(Kind.CONFLICT, f"Block device {name} is in use")
        if name == names.filter and not names.nested:
            self._replica.give(Names(names.remote, None, nested=False))
        else:
            self._replica.forget()

    async def _yank(self, arguments: schema.Yank, session: Session) -> None:
        known = await self._query_yank(Nothing(), session)
        for instance in arguments.instances:
            if instance not in known:
                raise ClassError(NO_DEVICE, Kind.NOT_FOUND, "Instance not found")
        if arguments.instances:
            self._replica.cut()

    async def _query_yank(self, arguments: Nothing, session: Session) -> list[schema.YankInstance]:
        names = self._replica.names
        return [] if names is None else [schema.YankBlockNode(node_name=names.remote)]


async def _known(host: str) -> list[str]:
    """The addresses that a host's name has, if any."""
    try:
        return await addresses(host)
    except Error:
        return []
