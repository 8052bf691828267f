"""A host whose LUN serves its disk by itself, replicated by nothing: before a start, and after the end.

The first write is noted, so that nobody vouches for equal disks later. A secondary that was never
started has no data to show.
"""

from __future__ import annotations

import logging

from tcmu_replication.replication.primary import PrimaryRole
from tcmu_replication.replication.record import Record
from tcmu_replication.replication.secondary import SecondaryRole
from tcmu_replication.replication.stages import Stage

log = logging.getLogger(__name__)


class AlonePrimary(PrimaryRole):
    """A primary in stage `none` or `done`."""

    def take(self) -> None:
        """See `Role.take`."""
        self.replica.sender.mirror.alone = self._written

    def _written(self) -> None:
        """The first write to the LUN."""
        if _noted(self.record):
            self.replica.sender.mirror.alone = None


class AloneSecondary(SecondaryRole):
    """A secondary in stage `none` or `done`."""

    def take(self) -> None:
        """See `Role.take`."""
        super().take()
        if self.record.stage is Stage.DONE:
            self.replica.receiver.filter.alone = self._written

    def _written(self) -> None:
        """The first write to the LUN."""
        if _noted(self.record):
            self.replica.receiver.filter.alone = None


def _noted(record: Record) -> bool:
    """Write down that the LUN was written; whether that is on stable storage."""
    return (record.manifest.written_alone and not record.unwritten) or record.write_down(written_alone=True)
