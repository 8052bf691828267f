"""What a host does for its pair at one time, and how it came to do it.

    primary     Waiting -> Forwarding <-> Alone           waits for the peer's word; forwards; serves by itself
                Waiting, Forwarding -> Superseded         the peer was promoted
    secondary   Alone -> Following -> Promoting -> Alone  has no data to show; follows; fails over; serves by itself

The table of stages drives: an action of it is the method of that name of the role of
that stage (of the stage that it leads to, where the action begins something).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tcmu_replication.block.mirror import Failure
from tcmu_replication.block.node import Node
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.compare import Compare
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.replication.stages import Mode, Operation

if TYPE_CHECKING:
    from tcmu_replication.replication.peer_state import News
    from tcmu_replication.replication.replica import Replica


HOLD_S = 15.0
"""A checkpoint that cannot be made within this is given up, and the LUN goes on: initiators wait for 30 s."""


class StartOptions(NamedTuple):
    """How an operator, or a controller, wants a start.

    `mode` is what whoever asks believes this host to be. `compare`: both disks are compared as a
    whole, by hash, behind it; until then the pair is not in sync. `assume_clean`: whoever asks vouches
    that they are equal, which is refused where anything here says otherwise. `force`: this host's disk is
    the one that counts, although it waits for the peer's word, or was superseded. `discard`: what was
    written to this host's LUN since its promotion, or since replication ended, may be lost. `sync`: the
    secondary is made equal to this primary, whatever it has.
    """

    mode: Mode
    compare: bool = False
    assume_clean: bool = False
    force: bool = False
    discard: bool = False
    sync: bool = False


class Role:
    """The base: what no role does. Commands come one at a time, through the `replica`."""

    comparing: Compare | None = None
    resyncing: Resync | None = None
    heals: bool = False
    removed: bool = False
    forwards: bool = False

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.record = replica.record
        self.name = replica.name

    @property
    def node(self) -> Node:
        """What the LUN serves."""
        raise NotImplementedError

    def take(self) -> None:
        """In the moment of the change, while requests are held: what the first request must find done."""

    async def enter(self) -> None:
        """The replica has this role from now on: begin what goes on by itself."""

    async def leave(self) -> None:
        """Another role comes, or the process ends: end what goes on by itself. Twice is fine."""

    async def ended(self) -> None:
        """Wait for the end of what goes on by itself and has one, good or bad."""

    async def close(self, *, suspend: bool) -> None:
        """The process ends; with `suspend` everything is kept for the next open."""
        await self.leave()

    # Commands that are in no table of QEMU's

    async def start(self, operation: Operation, options: StartOptions) -> bool:
        """Begin to replicate. False if QEMU's rules ignore it. Raises `Error`."""
        return await self.replica.begin(operation, options)

    async def init(self) -> None:
        """Make the directory the resource's. Raises `Error`."""
        self.record.save()

    async def remove_replica(self) -> None:
        """Take the filter out of the primary's mirror. Raises `Error(INVALID_STATE)`."""
        raise Error(Kind.INVALID_STATE, f"the mirror of {self.name} has no replica that could be removed")

    async def add_replica(self) -> None:
        """Put it back. Raises `Error(INVALID_STATE)`."""
        raise Error(Kind.INVALID_STATE, f"no replica of {self.name} was removed")

    async def resync(self) -> None:
        """Send the secondary what it misses, on the operator's word. Raises `Error(INVALID_STATE)`."""
        raise Error(
            Kind.INVALID_STATE, f"this host forwards nothing of {self.name}: there is nothing to resync"
        )

    def pace_resync(self, paused: bool | None, limit: int | None) -> None:
        """How fast resyncs go. Raises `Error(INVALID_STATE)`."""
        raise Error(
            Kind.INVALID_STATE, f"this host forwards nothing of {self.name}: there is nothing to resync"
        )

    async def begin_resync(self, generation: str, name: str) -> bool:
        """The primary will send what this host misses. Raises `Error(CONFLICT)` if it is not its secondary."""
        raise Error(Kind.CONFLICT, f"this host is no running secondary of {self.name}")

    async def end_resync(self, generation: str) -> None:
        """All of it was sent. Raises `Error(CONFLICT)` if no resync is under way here."""
        raise Error(Kind.CONFLICT, f"this host is no running secondary of {self.name}")

    async def prepare_epoch(self) -> None:
        """Do now what the next checkpoint would else do while requests are held."""
        raise NotImplementedError

    async def cancel_commit(self) -> None:
        """End the commit as if it had failed. Raises `Error(INVALID_STATE)` if none is under way."""
        raise Error(Kind.INVALID_STATE, f"no commit of {self.name} is under way")

    # What a node below tells

    def disk_lost(self, error: Error) -> None:
        """A sync of the disk failed: what was written since the last one may be on no medium."""

    def overlay_lost(self, error: Error) -> None:
        """A sync of a secondary's overlay failed."""

    def child_failed(self, failure: Failure) -> None:
        """A child of the primary's mirror failed."""

    def may_detach(self) -> bool:
        """Whether a primary goes on without its disk."""
        return False

    # What the other host tells

    async def hear(self, generation: str | None, news: News) -> None:
        """The primary says hello."""

    async def verify(self) -> None:
        """A primary connects: is the peer still the one that has all we sent? Raises `Error(CONFLICT)` if not."""

    # The actions of the table

    async def attach(self, operation: Operation, options: StartOptions) -> None:
        """Connect to the secondary and begin to forward."""
        raise NotImplementedError

    async def watch(self, operation: Operation, options: StartOptions) -> None:
        """Make overlays, begin to save pre-images, make the first checkpoint."""
        raise NotImplementedError

    async def resume(self) -> None:
        """Go on from what was kept at the last close, or found after a death."""
        raise NotImplementedError

    async def move_epoch(self, name: str) -> float:
        """Make the present the new baseline; the pause in milliseconds."""
        raise NotImplementedError

    async def detach(self, force: bool) -> None:
        """Stop forwarding."""
        raise NotImplementedError

    async def last_checkpoint(self, force: bool) -> None:
        """Drop both overlays, serve the disk."""
        raise NotImplementedError

    async def commit(self, force: bool, fenced: bool) -> None:
        """Fail over to the checkpoint."""
        raise NotImplementedError

    async def drop_overlays(self, force: bool, fenced: bool) -> None:
        """Fail over to the latest write."""
        raise NotImplementedError

    async def record_error(self, reason: str) -> None:
        """Record an I/O error."""
        self.record.note(reason)
        self.record.save()
