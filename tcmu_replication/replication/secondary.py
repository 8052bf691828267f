"""The secondary's end: what the table of stages says, carried out on its chain.

            the LUN                          forwarded writes
               |                                    |
          gate (top)                           gate (export)
               |                                    |
        replication filter                  copy-before-write
               |                               |         |
            active -> hidden -> disk <---------+      hidden

Each epoch has overlays of its own; a checkpoint makes the next pair, and
replacing the manifest is the moment at which it happens. A process that dies
anywhere finds at its next open the old epoch or the new one, whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from tcmu_replication.background import background
from tcmu_replication.block import boot
from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import BACKGROUND, Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import settle
from tcmu_replication.block.replication import Closed, Replica, Split
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs import commit as commits
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.replication import stages
from tcmu_replication.replication.end import End, now
from tcmu_replication.replication.epochs import Epochs, Pair
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.peer_state import News
from tcmu_replication.replication.pulse import PERIOD_S, Heard
from tcmu_replication.replication.stages import Action, Machine, Mode, Operation, Stage
from tcmu_replication.units import format_size

log = logging.getLogger(__name__)

GRACE_S = 0.005
"""Before a commit begins to use the machine: requests that waited for the failover go first."""

Publish = Callable[[Node], Awaitable[None]]
"""Offer the node to the primary (an NBD export by the resource's name)."""

Withdraw = Callable[[], Awaitable[None]]
"""End the export and its connections; when it returns no forwarded write comes any more."""


class Secondary(End):
    """One secondary. All commands are coroutines of the worker's loop and run one at a time.

    `roots` are the nodes that a LUN can serve, by name: where top-id is looked up.
    `stage_changed` is called when a job has ended and the stage or the error is another one.
    `heard` says when the primary was heard last; `in_use` who uses the LUN, or None.
    `peer_name` is for messages. `settled` counts the calls of `settle`.
    """

    mode = Mode.SECONDARY

    def __init__(
        self,
        name: str,
        disk: Node,
        epochs: Epochs,
        *,
        top_id: str,
        durable: bool,
        publish: Publish,
        withdraw: Withdraw,
        roots: Mapping[str, Node] | None = None,
        stage_changed: Callable[[], None] = lambda: None,
        heard: Heard | None = None,
        in_use: Callable[[], str | None] = lambda: None,
        disk_name: str = "",
        peer_name: str = "the primary",
    ) -> None:
        super().__init__(name, disk, epochs.directory, disk_name)
        self._epochs = epochs
        self._durable = durable
        self._publish = publish
        self._withdraw = withdraw
        self._closed = Closed(
            disk.length, f"replication of {name} is not started, its secondary has no data to show"
        )
        self.filter = Replica("replication", disk.length, self._closed)
        self.top = Gate(self.filter)
        self._top_id = top_id
        self._roots: Mapping[str, Node] = {top_id: self.top} if roots is None else roots
        self._stage_changed = stage_changed
        self._pair: Pair | None = None
        self._next: Pair | None = None
        self._backup: CopyBeforeWrite | None = None
        self._export: Gate | None = None
        self._commit: Commit | None = None
        self._commit_task: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._cutting: asyncio.Task[None] | None = None
        self._in_use = in_use
        self._peer_name = peer_name
        self._forwarded_writes = 0
        self._told = False  # the primary has said since this process began what there is to know
        self.heard = Heard() if heard is None else heard
        self.settled = 0
        disk.on_lost = self._disk_lost

    # --- what is shown

    @property
    def job(self) -> Commit | None:
        """The commit, running or ended."""
        return self._commit

    @property
    def forwarded(self) -> Gate | None:
        """Where forwarded writes enter; None if none are taken."""
        return self._export

    @property
    def overlay_bytes(self) -> tuple[int, int]:
        """What active and hidden hold, in bytes of whole blocks."""
        if self._pair is None:
            return 0, 0
        return self._pair.active.allocated_bytes, self._pair.hidden.allocated_bytes

    @property
    def forwarding_in_flight(self) -> int:
        """Forwarded requests under way."""
        return 0 if self._export is None else self._export.in_flight

    @property
    def last_forwarded(self) -> str:
        """About when the last forwarded write came, to a second; "" if none is known."""
        self._look_for_writes()
        return self.manifest.last_forwarded

    def _look_for_writes(self) -> None:
        if self._export is not None and self._export.writes != self._forwarded_writes:
            self._forwarded_writes = self._export.writes
            self.manifest = msgspec.structs.replace(self.manifest, last_forwarded=now())

    # --- life

    async def open(self) -> None:
        """Take up what the manifest says. Raises `Error`, with nothing changed."""
        found = self._load()
        if found is not None and not self._is_ours(found):
            self._exchange_role(found)
            found = None
        if found is not None and found.stage is not Stage.NONE:
            await self._resume(found)
        # Only now: what the manifest names has been opened, so nothing else is needed any more.
        self._epochs.sweep(None if found is None or found.stage is Stage.DONE else found.epoch)
        self._opened = True

    async def _resume(self, found: Manifest) -> None:
        self.manifest = found
        if found.stage is Stage.DONE:
            self.machine = Machine(Mode.SECONDARY, found.stage, found.error)
            self._show_disk()
            return
        error = self._after_restart(found)
        pair = self._epochs.open(found.epoch)
        try:
            # Slots of forgotten blocks are taken anew now: those marks must not come back with a loss of power.
            await settle(pair.hidden.sync_map())
            await settle(pair.active.sync_map())
            self._save(
                boot=boot.boot_id(),
                clean=False,
                whole=found.whole or found.clean,
                error=error,
                error_at=found.error_at or (now() if error else ""),
            )
            self._pair = pair
            if found.stage is Stage.RUNNING:
                self.machine = Machine(Mode.SECONDARY, Stage.RUNNING, error)
                await self._activate(pair)
            else:
                # A commit that failed is tried again: the disk may have been mended meanwhile.
                self.machine = Machine(Mode.SECONDARY, Stage.FAILOVER, error)
                self._start_commit()
        except Error:
            self._pair = None
            pair.close()
            raise

    def _is_ours(self, found: Manifest) -> bool:
        """Whether it is a secondary's. Raises `Error` if this host is still a primary."""
        if found.mode is not Mode.SECONDARY and found.stage is Stage.RUNNING:
            raise Error(
                Kind.BAD_CONFIG,
                f"this host is a running primary of {self.name}, but the resource file makes it the secondary; "
                "stop replication before the roles are changed",
            )
        return found.mode is Mode.SECONDARY

    def _after_restart(self, found: Manifest) -> str | None:
        """The error to go on with: this process may have died, or the host have lost its page cache."""
        if found.boot == boot.boot_id() or found.clean:
            return found.error
        reason = "this host went down without a clean stop"
        if found.stage is Stage.RUNNING:
            reason += ": forwarded writes since the last flush may be missing"
            if self._durable:
                return found.error or reason
            disk = "The disk was not touched"
        else:
            if found.whole:
                return found.error
            reason += ": what the LUN wrote may be missing"
            disk = "The commit had copied nothing yet; the disk has what was forwarded and what the LUN wrote since"
        raise Error(
            Kind.INVALID_STATE,
            f"{reason}, and with durable = false the checkpoint may be torn. {disk}; "
            f"copy the primary's disk, move {self._directory} away and start again",
        )

    async def close(self) -> None:
        """End the process's part; a running secondary is taken up again at the next open."""
        async with self._lock:
            suspend = self._opened and self.machine.ask(Operation.CLOSE) is Action.SUSPEND
            self._opened, self._ended = False, True
            self._look_for_writes()
            await self._end_tasks()
            if self._export is not None:
                await self._withdraw()
                self._export = None
            if suspend and self._pair is not None:
                await settle(self.disk.flush())
                await settle(self._pair.active.flush())
                await settle(self._pair.hidden.flush())
                self._save(clean=True)
            if self._next is not None:
                self._next.destroy()
                self._next = None
            if self._pair is not None:
                self._pair.close()
                self._pair = None

    async def _end_tasks(self) -> None:
        if self._commit_task is not None:
            self._commit_task.cancel()
            await asyncio.gather(self._commit_task, return_exceptions=True)
        if self._sweeper is not None:
            await self._sweeper
        if self._watcher is not None:
            self._watcher.cancel()
        if self._cutting is not None:
            await asyncio.gather(self._cutting, return_exceptions=True)

    # --- commands

    async def init(self) -> None:
        """Make this directory the resource's. Raises `Error(INVALID_STATE)` if it is that already."""
        async with self._command():
            if self.manifest.sequence:
                raise Error(Kind.INVALID_STATE, f"{self._directory} has a manifest of {self.name} already")
            self._save()

    async def start(
        self,
        mode: Mode,
        *,
        again: bool = False,
        compare: bool = False,
        assume_clean: bool = False,
        force: bool = False,
        discard: bool = False,
    ) -> bool:
        """Begin to keep checkpoints; False if QEMU's rules ignore the command.

        `again` begins a new pairing where an earlier one is done. It is the primary that
        compares the disks; `assume_clean` is refused here where this host was promoted.
        `discard`: what was written to this host's LUN since its promotion, or since
        replication ended, may be lost. Raises the table's error or the first failed
        check's, with nothing started.
        """
        async with self._command():
            before = self.machine
            if again and self.stage in (Stage.NONE, Stage.DONE):
                self._refuse_to_discard(assume_clean=assume_clean, discard=discard)
                self.machine = Machine(Mode.SECONDARY)
            try:
                if self.machine.ask(Operation.START) is Action.IGNORE:
                    return False
                self.machine.check_mode(mode)
                await self._begin()
            except Error:
                self.machine = before
                raise
            log.info("%s: running as secondary, epoch 1", self.name)
            return True

    def _refuse_to_discard(self, *, assume_clean: bool, discard: bool) -> None:
        """Raise `Error` if data that somebody wrote to this host's LUN would be overwritten by the primary's."""
        if discard:
            return
        user = self._in_use()
        if user is not None and self.stage is Stage.DONE:  # before it shows no data
            raise Error(
                Kind.CONFLICT,
                f"the LUN of {self.name} is in use here ({user}): what is written to it would be lost. Stop its "
                "initiators and remove its exports first; or give up what they write: --discard-my-data",
            )
        if self.manifest.written_alone:
            since = (
                f" since its promotion at {self.manifest.promoted_at}" if self.manifest.promoted_at else ""
            )
            raise Error(
                Kind.CONFLICT,
                f"the LUN of {self.name} was written on this host{since}, while nothing was replicated: as a "
                "secondary it would be overwritten with the primary's data. If this host's data is the one that "
                "counts, copy it to the primary's disk first. To give it up: --discard-my-data",
            )
        if assume_clean and self.manifest.promoted_at:
            raise Error(
                Kind.MISCOMPARE,
                f"this host was promoted at {self.manifest.promoted_at}, so its disk is not known to be equal to the "
                "other's. Start without --assume-clean; the primary compares the disks",
            )

    async def _begin(self) -> None:
        """The first epoch. Requests are held: the LUN shows its disk, or nothing yet, until it begins."""
        if self._sweeper is not None:
            # What it removes is removed by name, and may have the names of the new pair.
            await self._sweeper
        pair = self._epochs.create(1)
        try:
            self.check_chain(pair.active, pair.hidden)
            async with self.top.quiet():
                await self._make_durable(pair)
                self._save(
                    stage=Stage.RUNNING,
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
                    outdated_at="",
                    promoted_at="",
                    superseded_at="",
                    detached_at="",
                    written_alone=False,
                    last_forwarded="",
                )
                self._pair = pair
                self.filter.alone = None
                self.machine.forget_error()
                self.machine.move(Operation.START)
                await self._activate(pair)
        except Error:
            if self._pair is not pair:
                pair.destroy()
            raise

    def check_chain(self, active: Node, hidden: Node) -> None:
        """What replication_start checks on a secondary, in its order and with its texts."""
        if not active.children:
            raise Error(Kind.BAD_CONFIG, stages.NO_ACTIVE_BACKING)
        if not hidden.children:
            raise Error(Kind.BAD_CONFIG, stages.NO_HIDDEN_BACKING)
        if hidden.children[0] is not self.disk:
            raise Error(Kind.BAD_CONFIG, stages.NO_DISK_BACKEND)
        if not active.length == hidden.length == self.disk.length:
            raise Error(Kind.BAD_CONFIG, stages.LENGTHS_DIFFER)
        if not (isinstance(active, Overlay) and isinstance(hidden, Overlay)):
            raise Error(Kind.UNSUPPORTED, stages.NO_MAKE_EMPTY)
        top = self._roots.get(self._top_id)
        if top is None or self.filter not in _walk(top):
            raise Error(Kind.BAD_CONFIG, stages.BAD_TOP)

    async def settle(self) -> None:
        """Return when no command is under way: what this end says then is not about to change."""
        async with self._command():
            self.settled += 1

    async def checkpoint(self, name: str = "") -> float | None:
        """Make the present the new baseline. The pause in milliseconds, or None if QEMU's rules ignore it.

        `name` is that of whoever asks, who may have to ask twice: a checkpoint of the
        same name is made once. A failure before the manifest is replaced leaves the old
        epoch in force.
        """
        async with self._command():
            with self._showing_a_checkpoint():
                return await self._make_checkpoint(name)

    async def _make_checkpoint(self, name: str) -> float | None:
        if self.machine.ask(Operation.CHECKPOINT) is Action.IGNORE:
            return None
        if name and name == self.manifest.checkpoint_id:
            return self.manifest.checkpoint_pause_ms
        if self._backup is None or self._export is None or self._pair is None:
            raise Error(Kind.INVALID_STATE, stages.BACKUP_GONE)
        self._check_ejected(self._pair)
        await self._prepare()
        new, self._next = self._next, None
        assert new is not None
        began = time.monotonic()
        self._export.hold()
        self.top.hold()
        try:
            return await self._switch(new, self._export, began, name)
        except BaseException:
            if self._pair is not new:  # else the manifest names it
                new.destroy()
            raise
        finally:
            self.top.release()
            self._export.release()

    async def prepare_checkpoint(self, epoch: int) -> None:
        """Do now what the checkpoint that ends `epoch` would else do while requests are held."""
        async with self._command():
            if self.machine.ask(Operation.CHECKPOINT) is Action.MOVE_EPOCH and epoch == self.epoch:
                await self._prepare()

    async def _prepare(self) -> None:
        """The next epoch's pair, and most of what the disk has to make durable."""
        if self._next is None:
            self._next = self._make_next()
        if self._durable:
            await self._make_durable(self._next)

    async def _make_durable(self, pair: Pair) -> None:
        """A pair that the manifest is going to rely on, and the disk as it is now."""
        await settle(pair.hidden.flush())
        await settle(pair.active.flush())
        await settle(self.disk.flush())

    def _check_ejected(self, pair: Pair) -> None:
        """An overlay whose files were taken away cannot be emptied."""
        if pair.active.ejected:
            raise Error(Kind.INVALID_STATE, stages.ACTIVE_EJECTED.format(name=pair.active.name))
        if pair.hidden.ejected:
            raise Error(Kind.INVALID_STATE, stages.HIDDEN_EJECTED.format(name=pair.hidden.name))

    def _make_next(self) -> Pair:
        try:
            return self._epochs.create(self.epoch + 1)
        except Error as error:
            raise Error(
                error.kind, stages.CANNOT_EMPTY.format(name="active or hidden", reason=error)
            ) from error

    async def _switch(self, new: Pair, export: Gate, began: float, name: str) -> float:
        """With requests held: wait for those in flight, then move to the next epoch."""
        export.unplug()
        self.top.unplug()
        await settle(export.drained())
        await settle(self.top.drained())
        if self._durable:
            await settle(self.disk.flush())
        pause = (time.monotonic() - began) * 1000
        self._save(
            epoch=self.epoch + 1,
            checkpoint_id=name,
            checkpoint_at=now(),
            checkpoint_pause_ms=round(pause, 3),
        )
        self._watch_syncs(new)
        old, self._pair = self._pair, new
        assert self._backup is not None
        assert old is not None
        self._backup.retarget(new.hidden)
        self.filter.reads = self.filter.writes = new.active
        self._tidy_up(self._epochs.retire(old))
        log.info("%s: checkpoint, epoch %d", self.name, self.epoch)
        return (time.monotonic() - began) * 1000

    async def failover(self, *, latest: bool, force: bool = False, fenced: bool = False) -> bool:
        """Make this end the one that counts; False if QEMU's rules ignore the command.

        To the checkpoint (plus own writes), or to the `latest` write that the primary
        had acknowledged. The LUN is writable when it returns. Raises `Error(CONFLICT)`
        while the primary lives, unless `fenced` (whoever asks has made sure that it is
        off) or `force`; and `Error(INVALID_STATE)` if what it would serve is known not to
        be what it is asked for, unless `force`.
        """
        operation = Operation.FAILOVER_TO_LATEST if latest else Operation.FAILOVER
        async with self._command():
            action = self.machine.ask(operation)
            if action is Action.IGNORE:
                return False
            self._look_for_writes()
            if not force:
                if not fenced:
                    self._refuse_while_primary_lives()
                self._refuse_what_is_old(latest=latest)
            if action is Action.DROP_OVERLAYS:
                await self._serve_disk(operation, promoted=True)
            else:
                self._save(stage=Stage.FAILOVER, whole=self._durable, promoted_at=now())
                await self._end_backup()
                self.machine.move(operation)
                self._start_commit()
            log.warning("%s: failed over to the %s", self.name, "latest write" if latest else "checkpoint")
            return True

    def _refuse_while_primary_lives(self) -> None:
        ago = self.heard.ago_s
        if ago is None or not self.heard.alive:
            return
        raise Error(
            Kind.CONFLICT,
            f"the primary of {self.name}, {self._peer_name}, lives: it was heard {ago:.1f} s ago, and counts as gone "
            f"{max(0.0, self.heard.dead_after_s - ago):.1f} s from now if it is not heard again. If {self._peer_name} "
            "is surely powered off: --fenced. To take over from a primary that lives, stop its initiators first; then "
            f"--force: {self._peer_name} stops serving when it hears of it, and what it had not acknowledged is lost. "
            "(A `switch` of the roles that loses nothing is not there yet.)",
        )

    def _refuse_what_is_old(self, *, latest: bool) -> None:
        """Raise `Error` if this host knows that it has not what a failover promises."""
        manifest = self.manifest
        last = (
            f" The last forwarded write came at {manifest.last_forwarded}." if manifest.last_forwarded else ""
        )
        if not latest:
            if manifest.paired and not manifest.verified:
                raise Error(
                    Kind.INVALID_STATE,
                    f"the disks of {self.name} were not found to be equal yet (start compares them): the checkpoint "
                    f"may be an image that {self._peer_name} never had. If {self._peer_name} can be brought back, do "
                    "that. --force uses it as it is",
                )
            if manifest.suspect is not None:
                raise Error(
                    Kind.INVALID_STATE,
                    f"the checkpoint of {self.name} may be damaged: {manifest.suspect}. If {self._peer_name} can "
                    "serve, let it. --to latest does not need the checkpoint. --force uses it as it is: what it "
                    "shows may be a mix of old and new data",
                )
            return
        to_checkpoint = (
            f" --to checkpoint gives the state of {manifest.checkpoint_at}, whole."
            if manifest.suspect is None and manifest.verified
            else ""
        )
        if manifest.outdated_at or self.machine.error is not None:
            since = manifest.outdated_at or manifest.error_at
            raise Error(
                Kind.INVALID_STATE,
                f"this host's disk of {self.name} is outdated since {since}: {self.machine.error}.{last} If "
                f"{self._peer_name} can be brought back, do that: it has what is missing here.{to_checkpoint} "
                f"--force serves what is here, and gives up what was acknowledged since {since}",
            )
        if manifest.paired and not manifest.verified:
            raise Error(
                Kind.INVALID_STATE,
                f"the disks of {self.name} were not found to be equal yet (start compares them): this one may have "
                f"old data anywhere. If {self._peer_name} can be brought back, do that. --force serves what is here",
            )
        if manifest.paired and not self._told:
            raise Error(
                Kind.INVALID_STATE,
                f"{self._peer_name} was not heard since the worker of {self.name} was started here: it may have gone "
                f"on without this host, and what it then acknowledged is not here.{last} If {self._peer_name} can be "
                f"brought back, do that: status says then whether anything is missing.{to_checkpoint} --force serves "
                "what is here",
            )

    async def stop(self, *, force: bool = False) -> bool:
        """End replication with a last checkpoint: the LUN serves what the primary wrote. False if ignored.

        Raises `Error(INVALID_STATE)` if that is known to be old, unless `force`.
        """
        async with self._command():
            if self.machine.ask(Operation.STOP) is Action.IGNORE:
                return False
            user = self._in_use()
            if user and not force and (self.manifest.outdated_at or self.machine.error is not None):
                since = self.manifest.outdated_at or self.manifest.error_at
                raise Error(
                    Kind.INVALID_STATE,
                    f"this host's disk of {self.name} is outdated since {since} ({self.machine.error}); after stop its "
                    f"LUN would serve that to whoever uses it here ({user}). Remove its exports here first",
                )
            await self._serve_disk(Operation.STOP, promoted=False)
            log.info("%s: stopped after a last checkpoint", self.name)
            return True

    async def backup_ended(self, reason: str) -> None:
        """The backup job is gone without a failover: no pre-images any more, so no forwarded writes either."""
        async with self._command():
            if self.machine.ask(Operation.BACKUP_ENDED) is Action.RECORD_ERROR:
                self._record(reason)
                self._save()
            await self._end_backup()
            self._stage_changed()

    async def cancel_commit(self) -> None:
        """End the commit before its time, as if it had failed: the LUN stays right, the next open tries again.

        Raises `Error(INVALID_STATE)` if none is under way.
        """
        async with self._command():
            if self.stage is not Stage.FAILOVER or self._commit_task is None:
                raise Error(Kind.INVALID_STATE, f"no commit of {self.name} is under way")
            self._commit_task.cancel()
            await asyncio.gather(self._commit_task, return_exceptions=True)
            if self.stage is Stage.FAILOVER and self._commit is not None:
                self._commit.end(JobStatus.CANCELLED, "cancelled")  # its task may not even have begun
                self._commit_failed(
                    Error(Kind.CANCELLED, "cancelled; the worker's next start goes on with it")
                )

    # --- steps

    async def _activate(self, pair: Pair) -> None:
        """Save pre-images into the pair, show it, and let the primary in."""
        self._backup = CopyBeforeWrite(
            self.disk, pair.hidden, durable=self._durable, failed=self._forwarding_failed
        )
        self.filter.reads = self.filter.writes = pair.active
        self._watch_syncs(pair)
        self._export = Gate(self._backup)
        self._forwarded_writes = 0
        await self._publish(self._export)
        self._watcher = background(self._watch_primary())

    def _forwarding_failed(self, error: Error) -> None:
        """A forwarded write was answered with an error: the primary knows, and so shall who looks here."""
        if self.machine.error is not None:
            return
        self._record(f"a forwarded write failed: {error}")
        log.error("%s: a forwarded write failed; the primary was told: %s", self.name, error)
        self._write_down()

    def _watch_syncs(self, pair: Pair) -> None:
        pair.hidden.tell_lost(self._overlay_lost)
        pair.active.tell_lost(self._overlay_lost)

    def _disk_lost(self, error: Error) -> None:
        """A sync of the disk failed: acknowledged writes may be on no medium."""
        reason = f"this host's disk could not make writes durable: {error}. Forwarded writes may be lost here"
        if self._durable:  # each block that may be lost was saved before it was overwritten
            self._lost(reason)
        else:
            self._lost(reason, suspect=self.manifest.suspect or reason)

    def _overlay_lost(self, error: Error) -> None:
        """A sync of an overlay failed: the checkpoint and own writes may be on no medium."""
        reason = f"an overlay could not be made durable: {error}"
        self._lost(reason, suspect=self.manifest.suspect or reason)

    def _lost(self, reason: str, **changes: object) -> None:
        """Write it down at once, and let the primary hear of it: it connects anew, and asks."""
        self._record(reason)
        log.critical("%s: %s", self.name, reason)
        self._write_down(**changes)
        self._stage_changed()
        if self._export is not None and (self._cutting is None or self._cutting.done()):
            self._cutting = background(self._cut(self._export))

    async def _cut(self, export: Gate) -> None:
        """Hang up on the primary; it may come back, and hears what is wrong."""
        await self._withdraw()
        if self._export is export and not self._ended:
            await self._publish(export)

    # --- the primary's word

    async def hear(self, generation: str | None, news: News) -> None:
        """The primary says hello, in the `generation` that it believes in. Raises `Error` if it cannot be noted."""
        self.heard.note()
        self._look_for_writes()
        manifest = self.manifest
        if self.stage is not Stage.RUNNING or generation != manifest.generation:
            return
        self._told = True
        changes: dict[str, object] = {}
        if not manifest.paired:
            changes["paired"] = True
        if news.verified and not manifest.verified:
            changes["verified"] = True
        if news.outdated_at and not manifest.outdated_at:
            missed = f"; {format_size(news.missed_bytes)} are known to differ" if news.missed_bytes else ""
            self._record(
                f"{self._peer_name} goes on without this host since {news.outdated_at} ({news.reason}){missed}"
            )
            log.error("%s: outdated: %s", self.name, self.machine.error)
            changes["outdated_at"] = news.outdated_at
        if news.disk_error and not manifest.peer_disk_error:
            log.error("%s: %s says: %s", self.name, self._peer_name, news.disk_error)
            changes["peer_disk_error"] = news.disk_error
        if changes:
            self._save(**changes)
            if "outdated_at" in changes or "peer_disk_error" in changes:
                self._stage_changed()

    async def _watch_primary(self) -> None:
        """Once a second: when was the last write; and when the primary is not heard any more, note that."""
        alive = False
        while True:
            await asyncio.sleep(PERIOD_S)
            self._look_for_writes()
            if alive and not self.heard.alive:
                log.warning(
                    "%s: %s is not heard since %s; what it had acknowledged until then is here",
                    self.name,
                    self._peer_name,
                    self.heard.at,
                )
                self._write_down()
            alive = self.heard.alive

    def _show_disk(self) -> None:
        """The LUN is the disk; its first write is noted."""
        self.filter.reads = self.filter.writes = self.disk
        self.filter.alone = self._written_alone

    def _written_alone(self) -> None:
        if (self.manifest.written_alone and not self._unwritten) or self._write_down(written_alone=True):
            self.filter.alone = None

    async def _end_backup(self) -> None:
        """No forwarded write after this."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if self._export is not None:
            await self._withdraw()
            self._export.unplug()
            await settle(self._export.drained())
        self._export = None
        self._backup = None
        if self._next is not None:
            self._tidy_up(self._epochs.remove(self._next))
            self._next = None

    async def _serve_disk(self, operation: Operation, *, promoted: bool) -> None:
        """Drop both overlays: the LUN is the disk."""
        self._save(stage=Stage.DONE, promoted_at=now() if promoted else "")
        await self._end_backup()
        async with self.top.quiet():
            self._show_disk()
            self.machine.move(operation)
        old, self._pair = self._pair, None
        if old is not None:
            self._tidy_up(self._epochs.remove(old))

    def _start_commit(self) -> None:
        assert self._pair is not None
        hidden, active = self._pair
        threads = Offload(threads=commits.THREADS, niceness=BACKGROUND)
        self._commit = Commit(f"commit-{self.name}", active, hidden, self.disk, self.top, threads)
        self.filter.reads = active
        self.filter.writes = Split(active, hidden, self.disk, self._commit.redo)
        self._commit_task = background(self._run_commit(self._commit, threads))

    async def _run_commit(self, commit: Commit, threads: Offload) -> None:
        """Carry the commit to its end and take the stage where that leads."""
        try:
            await asyncio.sleep(GRACE_S)
            await self._make_whole()
            await commit.run()
            async with self.top.quiet():  # what is under way may still use the overlays
                # It was served all the time, and may have been written.
                self._save(stage=Stage.DONE, error=None, written_alone=True)
                self._show_disk()
        except Error as error:
            commit.end(JobStatus.FAILED, str(error))
            self._commit_failed(error)
            return
        finally:
            threads.close()
        self.machine.forget_error()
        self.machine.move(Operation.COMMIT_DONE)
        old, self._pair = self._pair, None
        log.info("%s: commit done, %d bytes", self.name, commit.offset)
        if old is not None:
            self._tidy_up(self._epochs.remove(old))
        self._stage_changed()

    async def _make_whole(self) -> None:
        """Before a commit copies anything: what it copies from must be there after a loss of power too."""
        assert self._pair is not None
        if not self.manifest.whole:
            await self._make_durable(self._pair)
            self._save(whole=True)

    def _commit_failed(self, error: Error) -> None:
        """The LUN stays right from the overlays and the disk together; the next open tries again."""
        self._record(f"commit to the disk failed: {error}")
        self.machine.move(Operation.COMMIT_FAILED)
        log.error("%s: commit to the disk failed: %s", self.name, error)
        self._write_down(stage=Stage.FAILOVER_FAILED)
        self._stage_changed()

    def _tidy_up(self, work: Callable[[], None]) -> None:
        """Put an old pair away in a thread: it may take a processor for as long as there was data, not us."""
        previous = self._sweeper

        async def sweep() -> None:
            if previous is not None:
                await previous
            thread = Offload(threads=1, niceness=BACKGROUND)
            try:
                await thread(work, "put old overlays away").wait()
            except Error as error:
                log.warning("%s: old overlays stay until the next start: %s", self.name, error)
            finally:
                thread.close()

        self._sweeper = background(sweep())


def _walk(node: Node) -> list[Node]:
    """The node and all below it."""
    found = [node]
    for child in node.children:
        found += _walk(child)
    return found
