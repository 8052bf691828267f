"""The running primary: forwards writes, commands the pair's checkpoints, remembers what the peer missed.

The first write that the secondary does not take opens a gap: nothing is forwarded any more, so
the peer's disk stays at a point in time that this one had, and what it misses
is marked, block by block, in a map that survives this process. As in QEMU the
LUN goes on and the error is recorded; other than QEMU, a checkpoint is refused
from then on, since it would make a baseline of a disk that misses writes. The
secondary is told as soon as it can be reached.

What could make the disks differ is written down before it can: the record says
that this host writes, until a clean end takes that away; the log of writes in
flight says where, for as long as the host lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from tcmu_replication.background import background
from tcmu_replication.block import boot
from tcmu_replication.block.mirror import Failure
from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.block.replication import Forward
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.compare import Compare
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.replication import starting
from tcmu_replication.replication.clock import now
from tcmu_replication.replication.comparing import Comparing
from tcmu_replication.replication.healing import Healing
from tcmu_replication.replication.peer_state import News, PeerState
from tcmu_replication.replication.primary import PrimaryRole
from tcmu_replication.replication.role import HOLD_S, StartOptions
from tcmu_replication.replication.sender import Sender
from tcmu_replication.replication.stages import Operation, Stage
from tcmu_replication.units import format_size

if TYPE_CHECKING:
    from tcmu_replication.replication.replica import Replica

log = logging.getLogger(__name__)

RETRY_S = 1.0
"""The pause before something that failed for want of the peer, or of the disk, is tried again."""

DETACHED = "the local disk failed; the secondary serves"

THE_WAY_BACK = (
    "see to the secondary and to the link: what it misses is sent to it then; status shows how far that is"
)


class Forwarding(PrimaryRole):
    """The role of a primary in stage `running`."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self.removed = False
        self._sender: Sender = replica.sender
        self._tasks: set[asyncio.Task[None]] = set()
        self._healing: asyncio.Task[None] | None = None
        self._comparing = Comparing(self)
        self.healing = Healing(self, automatic=self._sender.heals)

    # --- what is shown

    @property
    def comparing(self) -> Compare | None:  # type: ignore[override]
        """The comparison of both disks, while it runs."""
        return self._comparing.job

    @property
    def resyncing(self) -> Resync | None:  # type: ignore[override]
        """The resync, while it sends."""
        return self.healing.job

    @property
    def heals(self) -> bool:  # type: ignore[override]
        """Whether the secondary is being made whole."""
        return self.healing.under_way

    @property
    def forwards(self) -> bool:  # type: ignore[override]
        """Whether what is written goes to the secondary now."""
        forward = self._sender.filter
        if forward is None or forward.gap is not None or self.record.stage is not Stage.RUNNING:
            return False
        return not self.record.manifest.outdated_at  # else a resync is under way

    # --- life

    async def attach(self, operation: Operation, options: StartOptions) -> None:
        """A start: connect, look at both disks, and begin to forward. Raises `Error`, with nothing started."""
        replica = self.replica
        self.record.machine.check_mode(options.mode)
        if options.assume_clean:
            starting.refuse_assumption(self.record)
        state = await starting.hello(replica)
        compare = options.compare and not options.assume_clean
        remote = self._sender.connect(replica.verify)
        try:
            async with replica.quiet():
                await remote.open()
                if not options.assume_clean and not options.sync:
                    await starting.probe(replica, remote)
                self._begin(operation, state, remote, verified=not compare)
                if options.sync:
                    self._sender.missed.complete = False
                    self.open_gap(Error(Kind.MISCOMPARE, f"{replica.peer_name} is made equal to this host"))
        except Error:
            remote.close()
            await remote.wait_closed()
            raise
        await replica.become(self)
        with contextlib.suppress(Error):  # else the next beat tells it
            await self._ours()
        if options.sync:
            self.healing.begin_by_hand()
        log.info("%s: running as primary, epoch %d", self.name, replica.epoch)

    def _begin(self, operation: Operation, state: PeerState, remote: Remote, *, verified: bool) -> None:
        """With requests held: from now on every write goes to both disks."""
        self._sender.missed.open(anew=True)
        self._sender.open_log().clear()
        self.record.move(
            operation,
            generation=state.generation,
            epoch=state.epoch,
            checkpoint_id=state.checkpoint_id,
            error=None,
            boot=boot.boot_id(),
            clean=False,
            verified=verified,
            outdated_at="",
            detached_at="",
            superseded_at="",
            disk_error=None if verified else self.record.manifest.disk_error,
            map_complete=True,
            written_alone=False,
            controlled=operation is Operation.START,
        )
        self._attach(remote, None)

    async def resume(self) -> None:
        """Go on as a running primary after a restart of this process or of this host."""
        sender, found = self._sender, self.record.manifest
        has_map = sender.missed.path.exists()
        sender.missed.open()
        if not found.map_complete or not has_map:
            sender.missed.complete = False
        in_flight = sender.open_log()
        this_boot = boot.boot_id()
        outdated_at = found.outdated_at
        reason = None if found.clean else self._what_was_under_way(this_boot)
        if not has_map and not found.detached_at:
            reason = reason or f"{sender.missed.path} is gone: what the secondary misses is not known"
        if reason is not None:
            self.record.note(reason)
            sender.missed.complete = False
            outdated_at = outdated_at or now()
        self.record.move(
            Operation.OPEN,
            boot=this_boot,
            clean=False,
            outdated_at=outdated_at,
            map_complete=sender.missed.complete,
        )
        in_flight.clear()
        remote = sender.connect(self.replica.verify)
        gap = Error(Kind.PEER_LOST, str(self.record.error)) if outdated_at else None
        if gap is None:
            remote.open_later()
        else:
            remote.close()  # it would be connected and get nothing
        self._attach(remote, gap)

    def _what_was_under_way(self, this_boot: str) -> str | None:
        """After an end that was not clean: mark what may differ. Why that is not known, if it is not."""
        found, sender = self.record.manifest, self._sender
        if found.detached_at:
            return None  # one disk alone has what was written
        if found.boot != this_boot:
            return (
                "this host went down without a clean stop: the disks may differ in what was written since the last "
                "flush"
            )
        in_flight = sender.open_log()
        if in_flight.found is None:
            return (
                "the worker died, and which writes were under way is not known: the disks may differ in those"
            )
        for offset, length in in_flight.found:
            sender.missed.mark(offset, length)
        if not sender.missed.complete:
            return (
                "the worker died, and the writes under way could not be noted: the disks may differ in those"
            )
        return None

    async def enter(self) -> None:
        """See `Role.enter`."""
        if self._sender.pulse is not None:
            self._sender.pulse.start(self._beat)
        self._heal()
        if not self.record.manifest.verified and self.forwards:
            self._comparing.begin()

    async def leave(self) -> None:
        """See `Role.leave`."""
        if self._sender.pulse is not None:
            await self._sender.pulse.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self, *, suspend: bool) -> None:
        """See `Role.close`."""
        await self.leave()
        if suspend:
            mirror = self._sender.mirror
            try:
                flushed = mirror.flush()
                mirror.unplug()
                await settle(flushed)
                self._sender.missed.flush()  # after a clean end nothing else says what differs
                self.record.save(clean=True)
            except Error as error:
                log.error("%s: not stopped cleanly: %s", self.name, error)

    async def detach(self, force: bool) -> None:
        """A stop: the LUN serves this disk alone. `force` is for the secondary, whose LUN may be old."""
        if self._sender.mirror.detached:
            raise Error(
                Kind.INVALID_STATE,
                f"the local disk of {self.name} has failed and the secondary serves; "
                "stop the initiators and fail over there",
            )
        if self._sender.pulse is not None:
            await self._sender.pulse.stop()
            await self._tell_of_the_end()
        await self.leave()
        async with self.replica.quiet():
            self.record.move(Operation.STOP, error=None, outdated_at="", written_alone=self._differs_by_now())
            self._sender.mirror.remove()
            alone = self.replica.role_of(Stage.DONE)
            alone.take()
        await self.replica.become(alone)
        await self._sender.hang_up()
        log.info("%s: stopped, serving the disk alone", self.name)

    async def _tell_of_the_end(self) -> None:
        """The LUN goes on alone: the secondary has to know, should it ever be asked for the latest."""
        if self.record.manifest.outdated_at:
            return  # it knows
        news = News(self.record.manifest.verified, now(), "replication was stopped there")
        try:
            await self._sender.peer.hello(news)
        except Error as error:
            log.warning(
                "%s: %s could not be told that this host goes on alone: %s",
                self.name,
                self.replica.peer_name,
                error,
            )

    def _differs_by_now(self) -> bool:
        """Whether the disks are not known to be equal, so that nobody may vouch for it later."""
        return (
            bool(self.record.manifest.outdated_at)
            or not self.record.manifest.verified
            or self.record.error is not None
            or self._sender.missed.bytes > 0
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """For as long as this role lasts."""
        task = background(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- the peer's word

    async def _beat(self) -> None:
        """Once a second: tell and hear."""
        if self.record.unwritten:
            self.record.write_down()
        healing = self.healing.under_way
        state = await self._sender.beats.hello(self.news())
        self.replica.heard.note()
        if self.record.stage is not Stage.RUNNING:
            return
        if (healing or self.healing.under_way) and not self.is_promoted(state):
            if not self._is_ours(state):
                self.healing.lost(Error(Kind.CONFLICT, f"{self.replica.peer_name} follows no more"))
            return  # its error may be what it said before a resync ended
        with contextlib.suppress(Error):  # what is wrong with it is recorded
            self._judge(state)
        if self._is_ours(state):
            self.healing.consider()

    async def tell(self) -> None:
        """Tell the peer the news now, and not with the next beat."""
        with contextlib.suppress(Error):
            await self._sender.beats.hello(self.news())

    def news(self) -> News:
        """What the secondary is to know."""
        manifest = self.record.manifest
        if not manifest.outdated_at:
            return News(verified=manifest.verified, disk_error=manifest.disk_error or "")
        return News(
            manifest.verified,
            manifest.outdated_at,
            self.record.error or "",
            self._sender.missed.bytes,
            manifest.disk_error or "",
        )

    def _judge(self, state: PeerState) -> None:
        """Raise `Error(CONFLICT)` unless the secondary is the one that has all we sent; and note what it is instead."""
        if self.is_promoted(state):
            raise self.supersede(state)
        if state.stage is not Stage.RUNNING or state.generation != self.record.manifest.generation:
            reason = (
                f"the secondary of {self.name} is not ours any more: stage {state.stage.value}, generation "
                f"{state.generation or 'none'} instead of {self.record.manifest.generation}"
            )
        elif state.error is not None:
            reason = f"the secondary of {self.name} may miss writes: {state.error}"
            if not self.record.manifest.outdated_at:
                self._sender.missed.complete = False  # it says nothing of where
        else:
            self._learn(state)
            return
        self.open_gap(Error(Kind.CONFLICT, reason))
        raise Error(Kind.CONFLICT, reason)

    def _is_ours(self, state: PeerState) -> bool:
        """Whether the peer is the secondary of this pairing, whatever it misses."""
        return (
            self.record.stage is Stage.RUNNING
            and state.stage is Stage.RUNNING
            and state.generation == self.record.manifest.generation
            and state.length == self.replica.disk.length
        )

    async def resync(self) -> None:
        """See `Role.resync`."""
        state = await self._sender.peer.hello(self.news(), settled=True)
        if not self._is_ours(state):
            self._judge(state)
        self.healing.begin_by_hand()

    def pace_resync(self, paused: bool | None, limit: int | None) -> None:
        """See `Replica.pace_resync`."""
        self.healing.pace(paused, limit)

    async def compare(self) -> None:
        """Compare both disks, and mark what differs. Raises `Error`."""
        await self._comparing.run()

    def _learn(self, state: PeerState) -> None:
        """A checkpoint whose answer was lost may have been made all the same."""
        if state.epoch > self.replica.epoch:
            log.warning("%s: the secondary is in epoch %d: its checkpoint was made", self.name, state.epoch)
            self.record.write_down(epoch=state.epoch, checkpoint_id=state.checkpoint_id)

    async def verify(self) -> None:
        """See `Role.verify`. The remote node asks this at every connect."""
        await self._ours()
        if self.record.manifest.outdated_at:
            raise Error(
                Kind.CONFLICT,
                f"{self.replica.peer_name} misses writes since {self.record.manifest.outdated_at}; nothing is "
                "forwarded to it",
            )

    async def _ours(self) -> PeerState:
        """The state of the secondary, if it is the one that we started with and misses nothing."""
        state = await self._sender.peer.hello(self.news(), settled=True)
        self.replica.heard.note()
        # One that is outdated has been told so, and says so as its error.
        if not self.record.manifest.outdated_at or self.is_promoted(state):
            self._judge(state)
        return state

    # --- checkpoints

    async def move_epoch(self, name: str) -> float:
        """End the pair's epoch; new writes are held and those in flight awaited, then the secondary moves its own.

        If it does not answer, nothing is sent to it before it has said whether
        it has moved: a checkpoint that was given up never gets later writes.
        """
        name = name or str(uuid.uuid4())
        peer = self._sender.peer
        self._refuse_checkpoint()
        # Ours may be behind: a checkpoint whose answer was lost has moved the secondary alone.
        epoch = (await self._ours()).epoch
        await peer.prepare(epoch)
        began = time.monotonic()
        async with self.replica.quiet():
            self._refuse_checkpoint()
            try:
                state = await self._commit_epoch(epoch, name)
            except Error as error:
                if self._sender.remote is not None:
                    self._sender.remote.renew(f"the checkpoint of epoch {epoch} was not confirmed: {error}")
                raise
            pause = (time.monotonic() - began) * 1000
        self.record.save(
            epoch=state.epoch,
            checkpoint_id=name,
            checkpoint_at=now(),
            checkpoint_pause_ms=round(pause, 3),
        )
        log.info("%s: checkpoint, epoch %d, paused for %.1f ms", self.name, state.epoch, pause)
        return pause

    async def _commit_epoch(self, epoch: int, name: str) -> PeerState:
        """While requests are held, and no longer than they may be. Raises `Error`."""
        try:
            async with asyncio.timeout(HOLD_S):
                return await self._sender.peer.checkpoint(epoch, name)
        except TimeoutError as late:
            raise Error(
                Kind.TIMED_OUT, f"{self.replica.peer_name} has not answered for {HOLD_S:g} s"
            ) from late

    def _refuse_checkpoint(self) -> None:
        forward = self._sender.filter
        if self.removed and self.record.error is None:
            raise Error(
                Kind.INVALID_STATE,
                f"the replica of {self.name} was removed from the mirror; add it again (x-blockdev-change) or stop",
            )
        if forward is not None and forward.gap is not None:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} misses writes ({self._known_missed()}: {self.record.error}); a "
                f"checkpoint now would be a state that never was. To mend it: {THE_WAY_BACK}",
            )
        if not self.record.manifest.verified:
            raise Error(
                Kind.INVALID_STATE,
                f"both disks of {self.name} are still being compared (status shows how far); a checkpoint now could "
                "be a state that never was",
            )
        if self._sender.missed.bytes:
            raise Error(
                Kind.INVALID_STATE,
                f"{format_size(self._sender.missed.bytes)} are still being sent to the secondary of {self.name} again; "
                "a checkpoint now could be a state that never was. Try again when status shows none",
            )
        if self.record.error is not None and not self._sender.mirror.detached:
            raise Error(Kind.INVALID_STATE, f"{self.name} has an error: {self.record.error}")

    def _known_missed(self) -> str:
        least = "" if self._sender.missed.complete else "at least "
        return f"{least}{format_size(self._sender.missed.bytes)} are known to differ"

    # --- the replica as the mirror's child

    async def remove_replica(self) -> None:
        """See `Replica.remove_replica`."""
        forward = self._sender.filter
        if forward is None or self._sender.mirror.detached or self.removed:
            await super().remove_replica()
        assert forward is not None
        async with self.replica.quiet():
            if forward.gap is None:
                forward.gap = Error(Kind.PEER_LOST, "the replica was removed from the mirror")
            self.removed = True
        self.healing.lost(forward.gap)
        log.warning("%s: the replica was removed from the mirror, nothing is forwarded", self.name)

    async def add_replica(self) -> None:
        """See `Replica.add_replica`."""
        remote = self._sender.remote
        if remote is None or not self.removed:
            await super().add_replica()
        assert remote is not None
        self._refuse_missed()
        await self.verify()
        if remote.state is State.CLOSED:
            # There already, so that it can be cut off.
            remote = self._sender.remote = self._sender.connect(self.replica.verify)
            try:
                await remote.open()
            except Error:
                remote.close()
                raise
        async with self.replica.quiet():
            self._refuse_missed()
            # A flush that ended meanwhile did not reach the secondary.
            flushed = remote.flush()
            remote.unplug()
            await settle(flushed)
            self._attach(remote, None)
        if not self.record.manifest.verified:
            self._comparing.begin()
        log.info("%s: the replica is in the mirror again", self.name)

    def _refuse_missed(self) -> None:
        if self.record.error is not None or self._sender.missed.bytes:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} misses writes ({self._known_missed()}: {self.record.error}). "
                "Stop and start replication on both hosts to mend it",
            )

    def attach_plain(self, remote: Remote) -> None:
        """A resync has ended: forward as ever."""
        self._attach(remote, None)

    def _attach(self, remote: Remote, gap: Error | None) -> None:
        """Hang the filter below the mirror; with `gap` it only marks what the peer misses."""
        self.removed = False
        forward = Forward("replication", remote, self.missed, gap)
        self._sender.attach(remote, forward, detached=bool(self.record.manifest.detached_at))

    # --- what the peer misses

    def missed(self, offset: int, length: int, error: Error) -> bool:
        """The filter: the peer did not get this range, or fails a flush. Whether it is written down."""
        missed, record = self._sender.missed, self.record
        missed.mark(offset, length)
        if not length:
            missed.complete = False  # a flush: nobody knows what it would have made durable there
        self.healing.lost(error)
        if not record.manifest.outdated_at:
            self.open_gap(Error(error.kind, f"not forwarded: {error}"))
        elif record.unwritten or record.manifest.map_complete != missed.complete:
            self.write_down(map_complete=missed.complete)
        refusal = None
        if record.unwritten:
            refusal = Error(
                Kind.IO, f"{self.replica.peer_name} misses this write, and that cannot be written down"
            )
        self._sender.mirror.refuse(refusal)
        return refusal is None

    def open_gap(self, error: Error) -> None:
        """From now on the secondary misses what is written: record it before any of that is acknowledged."""
        forward, detached = self._sender.filter, self._sender.mirror.detached
        if forward is not None and forward.gap is None:
            forward.gap = error
            if detached:
                log.error("%s: the secondary does not serve any more: %s", self.name, error)
        if self.record.manifest.outdated_at or detached:
            return  # without a disk here the secondary misses nothing that anybody has
        self.record.note(str(error))
        log.error("%s: the secondary misses writes from now on: %s", self.name, error)
        self.write_down(outdated_at=now(), map_complete=self._sender.missed.complete)
        self.replica.stage_changed()

    def write_down(self, **changes: object) -> None:
        """What could not be noted is said in the memory that outlives this process."""
        if not self.record.write_down(**changes) and self._sender.in_flight is not None:
            self._sender.in_flight.set_unknown()

    def _heal(self) -> None:
        """Send again, behind, what is marked though nothing keeps it from being sent."""
        if self.forwards and self._sender.missed.bytes and (self._healing is None or self._healing.done()):
            self._healing = self.spawn(self._resend())

    async def _resend(self) -> None:
        trouble = None
        missed, forward, mirror = self._sender.missed, self._sender.filter, self._sender.mirror
        assert forward is not None

        def stopped() -> bool:
            return self._sender.filter is not forward or not self.forwards or mirror.detached

        while missed.bytes and not stopped():
            try:
                await missed.resend(self.replica.disk, forward, stopped)
            except Error as error:
                if trouble is None:
                    log.error("%s: what differs could not be sent again yet: %s", self.name, error)
                trouble = error
                await asyncio.sleep(RETRY_S)
        if not missed.bytes:
            log.info("%s: what may have differed was sent again", self.name)

    # --- what fails here

    def disk_lost(self, error: Error) -> None:
        """See `Role.disk_lost`; the peer is told at once."""
        super().disk_lost(error)
        self.healing.lost(error)  # this disk must go over no other
        self.spawn(self.tell())

    def child_failed(self, failure: Failure) -> None:
        """See `Role.child_failed`."""
        if (
            failure.final
            and failure.child == self.replica.disk.name
            and failure.operation not in ("read", "flush")
        ):
            # The peer may have taken it. What is on this disk now is what both shall have.
            if not self._sender.missed.mark(failure.offset, failure.length):
                self.open_gap(
                    Error(failure.error.kind, f"the disks differ, it is not known where: {failure.error}")
                )
            self._heal()
        super().child_failed(failure)

    def may_detach(self) -> bool:
        """Go on without the local disk? Only if that is the policy, the peer has all, and it is written down."""
        record, sender = self.record, self._sender
        if not sender.detach or not self.forwards or sender.missed.bytes or not record.manifest.verified:
            return False
        at = now()
        try:
            record.save(
                detached_at=at,
                error=record.error or DETACHED,
                disk_error=record.manifest.disk_error or DETACHED,
                error_at=record.manifest.error_at or at,
            )
        except Error as error:
            log.error(
                "%s: the local disk is kept, since its failure cannot be written down: %s", self.name, error
            )
            return False
        record.note(DETACHED)
        assert sender.filter is not None
        sender.filter.alone = True
        self.spawn(self.tell())
        log.critical("%s: the local disk failed; the secondary serves from now on", self.name)
        return True
