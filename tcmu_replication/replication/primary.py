"""What every role of a primary has: the mirror, and what the failure of its disk means."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.replication import NotReady
from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.replication.peer_state import News, PeerState
from tcmu_replication.replication.record import LONGEST
from tcmu_replication.replication.role import Role, StartOptions
from tcmu_replication.replication.stages import Operation

if TYPE_CHECKING:
    from tcmu_replication.replication.replica import Replica

log = logging.getLogger(__name__)


class PrimaryRole(Role):
    """The base of a primary's roles."""

    @property
    def node(self) -> Mirror | NotReady:
        """The mirror; what is not ready serves another one."""
        return self.replica.sender.mirror

    def disk_lost(self, error: Error) -> None:
        """A sync of the disk failed: what was written since the last one may be on no medium here."""
        reason = one_line(
            f"this host's disk could not make writes durable: {error}. What was written since the flush before may be "
            "lost here",
            LONGEST,
        )
        self.record.note(reason)
        log.critical("%s: %s", self.name, reason)
        self.record.write_down(disk_error=self.record.manifest.disk_error or reason)
        self.replica.stage_changed()

    def child_failed(self, failure: Failure) -> None:
        """A child of the mirror failed."""
        sender = self.replica.sender
        mine = failure.child == self.replica.disk.name
        if mine and failure.operation == "flush" and self.record.error is None:
            self.disk_lost(failure.error)
        log.error(
            "%s: %s failed to %s at %d, %d bytes: %s",
            self.name,
            failure.child,
            failure.operation,
            failure.offset,
            failure.length,
            failure.error,
        )
        sender.failed(failure)

    # --- the peer

    def news(self) -> News:
        """What the secondary is to know, of a primary that does not forward."""
        return News(disk_error=self.record.manifest.disk_error or "")

    def is_promoted(self, state: PeerState) -> bool:
        """Whether the peer was promoted in this pairing."""
        return bool(state.promoted_at) and state.generation == self.record.manifest.generation

    def supersede(self, state: PeerState) -> Error:
        """The peer was promoted: acknowledge nothing any more, and write down why. Why, as an error."""
        at, alone_since = state.promoted_at, self.record.manifest.outdated_at
        reason = superseded(self.replica.peer_name, self.name, at, alone_since)
        if not self.record.manifest.superseded_at:
            log.critical("%s: %s", self.name, reason)
            self.record.machine.forget_error()
            self.record.note(reason)
            self.record.moved(Operation.SUPERSEDED, superseded_at=at)
            role = Superseded(self.replica)
            self.replica.sender.refuse(role.refusal)
            self.replica.later(self._step_down(role))
        return Error(Kind.CONFLICT, reason)

    async def _step_down(self, role: Superseded) -> None:
        self.replica.sender.cut()  # what is under way there will not end otherwise
        await self.replica.become(role)
        self.replica.sender.mirror.remove()
        self.replica.stage_changed()


class Superseded(PrimaryRole):
    """The peer was promoted: the LUN is there and not ready, for good."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        reason = superseded(
            replica.peer_name, self.name, self.record.manifest.superseded_at, self.record.manifest.outdated_at
        )
        self._node = NotReady(replica.sender.mirror, reason)

    @property
    def node(self) -> NotReady:
        """Not ready."""
        return self._node

    @property
    def refusal(self) -> Error:
        """Why nothing is acknowledged."""
        assert self._node.not_ready is not None
        return self._node.not_ready

    async def start(self, operation: Operation, options: StartOptions) -> bool:
        """See `Role.start`: only by force."""
        if not options.force:
            raise Error(Kind.INVALID_STATE, str(self.refusal))
        return await super().start(operation, options)


def superseded(peer: str, name: str, at: str, alone_since: str) -> str:
    """That `peer` was promoted, what it means and what to do. `alone_since`: when this host went on alone, or ""."""
    only_here = (
        f" What this host acknowledged since {alone_since}, when it went on alone, is on no other disk: save it before "
        "this one is overwritten."
        if alone_since
        else ""
    )
    return (
        f"{peer} was promoted at {at}: this host's disk is old from then on and is not served. Use "
        f"{peer}.{only_here} Only to give up what was written there, and go on with this host's disk: "
        f"tcmu-replication start {name} --force"
    )
