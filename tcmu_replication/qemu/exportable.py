"""What can be exported over QMP, by QEMU's rules and in its words:

    NAME, top, replication      the LUN
    NAME-disk                   the disk; on a running secondary with pre-images saved before it is
                                written, so this is what a primary connects to. It may be exported
                                before replication starts, and ends when forwarded writes end
    disk                        the disk, to be read: somebody else writes to it

What else the chain is made of cannot be exported.
"""

from __future__ import annotations

from tcmu_replication.block.file import File
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.replication import Closed, Filter
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.graph import Graph
from tcmu_replication.qemu.view import Replica
from tcmu_replication.replication.stages import Mode


class Exportable:
    """The gates behind one end's names. `device` is the one that forwarded writes may come through."""

    def __init__(self, replica: Replica, disk: File, graph: Graph) -> None:
        self._replica = replica
        self._disk = disk
        self._graph = graph
        self._reader = Gate(disk)
        self.device = Gate(disk)

    @property
    def forwards(self) -> bool:
        """Whether who writes to the device writes forwarded writes."""
        return self.device.child is not self._disk

    async def point(self, forwarded: Node | None) -> None:
        """Who uses the device uses this from now on; with None the disk itself."""
        async with self.device.quiet():
            self.device.swap(self._disk if forwarded is None else forwarded)

    def choose(self, what: str, writable: bool) -> tuple[Gate, str]:
        """The gate behind a device's or node's name, and the name of the node. Raises `Error`."""
        graph = self._graph
        if what in (graph.lun, "top", "replication"):
            return self._replica.top, "top" if self._replica.mode is Mode.PRIMARY else "replication"
        if what == graph.disk:
            if writable:
                self._check_writable()
            return self.device, "disk"
        if what == "disk":
            if writable:
                raise _conflict("the LUN's chain")
            return self._reader, "disk"
        raise Error(
            Kind.UNSUPPORTED,
            f"node '{what}' is part of the chain and cannot be exported; {graph.lun}, {graph.disk} and disk can",
        )

    def _check_writable(self) -> None:
        """Only a secondary whose LUN shows nothing yet, or that saves pre-images, lets others write to it.

        Not the stage says so: it changes behind a failover, and a start that fails takes its own back.
        """
        chain = self._replica.filter
        if isinstance(chain, Filter) and (isinstance(chain.writes, Closed) or self.forwards):
            return
        raise _conflict("the LUN")

    def now(self, node: Node, name: str) -> str:
        """The name now of an exported node that had this name: the device's changes."""
        return "copy-before-write" if node is self.device and self.forwards else name


def _conflict(by: str) -> Error:
    return Error(
        Kind.CONFLICT,
        "Permission conflict on node 'disk': permissions 'write' are both required by an export "
        f"(uses node 'disk' as 'root' child) and unshared by {by} (uses node 'disk' as 'file' child).",
    )
