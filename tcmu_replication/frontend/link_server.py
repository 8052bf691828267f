"""The secondary's NBD server for its primary, at the place that the resource file says.

It has one export of its own, named as the resource, while writes are forwarded;
that name may also be given to the same thing by a controller, before that.
A controller that starts a server at this place takes this one over: what it
exports is there too, and when it stops the server nothing of it is left, not
even the resource's own export, until it, or replication, is started again.
"""

from __future__ import annotations

from tcmu_replication.block.node import Node
from tcmu_replication.frontend.nbd import Export, Server
from tcmu_replication.nbd.uri import Address, Unix


class LinkServer:
    """`server` serves the resource `name` at `place`, the secondary's own."""

    def __init__(self, name: str, place: Address, server: Server) -> None:
        self.name = name
        self.place = place
        self.server = server
        self._forwarded: Node | None = None

    async def listen(self) -> None:
        """Raises `Error`."""
        if isinstance(self.place, Unix):
            await self.server.listen_unix(self.place.path)
        else:
            await self.server.listen_tcp(self.place.host, self.place.port)

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
