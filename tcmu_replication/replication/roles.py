"""Which role a host has: the role of each stage, and the first one after an open."""

from __future__ import annotations

from tcmu_replication.block import boot
from tcmu_replication.replication.alone import AlonePrimary, AloneSecondary
from tcmu_replication.replication.following import Following
from tcmu_replication.replication.forwarding import Forwarding
from tcmu_replication.replication.primary import Superseded
from tcmu_replication.replication.promoting import Promoting
from tcmu_replication.replication.replica import Replica
from tcmu_replication.replication.role import Role
from tcmu_replication.replication.stages import Mode, Stage
from tcmu_replication.replication.waiting import AfterCrash, WithoutRecord

TABLE: dict[tuple[Mode, Stage], type[Role]] = {
    (Mode.PRIMARY, Stage.NONE): AlonePrimary,
    (Mode.PRIMARY, Stage.RUNNING): Forwarding,
    (Mode.PRIMARY, Stage.DONE): AlonePrimary,
    (Mode.SECONDARY, Stage.NONE): AloneSecondary,
    (Mode.SECONDARY, Stage.RUNNING): Following,
    (Mode.SECONDARY, Stage.FAILOVER): Promoting,
    (Mode.SECONDARY, Stage.FAILOVER_FAILED): Promoting,
    (Mode.SECONDARY, Stage.DONE): AloneSecondary,
}
"""What the table of stages is carried out by."""


def of(replica: Replica, stage: Stage) -> Role:
    """A new role for `replica`, that of `stage`."""
    return TABLE[replica.mode, stage](replica)


def first(replica: Replica, *, known: bool) -> Role:
    """The role at the open of a host that has a record (`known`), or none.

    A primary that must not serve on the strength of its own record asks first.
    """
    if replica.mode is Mode.SECONDARY:
        return of(replica, replica.stage)
    found, sender = replica.manifest, replica.sender
    if not known:
        return of(replica, Stage.NONE) if sender.pulse is None else WithoutRecord(replica)
    if found.superseded_at:
        return Superseded(replica)
    if replica.stage is not Stage.RUNNING or sender.pulse is None or not sender.wait_after_crash:
        return of(replica, replica.stage)
    # In another boot the peer may have been promoted for as long as this host was down.
    return of(replica, replica.stage) if found.boot == boot.boot_id() else AfterCrash(replica)
