"""The secondary's NBD server for its primary, at the place that the resource file says.

It has one export of its own, named as the resource, while writes are forwarded;
that name may also be given to the same thing by a controller, before that.
A controller that starts a server at this place takes this one over: what it
exports is there too, and when it stops the server nothing of it is left, not
even the resource's own export, until it, or replication, is started again.
"""

from __future__ import annotations

from tcmu_replication.block.node import Node
from tcmu_replication.control import qemu_block_schema as schema
from tcmu_replication.daemon.config import Link
from tcmu_replication.errors import Error
from tcmu_replication.frontend.nbd import Export, Server

from .qemu_address import addresses

_EVERY = {"", "0.0.0.0", "::"}


class LinkServer:
    """`server` serves the resource `name` at `address`, the secondary's own, as `link` says."""

    def __init__(self, name: str, address: str, link: Link, server: Server) -> None:
        self.name = name
        self.server = server
        self._address = address
        self._link = link
        self._forwarded: Node | None = None

    async def listen(self) -> None:
        """Raises `Error`."""
        if self._link.socket is None:
            await self.server.listen_tcp(self._address, self._link.port)
        else:
            await self.server.listen_unix(self._link.socket)

    def publish(self, forwarded: Node) -> None:
        """From now on the primary's writes go there."""
        self._forwarded = forwarded
        self.open()

    async def withdraw(self) -> None:
        """No write of the primary after this."""
        self._forwarded = None
        await self.shut()

    def open(self) -> None:
        """Offer the export, if there is one."""
        if self._forwarded is not None and self.name not in self.server.exports:
            self.server.add(Export(self.name, self._forwarded, "forwarded writes", exclusive=True))

    async def shut(self) -> None:
        """Offer it no longer, and hang up on the primary."""
        if self.name in self.server.exports:
            await self.server.remove(self.name, hard=True)

    async def is_at(self, addr: schema.Inet | schema.Unix) -> bool:
        """Whether a server at that address would be this one; every address of this host includes ours."""
        if isinstance(addr, schema.Unix):
            return addr.data.path == self._link.socket
        if self._link.socket is not None or addr.data.port != str(self._link.port):
            return False
        if addr.data.host in _EVERY:
            return True
        try:
            return self._address in await addresses(addr.data.host)
        except Error:
            return False
