"""The running secondary: lets its primary in, moves its epoch, and knows what a failover would serve."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING

from tcmu_replication.background import background
from tcmu_replication.block import boot
from tcmu_replication.block.gate import Gate, Hold
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import stages
from tcmu_replication.replication.clock import now
from tcmu_replication.replication.epochs import Pair
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.peer_state import News
from tcmu_replication.replication.promotion import refuse_what_is_old, refuse_while_primary_lives
from tcmu_replication.replication.pulse import PERIOD_S
from tcmu_replication.replication.role import HOLD_S, StartOptions
from tcmu_replication.replication.secondary import SecondaryRole
from tcmu_replication.replication.stages import Operation, Stage
from tcmu_replication.units import format_size

if TYPE_CHECKING:
    from tcmu_replication.replication.replica import Replica

log = logging.getLogger(__name__)

NEVER_EQUAL = (
    "the disks were not equal when a resync began, so the state before it is none that the primary had"
)


class Following(SecondaryRole):
    """The role of a secondary in stage `running`."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._receiver = replica.receiver
        self._watcher: asyncio.Task[None] | None = None
        self._forgiven = ""  # since when it was outdated before the last resync: late news of that are none
        self._told = False  # the primary has said since this process began what there is to know

    # --- life

    async def watch(self, operation: Operation, options: StartOptions) -> None:
        """A start: the first epoch. Requests are held: the LUN shows its disk, or nothing yet, until it begins."""
        self.record.machine.check_mode(options.mode)
        receiver = self._receiver
        # What is put away goes by name, and may have the names of the new pair.
        await receiver.swept()
        pair = receiver.create_pair(1)
        try:
            receiver.check_chain(pair.active, pair.hidden)
            async with self.replica.top.quiet():
                await receiver.make_durable(pair)
                self._begin(operation)
                receiver.pair = pair
                self.take()
                await self._let_in()
        except Error:
            if receiver.pair is not pair:
                pair.destroy()
            raise
        await self.replica.become(self)
        log.info("%s: running as secondary, epoch 1", self.name)

    def _begin(self, operation: Operation) -> None:
        self.record.move(
            operation,
            generation=str(uuid.uuid4()),
            epoch=1,
            checkpoint_id="",
            error=None,
            boot=boot.boot_id(),
            clean=False,
            whole=False,
            checkpoint_at=now(),
            checkpoint_pause_ms=0.0,
            paired=False,
            verified=False,
            suspect=None,
            disk_error=None,
            peer_disk_error=None,
            resync_since="",
            outdated_at="",
            promoted_at="",
            superseded_at="",
            detached_at="",
            written_alone=False,
            last_forwarded="",
        )

    async def resume(self) -> None:
        """Go on after a restart of this process or of this host. Raises `Error`, with nothing changed."""
        await resume_pair(self)
        self.take()
        await self._let_in()

    async def _let_in(self) -> None:
        assert self._receiver.pair is not None
        self._watch_syncs(self._receiver.pair)
        await self._receiver.let_in(self._forwarding_failed)

    async def enter(self) -> None:
        """See `Role.enter`."""
        self._watcher = background(self._watch_primary())

    async def leave(self) -> None:
        """See `Role.leave`."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def close(self, *, suspend: bool) -> None:
        """See `Role.close`."""
        self._receiver.look_for_writes()
        await self.leave()
        await self._receiver.shut_out()
        if suspend:
            await suspend_pair(self)

    # --- checkpoints: prepare, hold, commit, release

    async def prepare_epoch(self) -> None:
        """See `Role.prepare_epoch`."""
        await self._receiver.prepare()

    async def move_epoch(self, name: str) -> float:
        """Make the present the new baseline. A failure before the record is saved leaves the old epoch in force."""
        receiver, top = self._receiver, self.replica.top
        if name and name == self.record.manifest.checkpoint_id:
            return self.record.manifest.checkpoint_pause_ms
        if receiver.backup is None or receiver.export is None or receiver.pair is None:
            raise Error(Kind.INVALID_STATE, stages.BACKUP_GONE)
        receiver.check_ejected()
        await receiver.prepare()
        new, receiver.next = receiver.next, None
        assert new is not None
        export = receiver.export
        holds = [export.hold(HOLD_S), top.hold(HOLD_S)]
        try:
            return await self._switch(new, export, holds, name)
        except BaseException:
            if receiver.pair is not new:  # else the record names it
                new.destroy()
            raise
        finally:
            for hold in reversed(holds):
                hold.release()

    async def _switch(self, new: Pair, export: Gate, holds: list[Hold], name: str) -> float:
        """With requests held: wait for those in flight, then move to the next epoch."""
        receiver, top = self._receiver, self.replica.top
        began = time.monotonic()
        export.unplug()
        top.unplug()
        await settle(export.drained())
        await settle(top.drained())
        if receiver.durable:
            await settle(self.replica.disk.flush())
        for hold in holds:
            hold.check(f"the checkpoint of {self.name}")
        pause = (time.monotonic() - began) * 1000
        manifest = self.record.manifest
        self.record.save(
            suspect=manifest.suspect if manifest.disk_error else None,  # of the checkpoint before
            epoch=self.replica.epoch + 1,
            checkpoint_id=name,
            checkpoint_at=now(),
            checkpoint_pause_ms=round(pause, 3),
        )
        self._watch_syncs(new)
        old, receiver.pair = receiver.pair, new
        assert receiver.backup is not None
        assert old is not None
        receiver.backup.retarget(new.hidden)
        self.take()
        receiver.retire(old)
        log.info("%s: checkpoint, epoch %d", self.name, self.replica.epoch)
        return (time.monotonic() - began) * 1000

    # --- a resync

    async def begin_resync(self, generation: str, name: str) -> bool:
        """See `Replica.begin_resync`."""
        manifest = self._of_ours(generation)
        if self._receiver.export is None:
            raise Error(Kind.INVALID_STATE, stages.BACKUP_GONE)
        compare = bool(manifest.disk_error)
        if not manifest.resync_since:
            if (
                not compare
            ):  # the disk is as the primary's was at some time: a checkpoint, and what it saved is over
                await self.move_epoch(name)
            suspect = manifest.suspect if compare else None
            if not manifest.verified:
                suspect = suspect or NEVER_EQUAL
            self.record.save(resync_since=now(), suspect=suspect)
            log.warning("%s: a resync begins: the disk is a mix until its end", self.name)
            self.replica.stage_changed()
        return compare

    async def end_resync(self, generation: str) -> None:
        """See `Replica.end_resync`."""
        manifest = self._of_ours(generation)
        if not manifest.resync_since:
            raise Error(Kind.CONFLICT, f"no resync of {self.name} is under way here")
        await settle(self.replica.disk.flush())
        self.record.save(
            error=None, resync_since="", outdated_at="", disk_error=None, verified=True, paired=True
        )
        self.record.machine.forget_error()
        self._forgiven = manifest.outdated_at
        log.warning("%s: the resync has ended: this host has all again", self.name)
        self.replica.stage_changed()

    def _of_ours(self, generation: str) -> Manifest:
        manifest = self.record.manifest
        if generation != manifest.generation:
            raise Error(
                Kind.CONFLICT,
                f"this host is a secondary of {self.name} in another pairing ({manifest.generation}) than the caller "
                f"({generation}); start both anew",
            )
        return manifest

    # --- the end of following

    async def commit(self, force: bool, fenced: bool) -> None:
        """Fail over to the checkpoint, plus own writes."""
        self._refuse(latest=False, force=force, fenced=fenced)
        self.record.move(Operation.FAILOVER, whole=self._receiver.durable, promoted_at=now())
        await self._receiver.end_backup()
        role = self.replica.role_of(Stage.FAILOVER)
        role.take()
        await self.replica.become(role)
        log.warning("%s: failed over to the checkpoint", self.name)

    async def drop_overlays(self, force: bool, fenced: bool) -> None:
        """Fail over to the latest write that the primary had acknowledged."""
        self._refuse(latest=True, force=force, fenced=fenced)
        await self._serve_disk(Operation.FAILOVER_TO_LATEST, promoted_at=now())
        log.warning("%s: failed over to the latest write", self.name)

    async def last_checkpoint(self, force: bool) -> None:
        """A stop: the LUN serves what the primary wrote. Refused if that is known to be old, unless `force`."""
        manifest = self.record.manifest
        user = self._receiver.in_use()
        if user and not force and (manifest.outdated_at or self.record.error is not None):
            since = manifest.outdated_at or manifest.error_at
            raise Error(
                Kind.INVALID_STATE,
                f"this host's disk of {self.name} is outdated since {since} ({self.record.error}); after stop its "
                f"LUN would serve that to whoever uses it here ({user}). Remove its exports here first",
            )
        await self._serve_disk(Operation.STOP, promoted_at="")
        log.info("%s: stopped after a last checkpoint", self.name)

    def _refuse(self, *, latest: bool, force: bool, fenced: bool) -> None:
        self._receiver.look_for_writes()
        if force:
            return
        if not fenced:
            refuse_while_primary_lives(self.name, self.replica.peer_name, self.replica.heard)
        refuse_what_is_old(self.record, self.replica.peer_name, latest=latest, told=self._told)

    async def _serve_disk(self, operation: Operation, *, promoted_at: str) -> None:
        """Drop both overlays: the LUN is the disk."""
        self.record.move(operation, promoted_at=promoted_at)
        await self._receiver.end_backup()
        role = self.replica.role_of(Stage.DONE)
        async with self.replica.top.quiet():
            role.take()
        await self.replica.become(role)
        self._receiver.drop_pair()

    # --- what fails here

    def _forwarding_failed(self, error: Error) -> None:
        """A forwarded write was answered with an error: the primary knows, and so shall who looks here."""
        if self.record.error is not None:
            return
        self.record.note(f"a forwarded write failed: {error}")
        log.error("%s: a forwarded write failed; the primary was told: %s", self.name, error)
        self.record.write_down()

    def _watch_syncs(self, pair: Pair) -> None:
        pair.hidden.tell_lost(lambda error: self.replica.role.overlay_lost(error))
        pair.active.tell_lost(lambda error: self.replica.role.overlay_lost(error))

    # --- the primary's word

    async def hear(self, generation: str | None, news: News) -> None:
        """See `Role.hear`."""
        self._receiver.look_for_writes()
        manifest = self.record.manifest
        if self.record.stage is not Stage.RUNNING or generation != manifest.generation:
            return
        self._told = True
        changes: dict[str, object] = {}
        if not manifest.paired:
            changes["paired"] = True
        if news.verified and not manifest.verified:
            changes["verified"] = True
        if news.outdated_at not in ("", self._forgiven) and not manifest.outdated_at:
            missed = f"; {format_size(news.missed_bytes)} are known to differ" if news.missed_bytes else ""
            self.record.note(
                f"{self.replica.peer_name} goes on without this host since {news.outdated_at} "
                f"({news.reason}){missed}"
            )
            log.error("%s: outdated: %s", self.name, self.record.error)
            changes["outdated_at"] = news.outdated_at
        if news.disk_error and not manifest.peer_disk_error:
            log.error("%s: %s says: %s", self.name, self.replica.peer_name, news.disk_error)
            changes["peer_disk_error"] = news.disk_error
        if changes:
            self.record.save(**changes)
            if "outdated_at" in changes or "peer_disk_error" in changes:
                self.replica.stage_changed()

    async def _watch_primary(self) -> None:
        """Once a second: when was the last write; and when the primary is not heard any more, note that."""
        alive = False
        heard = self.replica.heard
        while True:
            await asyncio.sleep(PERIOD_S)
            self._receiver.look_for_writes()
            if alive and not heard.alive:
                log.warning(
                    "%s: %s is not heard since %s; what it had acknowledged until then is here",
                    self.name,
                    self.replica.peer_name,
                    heard.at,
                )
                self.record.write_down()
            alive = heard.alive


async def resume_pair(role: SecondaryRole) -> None:
    """Open the overlays that the record names, and write down that this boot uses them. Raises `Error`."""
    record, receiver = role.record, role.replica.receiver
    found = record.manifest
    error = _after_restart(role, found)
    pair = receiver.open_pair(found.epoch)
    try:
        # Slots of forgotten blocks are taken anew now: those marks must not come back with a loss of power.
        await settle(pair.hidden.sync_map())
        await settle(pair.active.sync_map())
        record.take_up(found, error)
        record.move(
            Operation.OPEN,
            boot=boot.boot_id(),
            clean=False,
            whole=found.whole or found.clean,
            error_at=found.error_at or (now() if error else ""),
            disk_error=found.disk_error or _lost_here(found),
        )
    except Error:
        pair.close()
        raise
    receiver.pair = pair


async def suspend_pair(role: SecondaryRole) -> None:
    """A clean end. Raises `Error`."""
    pair = role.replica.receiver.pair
    if pair is not None:
        await settle(role.replica.disk.flush())
        await settle(pair.active.flush())
        await settle(pair.hidden.flush())
        role.record.save(clean=True)


def _lost_here(found: Manifest) -> str | None:
    """Why the disk may lack what was acknowledged, if this host has lost its page cache."""
    if found.boot == boot.boot_id() or found.clean or found.stage is not Stage.RUNNING:
        return None
    return "this host went down without a clean stop: forwarded writes since the last flush may be missing"


def _after_restart(role: SecondaryRole, found: Manifest) -> str | None:
    """The error to go on with: this process may have died, or the host have lost its page cache."""
    if found.boot == boot.boot_id() or found.clean:
        return found.error
    reason = _lost_here(found) or "this host went down without a clean stop"
    if found.stage is Stage.RUNNING:
        if role.replica.receiver.durable:
            return found.error or reason
        disk = (
            "The disk was not touched. If the primary serves, it has everything: move the files of {directory} "
            "away and start this host; then on the primary tcmu-replication stop {name}, and start with --sync-from "
            "and its name"
        )
    else:
        if found.whole:
            return found.error
        reason += ": what the LUN wrote may be missing"
        disk = (
            "The commit had copied nothing yet; the disk has what was forwarded and what the LUN wrote since; copy the "
            "primary's disk, move {directory} away and start again"
        )
    raise Error(
        Kind.INVALID_STATE,
        f"{reason}, and with durable = false the checkpoint may be torn. "
        + disk.format(directory=role.record.directory, name=role.name),
    )
