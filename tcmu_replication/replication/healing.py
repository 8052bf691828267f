"""How a primary makes a secondary whole that misses writes, while the LUN is used.

    connect          a link of its own
    peer-resync      the secondary's state before becomes a checkpoint, and its disk a mix
    attach           what is written from now on is forwarded too
    compare          only if it is not known where the disks differ: by hash, all of them
    resync           what is dirty is sent
    in sync          with requests held: this host's record, then the secondary's
    checkpoint       of the pair

It begins by itself when the peer is heard again, as long as both disks were known to be equal once in this
pairing: before that it takes the operator's word that this host's data is the one that counts. Nor where a
controller has started replication: a resync moves the checkpoint, to which the machine's memory belongs. What cannot
be done now is tried again later. All that it needs is in the map and the record, so it goes on where it was,
whoever died. The link that it began with is the only one: after another the secondary is asked anew, which
may have lost power meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.replication.role import HOLD_S
from tcmu_replication.units import format_size

if TYPE_CHECKING:
    from tcmu_replication.replication.forwarding import Forwarding

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 60.0
"""What fails again and again is tried so seldom."""


class Healing:
    """The resyncs of one forwarding primary, one after the other. `automatic`: they begin by themselves."""

    def __init__(self, role: Forwarding, *, automatic: bool) -> None:
        self.job: Resync | None = None
        self.under_way = False
        self._role = role
        self._replica = role.replica
        self._sender = role.replica.sender
        self._automatic = automatic
        self._pause_s = 0.0
        self._not_before = 0.0
        self._trouble: str | None = None
        self._step: asyncio.Task[None] | None = None
        self._linked = False
        self._paused = False
        self._limit: int | None = None

    def pace(self, paused: bool | None, limit: int | None) -> None:
        """How fast this and later resyncs go; what is None stays. See `Replica.pace_resync`."""
        if paused is not None:
            self._paused = paused
        if limit is not None:
            self._limit = limit or None
        if self.job is not None:
            self._apply(self.job)

    def _apply(self, job: Resync) -> None:
        job.limit = self._limit
        if self._paused:
            job.pause()
        else:
            job.resume()

    def consider(self) -> None:
        """The secondary was heard, and is ours: begin, if there is something to do and nothing is against it."""
        now = asyncio.get_running_loop().time()
        automatic = self._automatic and not self._role.record.manifest.controlled
        if automatic and now >= self._not_before and not self.under_way and self._obstacle() is None:
            self._begin()

    def begin_by_hand(self) -> None:
        """The operator's word: this host's data is the one that counts. Raises `Error(INVALID_STATE)`."""
        if self.under_way:
            raise Error(
                Kind.INVALID_STATE, f"a resync of {self._role.name} is under way; status shows how far"
            )
        obstacle = self._obstacle(asked=True)
        if obstacle is not None:
            raise Error(Kind.INVALID_STATE, f"no resync of {self._role.name}: {obstacle}")
        self._begin()

    def lost(self, error: Error) -> None:
        """The peer has missed something again, or must get nothing: what is under way is given up."""
        if self._step is not None:
            log.info("%s: the resync is interrupted: %s", self._role.name, error)
            self._step.cancel()

    async def verify(self) -> None:
        """Asked before each connection counts. Raises `Error(CONFLICT)` if the resync began with another one."""
        if not self.under_way:
            await self._replica.verify()
        elif self._linked:
            again = Error(Kind.CONFLICT, "the link was lost during a resync, which is begun anew")
            self.lost(again)
            raise again
        self._linked = True

    def _obstacle(self, *, asked: bool = False) -> str | None:
        """Why not; None if nothing is against it."""
        manifest, mirror = self._role.record.manifest, self._sender.mirror
        if not manifest.outdated_at:
            return "the secondary misses nothing"
        if mirror.detached or manifest.disk_error:
            return "this host's own disk has failed, or may lack what was acknowledged"
        if self._sender.pulse is None:
            return "a QEMU cannot be told of it"
        if self._role.removed:
            return "the replica was taken out of the mirror"
        if self._role.comparing is not None:
            return "both disks are being compared"
        if not (manifest.verified or asked):
            return "the disks were never found to be equal"
        if self._role.record.unwritten:
            return "this host cannot write its record"
        return None

    def _begin(self) -> None:
        self.under_way = True
        self._role.spawn(self._run())

    async def _run(self) -> None:
        """One attempt; when to try again, if it has failed."""
        try:
            await self._heal()
        except Error as error:
            self._pause_s = min(max(1.0, 2 * self._pause_s), LONGEST_PAUSE_S)
            self._not_before = asyncio.get_running_loop().time() + self._pause_s
            if str(error) != self._trouble:
                log.warning("%s: the resync could not be carried out: %s", self._role.name, error)
            self._trouble = str(error)
            return
        finally:
            self.under_way = False
            self.job = None
            self._replica.stage_changed()
        self._pause_s, self._trouble = 0.0, None
        await self._checkpoint()

    async def _heal(self) -> None:
        remote = await self._connect()
        forward = Resyncing("replication", remote, self._role.missed, self._sender.missed.dirty())
        try:
            # Only now: if the secondary loses power after its answer, this link is lost with it.
            if await self._sender.peer.resync(str(uuid.uuid4())):
                self._sender.missed.complete = False
                self._role.write_down(map_complete=False)
            async with self._replica.quiet():
                self._sender.attach(remote, forward)
            self._replica.stage_changed()
            obstacle = self._obstacle(asked=True)  # the disk may have failed since
            if obstacle is not None:
                raise Error(Kind.INVALID_STATE, obstacle)
            if not self._sender.missed.complete:
                await self._alone(self._compare())
            await self._alone(self._resync(forward))
            await self._in_sync(remote, forward)
        except BaseException:
            if forward.gap is None:
                forward.gap = Error(Kind.PEER_LOST, "the resync has not ended")
            remote.close()
            raise

    async def _connect(self) -> Remote:
        """A link that no writes go over yet. Raises `Error`."""
        await self._sender.hang_up()
        self._linked = False
        remote = self._sender.connect(self.verify)
        try:
            await remote.open()
        except BaseException:
            remote.close()
            raise
        return remote

    async def _alone(self, step: Coroutine[Any, Any, None]) -> None:
        """Carry out a step that `lost` can end. Raises `Error(PEER_LOST)` then."""
        task = self._step = asyncio.create_task(step)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise
        finally:
            self._step = None
        if task.cancelled():
            raise Error(Kind.PEER_LOST, "the link to the secondary was lost meanwhile")
        task.result()

    async def _compare(self) -> None:
        missed = self._sender.missed
        before = missed.unmarked
        await self._role.compare()
        if missed.unmarked != before:
            raise Error(Kind.IO, f"{missed.path} cannot be written: what differs is not known")
        missed.complete = True
        self._role.write_down(map_complete=True)

    async def _resync(self, forward: Resyncing) -> None:
        job = self.job = Resync(f"resync-{self._role.name}", self._replica.disk, self._replica.top, forward)
        self._apply(job)
        log.info("%s: resync of %s", self._role.name, format_size(self._sender.missed.bytes))
        await job.run()

    async def _in_sync(self, remote: Remote, forward: Resyncing) -> None:
        """With nothing under way: all is there. This host's record first: what it writes after that is missed anew."""
        role, record = self._role, self._role.record
        async with self._replica.quiet():
            flushed = remote.flush()
            remote.unplug()
            await settle(flushed)
            if record.manifest.disk_error:
                raise Error(
                    Kind.IO, f"this host's disk may lack what was acknowledged: {record.manifest.disk_error}"
                )
            if forward.gap is not None or self._sender.missed.bytes or not self._sender.missed.complete:
                raise forward.gap or Error(Kind.PEER_LOST, "the secondary has missed writes again")
            self._sender.missed.flush()
            record.save(error=None, outdated_at="", map_complete=True, verified=True)
            record.machine.forget_error()
            try:
                async with asyncio.timeout(HOLD_S):
                    await self._sender.peer.resynced()
            except (Error, TimeoutError) as error:
                role.open_gap(Error(Kind.PEER_LOST, f"the end of the resync was not confirmed: {error}"))
                raise Error(Kind.PEER_LOST, f"the secondary has not confirmed it: {error}") from error
            self.under_way = False
            role.attach_plain(remote)
        log.warning("%s: the resync has ended: both hosts are in sync", role.name)

    async def _checkpoint(self) -> None:
        """The state before the resync was the last one; the next is made now."""
        with contextlib.suppress(Error):  # one may be under way, or the link gone again: status says so
            await self._replica.checkpoint()
