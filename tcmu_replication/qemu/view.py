"""What QEMU's side sees of a replica: this, and no more of the engine."""

from __future__ import annotations

from typing import Protocol

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.remote import Remote
from tcmu_replication.jobs.job import Job
from tcmu_replication.replication.stages import Mode, Stage


class Replica(Protocol):
    """One host's part of a resource. What belongs to one mode is asked for in that mode only."""

    @property
    def name(self) -> str:
        """The resource's."""

    @property
    def mode(self) -> Mode:
        """Whether this host forwards or follows."""

    @property
    def stage(self) -> Stage:
        """Where replication is."""

    @property
    def top(self) -> Gate:
        """The gate of what is served."""

    @property
    def filter(self) -> Node | None:
        """QEMU's replication node: below a primary's mirror once it was started, on top of a secondary's chain."""

    @property
    def job(self) -> Job | None:
        """The commit of a failover, running or ended."""

    # --- a primary's

    @property
    def remote(self) -> Remote | None:
        """The connection to the secondary."""

    @property
    def removed(self) -> bool:
        """Whether the filter was taken out of the mirror while replication runs."""

    async def add_replica(self) -> None:
        """Put the filter back into the mirror. Raises `Error(INVALID_STATE)` if the secondary missed anything."""

    async def remove_replica(self) -> None:
        """Take the filter out of the mirror. Raises `Error(INVALID_STATE)`."""

    # --- a secondary's

    @property
    def forwarded(self) -> Node | None:
        """Where forwarded writes enter; None if none are taken."""

    async def cancel_commit(self) -> None:
        """End the commit before its time, as if it had failed. Raises `Error(INVALID_STATE)` if there is none."""

    async def backup_ended(self, reason: str) -> None:
        """No pre-images are saved any more, for this reason, so no forwarded write is taken either."""
