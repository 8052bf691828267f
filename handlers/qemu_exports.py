"""QEMU's exports: an NBD server that a controller starts and fills over QMP.

It is one beside the resource's own, or on a secondary that one, if it is
started where that listens (link_server.py).

What can be exported, by QEMU's rules and in its words:

    NAME, top, replication      the LUN
    NAME-disk                   the disk; on a running secondary with pre-images saved before it is
                                written, so this is what a primary connects to. It may be exported
                                before replication starts, and ends when forwarded writes end
    disk                        the disk, to be read: somebody else writes to it

They last as long as the worker, as in QEMU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import UNSET

from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import settle
from tcmu_replication.control import qemu_block_schema as schema
from tcmu_replication.control.command import Document, Nothing
from tcmu_replication.control.server import Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.replication.primary import Primary
from tcmu_replication.replication.secondary import Secondary
from tcmu_replication.replication.stages import Stage
from tcmu_replication.tls import Context

from .link_server import LinkServer
from .qemu_address import listening
from .qemu_graph import WELL_FORMED, Graph

Emit = Callable[[str, Document], None]


class Device(Node):
    """The disk as a device: `to` is the disk, or on a running secondary what saves pre-images first."""

    def __init__(self, disk: Node) -> None:
        super().__init__("device", disk.length, read_only=disk.read_only)
        self.to = disk

    @property
    def child(self) -> Node:
        return self.to

    @property
    def children(self) -> tuple[Node, ...]:
        return (self.to,)


class Exports:
    """The commands of exports. `tls` makes the context for a TCP server, None where there is no TLS.

    `own` is the secondary's server for its primary.
    """

    def __init__(
        self,
        engine: Primary | Secondary,
        disk: File,
        graph: Graph,
        emit: Emit,
        tls: Callable[[], Context | None],
        own: LinkServer | None,
    ) -> None:
        self._engine = engine
        self._graph = graph
        self._emit = emit
        self._tls = tls
        self._own = own
        self._reader = Gate(disk)
        self._switch = Device(disk)
        self._device = Gate(self._switch)
        self._server: Server | None = None
        self._starting = asyncio.Lock()
        self._exports: dict[str, tuple[Export, str]] = {}
        self.commands: dict[str, Handler] = {
            "nbd-server-start": self._start,
            "nbd-server-stop": self._stop,
            "nbd-server-add": self._nbd_add,
            "nbd-server-remove": self._nbd_remove,
            "block-export-add": self._add,
            "block-export-del": self._delete,
            "query-block-exports": self._query,
        }

    # --- what the secondary's engine says

    async def publish(self, forwarded: Node) -> None:
        """Forwarded writes are taken: who writes to the device writes there from now on."""
        await self._point(forwarded)

    async def withdraw(self) -> None:
        """No forwarded write after this: the device's exports end."""
        for id in [id for id, (export, _) in self._exports.items() if export.node is self._device]:
            await self._end(id)
        await self._point(self._reader.child)

    async def _point(self, node: Node) -> None:
        self._device.hold()
        try:
            self._device.unplug()
            await settle(self._device.drained())
            self._switch.to = node
        finally:
            self._device.release()

    async def close(self) -> None:
        """End the server and all exports."""
        for id in list(self._exports):
            await self._end(id)
        server, self._server = self._server, None
        if self._own is not None and server is self._own.server:
            await self._own.shut()
        elif server is not None:
            await server.close()

    # --- commands

    async def _start(self, arguments: schema.NbdServerStart, session: Session) -> None:
        async with self._starting:
            if self._server is not None:
                raise Error(Kind.CONFLICT, "NBD server already running")
            self._server = await self._started(arguments)

    async def _started(self, arguments: schema.NbdServerStart) -> Server:
        tls = self._context(arguments)
        own = self._own
        if own is not None and await own.is_at(arguments.addr):
            own.open()
            return own.server
        # QEMU: 0 is no limit
        limit = arguments.max_connections or (1 << 32)
        return await listening(lambda: Server(tls=tls, max_connections=limit), arguments.addr)

    def _context(self, arguments: schema.NbdServerStart) -> Context | None:
        """The TLS that a server gets: what the resource file says, under whatever id. Raises `Error`."""
        creds = arguments.tls_creds
        wanted = creds is not UNSET or isinstance(arguments.addr, schema.Inet)
        tls = self._tls() if wanted else None
        if tls is None and creds is not UNSET:
            raise Error(
                Kind.NOT_FOUND, f"No TLS credentials with id '{creds}': the resource file has no [tls]"
            )
        if arguments.tls_authz is not UNSET and (tls is None or self._own is None):
            raise Error(
                Kind.UNSUPPORTED,
                "tls-authz is not understood here: only on a secondary with [tls] certificates say who may "
                "connect, and there it is the primary alone",
            )
        return tls

    async def _stop(self, arguments: Nothing, session: Session) -> None:
        if self._server is None:
            raise Error(Kind.INVALID_STATE, "NBD server not running")
        await self.close()

    async def _nbd_add(self, arguments: schema.NbdServerAdd, session: Session) -> None:
        """QEMU adds what cannot be written read-only, without a word."""
        node = self._graph.find(arguments.device)
        name = arguments.device if arguments.name is UNSET else arguments.name
        writable = arguments.writable and not node.read_only
        if arguments.bitmap is not UNSET:
            raise Error(Kind.NOT_FOUND, f"Bitmap '{arguments.bitmap}' is not found")
        self._export(name, arguments.device, name, arguments.description, writable)

    async def _add(self, arguments: schema.BlockExportAdd, session: Session) -> None:
        if not WELL_FORMED.match(arguments.id):
            raise Error(Kind.BAD_REQUEST, "Invalid block export id")
        if arguments.id in self._exports:
            raise Error(Kind.CONFLICT, f"Block export id '{arguments.id}' is already in use")
        node = self._graph.nodes().get(arguments.node_name)
        if node is None:
            raise Error(Kind.NOT_FOUND, f"Cannot find device='' nor node-name='{arguments.node_name}'")
        if arguments.writable and node.read_only:
            raise Error(Kind.READ_ONLY, "Cannot export read-only node as writable")
        name = arguments.node_name if arguments.name is UNSET else arguments.name
        self._export(arguments.id, arguments.node_name, name, arguments.description, arguments.writable)

    def _export(self, id: str, what: str, name: str, description: object, writable: bool) -> None:
        if id in self._exports:
            raise Error(Kind.CONFLICT, f"Block export id '{id}' is already in use")
        node, node_name = self._choose(what, writable)
        if self._server is None:
            raise Error(Kind.INVALID_STATE, "NBD server not running")
        own = self._own
        reserved = own is not None and own.server is self._server and own.name == name
        # A primary of ours writes to what has this name, so nothing else may have it.
        if name in self._server.exports or (reserved and not (writable and node is self._device)):
            raise Error(Kind.CONFLICT, f"NBD server already has export named '{name}'")
        export = Export(
            name,
            node,
            description if isinstance(description, str) else "",
            read_only=not writable,
            exclusive=writable and node is self._device,
        )
        self._server.add(export)
        self._exports[id] = export, node_name

    def _choose(self, what: str, writable: bool) -> tuple[Gate, str]:
        """The gate behind a device's or node's name, and the name of the node. Raises `Error`."""
        graph = self._graph
        if what in (graph.lun, "top", "replication"):
            return self._engine.top, "top" if isinstance(self._engine, Primary) else "replication"
        if what == graph.disk:
            if writable:
                self._check_writable()
            return self._device, "disk" if self._switch.to is self._reader.child else "copy-before-write"
        if what == "disk":
            if writable:
                raise _conflict("the LUN's chain")
            return self._reader, "disk"
        raise Error(
            Kind.UNSUPPORTED,
            f"node '{what}' is part of the chain and cannot be exported; {graph.lun}, {graph.disk} and disk can",
        )

    def _check_writable(self) -> None:
        """Only a secondary that shows no disk of its own, or saves pre-images, lets others write to it."""
        engine = self._engine
        if isinstance(engine, Secondary) and (engine.stage is Stage.NONE or engine.forwarded is not None):
            return
        raise _conflict("the LUN")

    async def _nbd_remove(self, arguments: schema.NbdServerRemove, session: Session) -> None:
        await self._delete_export(arguments.name, arguments.mode)

    async def _delete(self, arguments: schema.BlockExportDel, session: Session) -> None:
        await self._delete_export(arguments.id, arguments.mode)

    async def _delete_export(self, id: str, mode: str) -> None:
        if id not in self._exports:
            raise Error(Kind.NOT_FOUND, f"Export '{id}' is not found")
        assert self._server is not None
        if mode == "safe" and self._server.clients(self._exports[id][0].name):
            raise Error(Kind.CONFLICT, f"export '{id}' still in use")
        await self._end(id)

    async def _end(self, id: str) -> None:
        export, _ = self._exports.pop(id)
        assert self._server is not None
        await self._server.remove(export.name, hard=True)
        self._emit("BLOCK_EXPORT_DELETED", schema.BlockExportDeleted(id=id))

    async def _query(self, arguments: Nothing, session: Session) -> list[schema.BlockExportInfo]:
        return [
            schema.BlockExportInfo(id=id, type="nbd", node_name=self._now(export, node), shutting_down=False)
            for id, (export, node) in self._exports.items()
        ]

    def _now(self, export: Export, node: str) -> str:
        if export.node is not self._device:
            return node
        return "disk" if self._switch.to is self._reader.child else "copy-before-write"


def _conflict(by: str) -> Error:
    return Error(
        Kind.CONFLICT,
        "Permission conflict on node 'disk': permissions 'write' are both required by an export "
        f"(uses node 'disk' as 'root' child) and unshared by {by} (uses node 'disk' as 'file' child).",
    )
