"""What every role of a secondary has: the filter, and what the failure of its disk means."""

from __future__ import annotations

import logging

from tcmu_replication.block.replication import Filter
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.role import Role, StartOptions
from tcmu_replication.replication.stages import Operation, Stage

log = logging.getLogger(__name__)


class SecondaryRole(Role):
    """The base of a secondary's roles."""

    @property
    def node(self) -> Filter:
        """The filter."""
        return self.replica.receiver.filter

    def take(self) -> None:
        """See `Role.take`."""
        self.replica.receiver.route()

    async def start(self, operation: Operation, options: StartOptions) -> bool:
        """See `Role.start`."""
        if operation is Operation.START_AGAIN and self.record.stage in (Stage.NONE, Stage.DONE):
            self._refuse_to_discard(options)
        return await super().start(operation, options)

    def _refuse_to_discard(self, options: StartOptions) -> None:
        """Raise `Error` if data that somebody wrote to this host's LUN would be overwritten by the primary's."""
        if options.discard:
            return
        manifest = self.record.manifest
        user = self.replica.receiver.in_use()
        if user is not None and self.record.stage is Stage.DONE:  # before it shows no data
            raise Error(
                Kind.CONFLICT,
                f"the LUN of {self.name} is in use here ({user}): what is written to it would be lost. Stop its "
                "initiators and remove its exports first; or give up what they write: --discard-my-data",
            )
        if manifest.written_alone:
            since = f" since its promotion at {manifest.promoted_at}" if manifest.promoted_at else ""
            raise Error(
                Kind.CONFLICT,
                f"the LUN of {self.name} was written on this host{since}, while nothing was replicated: as a "
                "secondary it would be overwritten with the primary's data. If this host's data is the one that "
                "counts, it has to become the primary: docs/status.md, After a failover. To give it up: "
                "--discard-my-data",
            )
        if options.assume_clean and manifest.promoted_at:
            raise Error(
                Kind.MISCOMPARE,
                f"this host was promoted at {manifest.promoted_at}, so its disk is not known to be equal to the "
                "other's. Start without --assume-clean; the primary compares the disks",
            )

    def disk_lost(self, error: Error) -> None:
        """A sync of the disk failed: acknowledged writes may be on no medium."""
        reason = f"this host's disk could not make writes durable: {error}. Forwarded writes may be lost here"
        manifest = self.record.manifest
        changes: dict[str, object] = {"disk_error": manifest.disk_error or reason}
        if (
            not self.replica.receiver.durable
        ):  # else each block that may be lost was saved before it was overwritten
            changes["suspect"] = manifest.suspect or reason
        self.lost(reason, **changes)

    def overlay_lost(self, error: Error) -> None:
        """A sync of an overlay failed: the checkpoint and own writes may be on no medium."""
        reason = f"an overlay could not be made durable: {error}"
        self.lost(reason, suspect=self.record.manifest.suspect or reason)

    def lost(self, reason: str, **changes: object) -> None:
        """Write it down at once, and let the primary hear of it: it connects anew, and asks."""
        self.record.note(reason)
        log.critical("%s: %s", self.name, reason)
        self.record.write_down(**changes)
        self.replica.stage_changed()
        self.replica.receiver.cut()
