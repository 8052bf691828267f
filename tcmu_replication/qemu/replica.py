"""The node-names of a primary's replica, and whether a controller sees it as the quorum's child.

The replica is there without any controller, and the resource file says what it is. A controller
gives it names (blockdev-add), makes it the mirror's child and takes it out
(x-blockdev-change), and forgets the names (blockdev-del). Without it the names
are `replication` and `remote`, from start to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tcmu_replication.block.node import Node
from tcmu_replication.block.remote import Remote
from tcmu_replication.block.replication import Forward
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.view import Replica
from tcmu_replication.replication.stages import Mode, Stage


@dataclass
class Names:
    """`remote` is the connection's, `filter` the filter's above it, or None where the controller wants none.

    `nested`: both were made in one command, and go together.
    """

    remote: str
    filter: str | None
    nested: bool

    @property
    def root(self) -> str:
        """What the mirror's child is called."""
        return self.filter or self.remote


class NamedReplica:
    """One primary's; a secondary has none. `connect` makes a connection that is shown before there is one."""

    def __init__(self, replica: Replica, connect: Callable[[], Remote] | None) -> None:
        self._replica = replica
        self._connect = connect
        self._given: Names | None = None
        self._child = False
        self._forgotten: Node | None = None
        self._idle: Forward | None = None

    @property
    def names(self) -> Names | None:
        """What it is called now; None if it is not there."""
        if self._given is not None:
            return self._given
        running = self._running()
        if running is None or (running.removed and running.filter is self._forgotten):
            return None
        return Names("remote", "replication", nested=True)

    @property
    def attached(self) -> bool:
        """Whether it is the mirror's child."""
        if self._given is not None:
            return self._child
        running = self._running()
        return running is not None and not running.removed

    def root(self) -> Node | None:
        """The node that is, or would be, the mirror's child."""
        names, running = self.names, self._running()
        top = self._idle if running is None else running.filter
        if names is None or top is None:
            return None
        return top if names.filter is not None else top.children[0]

    def name(self, node: Node) -> str | None:
        """The name of one of its nodes; None for every other node."""
        names = self.names
        if names is None or not isinstance(node, Forward | Remote):
            return None
        return names.remote if isinstance(node, Remote) else names.filter

    def give(self, names: Names) -> None:
        """It is called so from now on."""
        assert self._connect is not None
        if self._given is None:
            self._child = False
            self._idle = Forward("replication", self._connect(), lambda *missed: True)
        self._given = names

    def forget(self) -> None:
        """It is not there any more; it must not be attached."""
        running = self._running()
        self._given = self._idle = None
        self._forgotten = None if running is None else running.filter

    async def attach(self) -> None:
        """Make it the mirror's child. Raises `Error(INVALID_STATE)` if the secondary may miss writes."""
        replica = self._replica
        if replica.stage is Stage.DONE:
            raise Error(
                Kind.INVALID_STATE,
                f"replication of {replica.name} has ended, and the disks differ since; copy this host's disk to the "
                f"secondary's and start both (tcmu-replication start {replica.name}, on the secondary first), which "
                "compares them: that attaches the replica",
            )
        running = self._running()
        if running is not None and running.removed:
            await running.add_replica()
        self._child = True

    async def detach(self) -> None:
        """Take it out of the mirror. Raises `Error(INVALID_STATE)`."""
        running = self._running()
        if running is not None:
            await running.remove_replica()
        self._child = False

    def cut(self) -> None:
        """Hang up on the secondary for good; what is under way fails at once."""
        running = self._running()
        if running is not None and running.remote is not None:
            running.remote.close()

    def _running(self) -> Replica | None:
        replica = self._replica
        forwards = replica.mode is Mode.PRIMARY and replica.stage is Stage.RUNNING
        return replica if forwards and replica.filter is not None else None
