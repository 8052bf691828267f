"""QEMU's side of one end of a resource: every command of a controller's, and the events made of what happens here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from tcmu_replication.block.file import File
from tcmu_replication.block.mirror import Failure
from tcmu_replication.block.remote import Remote
from tcmu_replication.control.server import Emit, Handler
from tcmu_replication.daemon.config import Resource
from tcmu_replication.frontend.link_server import LinkServer
from tcmu_replication.qemu.block_schema import QuorumFailure, QuorumReportBad
from tcmu_replication.qemu.blockdev import Blockdev
from tcmu_replication.qemu.exports import Exports
from tcmu_replication.qemu.graph import Graph
from tcmu_replication.qemu.human import Human
from tcmu_replication.qemu.jobs import Jobs
from tcmu_replication.qemu.replica import NamedReplica
from tcmu_replication.qemu.view import Replica
from tcmu_replication.tls import Context

_SECTOR = 512
_OPERATION: dict[str, Literal["read", "write", "flush"]] = {"read": "read", "flush": "flush"}
"""QEMU's name for what failed; the rest are writes."""


class Controller:
    """For `host`'s end of a resource: the `replica` over its `disk`. `emit` sends an event.

    `tls` makes the context for an NBD server that a controller starts, None where there is no TLS.
    A primary has `connect`, which makes a connection to the secondary that is not yet open; a
    secondary has `own`, its server for its primary. `jobs` and `exports` want to hear what changes.
    """

    def __init__(
        self,
        resource: Resource,
        host: str,
        replica: Replica,
        disk: File,
        emit: Emit,
        tls: Callable[[], Context | None],
        *,
        connect: Callable[[], Remote] | None = None,
        own: LinkServer | None = None,
    ) -> None:
        self._disk = disk
        self._emit = emit
        self._lun = resource.name
        self._named = NamedReplica(replica, connect)
        graph = Graph(replica, disk, self._named)
        blockdev = Blockdev(resource, host, graph, self._named)
        self.jobs = Jobs(replica, emit)
        self.exports = Exports(replica, disk, graph, emit, tls, own)
        self.commands: dict[str, Handler] = (
            graph.commands
            | self.jobs.commands
            | self.exports.commands
            | blockdev.commands
            | Human(blockdev).commands
        )

    def failed(self, failure: Failure) -> None:
        """A child of the primary's mirror failed: tell in sectors of 512 bytes."""
        start = failure.offset // _SECTOR
        count = (failure.offset + failure.length + _SECTOR - 1) // _SECTOR - start
        bad = QuorumReportBad(
            type=_OPERATION.get(failure.operation, "write"),
            error=str(failure.error),
            node_name=self._child(failure.child),
            sector_num=start,
            sectors_count=count,
        )
        self._emit("QUORUM_REPORT_BAD", bad)
        if failure.final:
            lost = QuorumFailure(reference=self._lun, sector_num=start, sectors_count=count)
            self._emit("QUORUM_FAILURE", lost)

    def _child(self, name: str) -> str:
        """The node-name of the mirror's child that we call `name`."""
        if name == self._disk.name:
            return "disk"
        names = self._named.names
        return name if names is None else names.root
