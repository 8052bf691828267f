"""What a handler is: it turns the configuration string of a `user:SUBTYPE` backstore into a LUN.

A handler is a class named by an entry point of the group
`tcmu_replication.handlers`; the name of the entry point is the subtype. LIO's
`dev_config` is "SUBTYPE/CONFIG", and the handler gets CONFIG. handlers/file.py
is the smallest example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.offload import Offload
from tcmu_replication.control.schema import DEVICE_COMMANDS, EVENTS, Command, Document, Frontend
from tcmu_replication.control.server import Emit, Server
from tcmu_replication.control.server import Handler as CommandHandler
from tcmu_replication.daemon.places import Context
from tcmu_replication.errors import Error, Kind

__all__ = ["GROUP", "Backstore", "Context", "Handler", "load", "subtypes"]

GROUP = "tcmu_replication.handlers"


class Backstore:
    """An open LUN: `top` is the gate of what is served, `block_size` its logical block in bytes.

    Without a block size that of the kernel's backstore counts.
    `commands` are the bodies of control commands, rows of `table`; the worker
    adds query-status and quit where they are missing, and `names` puts others
    in their terms. `events` are those of the control socket. `serial` is the unit
    serial number for frontends that have no other. `offload` has the calls of
    its disks that may take long.
    """

    table: ClassVar[Mapping[str, Command]] = DEVICE_COMMANDS
    events: ClassVar[Mapping[str, type[Document]]] = EVENTS

    def __init__(
        self,
        top: Gate,
        block_size: int | None = None,
        commands: Mapping[str, CommandHandler] | None = None,
        serial: str | None = None,
        offload: Offload | None = None,
    ) -> None:
        self.top = top
        self.block_size = block_size
        self.commands = dict(commands or {})
        self.serial = serial
        self.offload = offload
        self.devices: Callable[[], str | None] = lambda: None
        """The worker's answer: which devices serve this LUN, in words, or None."""

    @staticmethod
    def names(handlers: Mapping[str, CommandHandler], emit: Emit) -> Mapping[str, CommandHandler]:
        """Commands in terms of the worker's; `emit` sends an event."""
        return {}

    async def listen(self, control: Server) -> None:
        """The control socket is there: listen where else requests and commands come from. Raises `Error`."""

    def status(self, frontends: list[Frontend], hangs: str | None) -> Document | None:
        """The answer to query-status; None lets the worker answer with a `DeviceStatus`.

        `hangs` is the call of a disk that has not returned, and for how long.
        """
        return None

    async def close(self) -> None:
        """End everything behind the LUN; the frontends have stopped by then. Twice is fine."""
        self.top.close()


class Handler(ABC):
    """One subtype. Instances hold no state: whatever is open belongs to the `Backstore`."""

    subtype: ClassVar[str]
    description: ClassVar[str]
    """What CONFIG is, for people; targetcli shows it."""

    @abstractmethod
    def check(self, config: str, context: Context) -> None:
        """Raise `Error` (BAD_CONFIG) if `config` cannot be right here. Opens and changes nothing."""

    @abstractmethod
    async def open(self, config: str, context: Context) -> Backstore:
        """Open the LUN. Raises `Error`, and then leaves nothing open."""


def subtypes() -> set[str]:
    """The subtypes that have a handler; none of them is imported."""
    from importlib.metadata import entry_points

    return {entry.name for entry in entry_points(group=GROUP)}


def load(subtype: str) -> Handler:
    """The handler of a subtype. Raises NOT_FOUND, or BAD_CONFIG if it cannot be imported."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=subtype):
        try:
            handler: Handler = entry.load()()
        except (ImportError, AttributeError) as error:
            raise Error(
                Kind.BAD_CONFIG, f"the handler {entry.value} of {subtype} is broken: {error}"
            ) from error
        return handler
    known = ", ".join(sorted(subtypes())) or "none"
    raise Error(Kind.NOT_FOUND, f"no handler for {subtype!r}; installed are: {known}")
