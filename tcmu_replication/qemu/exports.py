"""QEMU's exports: an NBD server that a controller starts and fills over QMP.

It is one beside the resource's own, or on a secondary that one, if it is
started where that listens (frontend/link_server.py).

What can be exported is in exportable.py. Exports last as long as the
worker, as in QEMU; but those that write to a secondary's disk end when
forwarded writes end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import UNSET

from tcmu_replication.block.file import File
from tcmu_replication.block.node import Node
from tcmu_replication.control.command import Nothing
from tcmu_replication.control.server import Emit, Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.link_server import LinkServer
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.qemu import block_schema as schema
from tcmu_replication.qemu.address import leads_to, listening
from tcmu_replication.qemu.exportable import Exportable
from tcmu_replication.qemu.graph import WELL_FORMED, Graph
from tcmu_replication.qemu.view import Replica
from tcmu_replication.tls import Context


class Exports:
    """The commands of exports. `tls` makes the context for a TCP server, None where there is no TLS.

    `own` is the secondary's server for its primary.
    """

    def __init__(
        self,
        replica: Replica,
        disk: File,
        graph: Graph,
        emit: Emit,
        tls: Callable[[], Context | None],
        own: LinkServer | None,
    ) -> None:
        self._graph = graph
        self._emit = emit
        self._tls = tls
        self._own = own
        self._exportable = Exportable(replica, disk, graph)
        self._server: Server | None = None
        self._starting = asyncio.Lock()  # looks names up, which a failover must not wait for
        self._changing = asyncio.Lock()
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

    # --- what the secondary says

    async def publish(self, forwarded: Node) -> None:
        """Forwarded writes are taken: who writes to the device writes there from now on."""
        # Not in turn: the LUN is held meanwhile, and an export that ends may wait for its requests.
        await self._exportable.point(forwarded)

    async def withdraw(self) -> None:
        """No forwarded write after this: the device's exports end."""
        device = self._exportable.device
        async with self._changing:
            for id in [id for id, (export, _) in self._exports.items() if export.node is device]:
                await self._end(id)
            await self._exportable.point(None)

    async def close(self) -> None:
        """End the server and all exports."""
        async with self._changing:
            await self._end_all()

    async def _end_all(self) -> None:
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
        if own is not None and await leads_to(arguments.addr, own.place):
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
        async with self._changing:
            if self._server is None:
                raise Error(Kind.INVALID_STATE, "NBD server not running")
            await self._end_all()

    async def _nbd_add(self, arguments: schema.NbdServerAdd, session: Session) -> None:
        """QEMU adds what cannot be written read-only, without a word."""
        node = self._graph.find(arguments.device)
        name = arguments.device if arguments.name is UNSET else arguments.name
        writable = arguments.writable and not node.read_only
        if arguments.bitmap is not UNSET:
            raise Error(Kind.NOT_FOUND, f"Bitmap '{arguments.bitmap}' is not found")
        await self._export(name, arguments.device, name, arguments.description, writable)

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
        await self._export(arguments.id, arguments.node_name, name, arguments.description, arguments.writable)

    async def _export(self, id: str, what: str, name: str, description: object, writable: bool) -> None:
        async with self._changing:
            if id in self._exports:
                raise Error(Kind.CONFLICT, f"Block export id '{id}' is already in use")
            node, node_name = self._exportable.choose(what, writable)
            if self._server is None:
                raise Error(Kind.INVALID_STATE, "NBD server not running")
            own = self._own
            reserved = own is not None and own.server is self._server and own.name == name
            forwards = writable and node is self._exportable.device
            # A primary of ours writes to what has this name, so nothing else may have it.
            if name in self._server.exports or (reserved and not forwards):
                raise Error(Kind.CONFLICT, f"NBD server already has export named '{name}'")
            export = Export(
                name,
                node,
                description if isinstance(description, str) else "",
                read_only=not writable,
                exclusive=forwards,
            )
            self._server.add(export)
            self._exports[id] = export, node_name

    async def _nbd_remove(self, arguments: schema.NbdServerRemove, session: Session) -> None:
        await self._delete_export(arguments.name, arguments.mode)

    async def _delete(self, arguments: schema.BlockExportDel, session: Session) -> None:
        await self._delete_export(arguments.id, arguments.mode)

    async def _delete_export(self, id: str, mode: str) -> None:
        async with self._changing:
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
            schema.BlockExportInfo(
                id=id, type="nbd", node_name=self._exportable.now(export.node, name), shutting_down=False
            )
            for id, (export, name) in self._exports.items()
        ]
