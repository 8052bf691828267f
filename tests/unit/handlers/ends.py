"""The two ends of disk0 in this process, for tests of what their control sockets answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from tcmu_replication.block.pending import settle
from tcmu_replication.control import schema
from tcmu_replication.control.command import Document, Privilege
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.daemon import handler
from tcmu_replication.daemon.places import Context
from tcmu_replication.qemu import colo, tables
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK, MiB

SIZE = 2 * MiB
SESSION = Session({}, (), Privilege.OPERATOR, "test")


class End:
    """One end of disk0, without a control socket of its own for operators; `events` is what it told."""

    def __init__(self, base: Path, host: str) -> None:
        self.directory = base / host
        (self.directory / "overlays").mkdir(parents=True)
        (self.directory / "disk.img").write_bytes(bytes(SIZE))
        self.context = Context(base, base / "run", host)
        self.events: list[tuple[str, Document]] = []
        self.changed = asyncio.Event()

    async def open(self) -> None:
        self.backstore: Any = await handler.load("replication").open("disk0", self.context)
        control = Server(self.backstore.commands, self.backstore.table)
        self._control = control
        mine = self.backstore.commands | {"query-status": self._query_status}
        self.handlers = mine | colo.names(mine, self._emit)
        control.emit = self._emit  # type: ignore[method-assign]
        await self.backstore.listen(control)

    async def _query_status(self, arguments: Document, session: Session) -> schema.Status:
        """The worker's, which has no more to say here."""
        return self.backstore.status([], None)  # type: ignore[no-any-return]

    def _emit(self, name: str, data: Document) -> None:
        assert isinstance(data, tables.EVENTS[name])
        self.events.append((name, data))
        self.changed.set()

    async def close(self) -> None:
        await self.backstore.close()
        await self._control.close()

    async def ask(self, command: str, /, **arguments: Any) -> Any:
        """As over a control socket: `_` in argument names stands for `-`, the answer is JSON's."""
        row = self.backstore.table[command]
        given = row.decode({name.replace("_", "-"): value for name, value in arguments.items()})
        return row.encode(await self.backstore.commands[command](given, SESSION))

    async def until(self, stage: Stage) -> None:
        while self.backstore.engine.stage is not stage:
            self.changed.clear()
            await self.changed.wait()

    async def write(self, offset: int, byte: int) -> None:
        pending = self.backstore.top.write(offset, [memoryview(bytes([byte]) * BLOCK)])
        self.backstore.top.unplug()
        await settle(pending)

    def told(self, *names: str) -> list[Any]:
        """The events of these names, as they travel."""
        return [msgspec.to_builtins(data) for name, data in self.events if name in names]

    @property
    def disk(self) -> bytes:
        return (self.directory / "disk.img").read_bytes()


Story = Callable[[End, End], Awaitable[None]]
