"""The primary's end: forwards writes, commands the pair's checkpoints, remembers what the peer missed.

    the LUN -> gate (top) -> mirror -+-> disk
                                     +-> replication filter -> remote (NBD) ~~~> the secondary

The filter hangs below the mirror only while replication runs. The first write
that the secondary does not take opens a gap: nothing is forwarded any more, so
the peer's disk stays at a point in time that this one had, and what it misses
is marked, block by block, in a map that survives this process. As in QEMU the
LUN goes on and the error is recorded; other than QEMU, a checkpoint is refused
from then on, since it would make a baseline of a disk that misses writes. The
secondary is told as soon as it can be reached.

What could make the disks differ is written down before it can: the manifest says
that this host writes, until a clean end takes that away; the log of writes in
flight says where, for as long as the host lives. Both need no space.

Where this host cannot know that its data is the pair's last word, the LUN is
there and not ready: after the host went down, until the peer has said that it
was not promoted meanwhile; without a manifest, if the peer knows this resource
as a pair; and for good when the peer was promoted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from tcmu_replication.background import background
from tcmu_replication.block import boot
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.in_flight import InFlight
from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import BACKGROUND, Offload
from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.block.replication import Forward, NotReady
from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.jobs.compare import Compare, Difference, digests
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.replication.end import LONGEST, End, now
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.missed import Missed
from tcmu_replication.replication.peer_state import News, Peer, PeerState
from tcmu_replication.replication.pulse import Heard, Pulse
from tcmu_replication.replication.stages import Action, Machine, Mode, Operation, Stage
from tcmu_replication.units import BLOCK, MiB, format_size

log = logging.getLogger(__name__)

PROBES = 64
"""Blocks that start compares at once, beside the first and the last mebibyte: disks that were never made equal show."""

RETRY_S = 1.0
"""The pause before something that failed for want of the peer, or of the disk, is tried again."""

DETACHED = "the local disk failed; the secondary serves"

THE_WAY_BACK = (
    "stop the initiators; tcmu-replication stop {name} here and on the secondary; copy this host's disk to the "
    "secondary's disk; start the secondary, then this host: start compares both disks"
)


class Primary(End):
    """One primary. All commands are coroutines of the worker's loop and run one at a time.

    `connect(verify)` makes the remote node of the secondary's export, not yet
    open; it awaits `verify` before a connection counts. `detach` says that the
    peer serves where the local disk fails. With a `pulse` the peer is asked and
    told every second, over `beats`, and before this host serves after it went down; without
    one (the peer is QEMU) nobody can be asked. `in_flight` is where writes under way
    are noted: best on a file system in memory, since a store into a page of a disk that
    hangs would stop the whole process. `peer_name` is for messages.
    """

    mode = Mode.PRIMARY

    def __init__(
        self,
        name: str,
        disk: Node,
        connect: Callable[[Callable[[], Awaitable[None]]], Remote],
        peer: Peer,
        directory: Path,
        *,
        detach: bool = False,
        failed: Callable[[Failure], None] = lambda failure: None,
        stage_changed: Callable[[], None] = lambda: None,
        pulse: Pulse | None = None,
        beats: Peer | None = None,
        heard: Heard | None = None,
        wait_after_crash: bool = True,
        in_flight: Path | None = None,
        disk_name: str = "",
        peer_name: str = "the secondary",
    ) -> None:
        super().__init__(name, disk, directory, disk_name)
        self._connect = connect
        self._peer = peer
        self._beats = beats or peer
        self._detach = detach
        self._failed = failed
        self._stage_changed = stage_changed
        self._pulse = pulse
        self._wait_after_crash = wait_after_crash
        self._in_flight_path = in_flight or directory / "in-flight"
        self._peer_name = peer_name
        self._removed = False
        self._waiting: Manifest | None = None
        self._waits_on: str = ""
        self._in_flight: InFlight | None = None
        self._compare: Compare | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._healing: asyncio.Task[None] | None = None
        self.heard = Heard() if heard is None else heard
        self.remote: Remote | None = None
        self.filter: Forward | None = None
        self.mirror = Mirror("mirror", disk, report=self._report, may_detach=self._may_detach)
        self.mirror.alone = self._written_alone
        self.top = Gate(self.mirror)
        self.missed = Missed(directory / "out-of-sync.map", disk.length)
        disk.on_lost = self._disk_lost

    # --- what is shown

    @property
    def job(self) -> Job | None:
        """A primary has no jobs that a controller knows; see `comparing`."""
        return None

    @property
    def comparing(self) -> Compare | None:
        """The comparison while it runs."""
        job = self._compare
        return job if job is not None and job.status is JobStatus.RUNNING else None

    @property
    def out_of_sync_bytes(self) -> int:
        """What the secondary is known to miss, in bytes of whole blocks."""
        return self.missed.bytes

    @property
    def removed(self) -> bool:
        """Whether the replica was taken out of the mirror while replication runs."""
        return self._removed

    @property
    def forwards(self) -> bool:
        """Whether what is written goes to the secondary now."""
        return self.filter is not None and self.filter.gap is None and self.stage is Stage.RUNNING

    # --- life

    async def open(self) -> None:
        """Take up what the manifest says. Raises `Error`, with nothing changed."""
        found = self._load()
        if found is not None and not self._is_ours(found):
            self._exchange_role(found)
            found = None
        elif found is None and self._pulse is not None:
            self._wait_for_peer(
                f"{self._directory} has no manifest of {self.name}; {self._peer_name} is asked whether it knows of a "
                f"pair. If {self.name} is new: tcmu-replication init {self.name}",
                self._new_here,
            )
        if found is not None:
            self.manifest = found
            self.machine = Machine(Mode.PRIMARY, found.stage, found.error)
            if found.superseded_at:
                self._set(NotReady(self.mirror, self._superseded(found.superseded_at)))
            elif found.stage is Stage.RUNNING and self._must_ask(found):
                self._waiting = found
                self._wait_for_peer(
                    f"this host was down; {self._peer_name} is asked whether it was promoted meanwhile. If it cannot "
                    f"answer and was surely not promoted: tcmu-replication start {self.name} --force",
                    self._still_ours,
                )
            elif found.stage is Stage.RUNNING:
                self._resume(found)
        self._opened = True

    def _must_ask(self, found: Manifest) -> bool:
        """In another boot the peer may have been promoted for as long as this host was down."""
        return self._pulse is not None and self._wait_after_crash and found.boot != boot.boot_id()

    def _is_ours(self, found: Manifest) -> bool:
        """Whether it is a primary's. Raises `Error` if this host is still a secondary."""
        if found.mode is not Mode.PRIMARY and found.stage not in (Stage.NONE, Stage.DONE):
            raise Error(
                Kind.BAD_CONFIG,
                f"this host is a secondary of {self.name} in stage {found.stage.value}, but the resource file "
                "makes it the primary; fail over or stop before the roles are changed",
            )
        return found.mode is Mode.PRIMARY

    def _resume(self, found: Manifest) -> None:
        """Go on as a running primary after a restart of this process or of this host."""
        has_map = self.missed.path.exists()
        self.missed.open()
        if not found.map_complete or not has_map:
            self.missed.complete = False
        self._in_flight = InFlight(self._in_flight_path, self.disk.length)
        this_boot = boot.boot_id()
        outdated_at = found.outdated_at
        reason = None if found.clean else self._what_was_under_way(this_boot)
        if not has_map and not found.detached_at:
            reason = reason or f"{self.missed.path} is gone: what the secondary misses is not known"
        if reason is not None:
            self._record(reason)
            outdated_at = outdated_at or now()
        self._save(boot=this_boot, clean=False, outdated_at=outdated_at, map_complete=self.missed.complete)
        self._in_flight.clear()
        remote = self._connect(self.verify)
        gap = Error(Kind.PEER_LOST, str(self.machine.error)) if outdated_at else None
        if gap is None:
            remote.open_later()
        else:
            remote.close()  # it would be connected and get nothing
        self._attach(remote, gap)
        self._begin_pulse()
        self._heal()
        if not found.verified and gap is None:
            self._begin_comparison()

    def _what_was_under_way(self, this_boot: str) -> str | None:
        """After an end that was not clean: mark what may differ. Why that is not known, if it is not."""
        if self.manifest.detached_at:
            return None  # one disk alone has what was written
        if self.manifest.boot != this_boot:
            return (
                "this host went down without a clean stop: the disks may differ in what was written since the last "
                "flush"
            )
        assert self._in_flight is not None
        if self._in_flight.found is None:
            return (
                "the worker died, and which writes were under way is not known: the disks may differ in those"
            )
        for offset, length in self._in_flight.found:
            self.missed.mark(offset, length)
        if not self.missed.complete:
            return (
                "the worker died, and the writes under way could not be noted: the disks may differ in those"
            )
        return None

    async def close(self) -> None:
        """End the process's part; a running primary is taken up again at the next open."""
        async with self._lock:
            suspend = (
                self._opened and self._waiting is None and self.machine.ask(Operation.CLOSE) is Action.SUSPEND
            )
            self._opened, self._ended = False, True
            if self._pulse is not None:
                await self._pulse.stop()
            await self._end_tasks()
            if suspend:
                try:
                    flushed = self.mirror.flush()
                    self.mirror.unplug()
                    await settle(flushed)
                    self.missed.flush()  # after a clean end nothing else says what differs
                    self._save(clean=True)
                except Error as error:
                    log.error("%s: not stopped cleanly: %s", self.name, error)
            await self._hang_up()
            self.missed.close()
            if self._in_flight is not None:
                self._in_flight.close()

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = background(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- before this host knows that it may serve

    def _set(self, node: Node) -> None:
        """Serve `node`; for the time before anybody asks for anything."""
        self.top.hold()
        self.top.swap(node)
        self.top.release()

    def _wait_for_peer(self, reason: str, decide: Callable[[PeerState], Awaitable[bool]]) -> None:
        """Not ready, until `decide` has decided by what the peer says."""
        self._set(NotReady(self.mirror, reason, waits=True))
        log.warning("%s: not ready: %s", self.name, reason)
        assert self._pulse is not None

        async def ask() -> None:
            state = await self._beats.hello(self._news())
            self.heard.note()
            if self._waiting is self.manifest or self.manifest.sequence == 0:
                async with self._lock:
                    if self.top.not_ready is not None and await decide(state):
                        self._stage_changed()

        self._pulse.start(ask)

    async def _still_ours(self, state: PeerState) -> bool:
        """After this host was down: the peer's word."""
        found = self._waiting
        if found is None:
            return True
        if self._is_promoted(state):
            await self._end_waiting()
            self._supersede(state)
        elif not state.generation:
            return await self._wait_on(
                f"this host was down, and {self._peer_name} knows nothing of this pair: the file system of its "
                "overlays may not be mounted. Mount it and restart the worker there. Only if that is lost for good "
                f"and {self._peer_name} was surely not promoted: tcmu-replication start {self.name} --force"
            )
        else:
            await self._take_up(found)
        return True

    async def _wait_on(self, reason: str) -> bool:
        """Not ready still, and since the peer has spoken for another reason. Whether that is new."""
        if self._waits_on == reason:
            return False
        self._waits_on = reason
        log.error("%s: not ready: %s", self.name, reason)
        await self._install(NotReady(self.mirror, reason, waits=True))
        return True

    async def _take_up(self, found: Manifest) -> None:
        """It is still ours: go on as the running primary."""
        await self._end_waiting()
        self._resume(found)
        await self._install(self.mirror)
        log.warning("%s: ready: this host goes on as the primary", self.name)

    async def _new_here(self, state: PeerState) -> bool:
        """No manifest here: the peer's word."""
        if state.paired or state.promoted_at:
            await self._end_waiting()
            reason = (
                f"{self._directory} has no manifest, but {self._peer_name} knows {self.name} as a pair: its file "
                "system may not be mounted. Mount it and restart the worker. Only if it is lost for good, and this "
                f"host's disk has the pair's last data: tcmu-replication start {self.name} --force"
            )
            await self._install(NotReady(self.mirror, reason))
            log.error("%s: not ready: %s", self.name, reason)
            return True
        await self._end_waiting()
        await self._install(self.mirror)
        log.info("%s: ready: %s knows of no pair", self.name, self._peer_name)
        return True

    async def _end_waiting(self) -> None:
        self._waiting = None
        if self._pulse is not None:
            await self._pulse.stop()

    # --- the peer's word

    def _begin_pulse(self) -> None:
        if self._pulse is not None:
            self._pulse.start(self._beat)

    async def _beat(self) -> None:
        """Once a second: tell and hear."""
        if self._unwritten:
            self._write_down()
        state = await self._beats.hello(self._news())
        self.heard.note()
        if self.stage is Stage.RUNNING:
            with contextlib.suppress(Error):  # what is wrong with it is recorded
                self._judge(state)

    def _news(self) -> News:
        manifest = self.manifest
        if self.stage is not Stage.RUNNING or not manifest.outdated_at:
            verified = manifest.verified and self.stage is Stage.RUNNING
            return News(verified=verified, disk_error=manifest.disk_error or "")
        return News(
            manifest.verified,
            manifest.outdated_at,
            self.machine.error or "",
            self.out_of_sync_bytes,
            manifest.disk_error or "",
        )

    def _is_promoted(self, state: PeerState) -> bool:
        return bool(state.promoted_at) and state.generation == self.manifest.generation

    def _judge(self, state: PeerState) -> None:
        """Raise `Error(CONFLICT)` unless the secondary is the one that has all we sent; and note what it is instead."""
        if self._is_promoted(state):
            self._supersede(state)
            raise Error(Kind.CONFLICT, self._superseded(state.promoted_at))
        if state.stage is not Stage.RUNNING or state.generation != self.manifest.generation:
            reason = (
                f"the secondary of {self.name} is not ours any more: stage {state.stage.value}, generation "
                f"{state.generation or 'none'} instead of {self.manifest.generation}"
            )
        elif state.error is not None:
            reason = f"the secondary of {self.name} may miss writes: {state.error}"
        else:
            self._learn(state)
            return
        self._open_gap(Error(Kind.CONFLICT, reason))
        raise Error(Kind.CONFLICT, reason)

    def _learn(self, state: PeerState) -> None:
        """A checkpoint whose answer was lost may have been made all the same."""
        if state.epoch > self.epoch:
            log.warning("%s: the secondary is in epoch %d: its checkpoint was made", self.name, state.epoch)
            self._write_down(epoch=state.epoch, checkpoint_id=state.checkpoint_id)

    async def verify(self) -> None:
        """Before a connection counts as good: is the peer still the one that has all we sent?

        Raises `Error(CONFLICT)` if not. The remote node asks this at every connect.
        """
        if self.stage is not Stage.RUNNING:
            return
        await self._ours()
        if self.manifest.outdated_at:
            raise Error(
                Kind.CONFLICT,
                f"{self._peer_name} misses writes since {self.manifest.outdated_at}; nothing is forwarded to it",
            )

    async def _ours(self) -> PeerState:
        """The state of the secondary, if it is the one that we started with and misses nothing."""
        state = await self._peer.hello(self._news(), settled=True)
        self.heard.note()
        self._judge_unless_outdated(state)
        return state

    def _judge_unless_outdated(self, state: PeerState) -> None:
        # It has been told that it is outdated, and says so as its error.
        if not self.manifest.outdated_at or self._is_promoted(state):
            self._judge(state)

    def _superseded(self, at: str) -> str:
        alone = self.manifest.outdated_at
        only_here = (
            f" What this host acknowledged since {alone}, when it went on alone, is on no other disk: save it before "
            "this one is overwritten."
            if alone
            else ""
        )
        return (
            f"{self._peer_name} was promoted at {at}: this host's disk is old from then on and is not served. Use "
            f"{self._peer_name}.{only_here} Only to give up what was written there, and go on with this host's disk: "
            f"tcmu-replication start {self.name} --force"
        )

    def _supersede(self, state: PeerState) -> None:
        """The peer was promoted: acknowledge nothing any more, and say so."""
        if self.manifest.superseded_at:
            return
        reason = self._superseded(state.promoted_at)
        log.critical("%s: %s", self.name, reason)
        not_ready = NotReady(self.mirror, reason)
        assert not_ready.not_ready is not None
        self.mirror.refuse(not_ready.not_ready)
        if self.filter is not None:
            self.filter.alone = True
        self.machine.forget_error()
        self._record(reason)
        self._write_down(stage=Stage.DONE, superseded_at=state.promoted_at)
        self.machine.move(Operation.STOP)
        self._spawn(self._step_down(not_ready))

    async def _step_down(self, not_ready: NotReady) -> None:
        if self._pulse is not None:
            await self._pulse.stop()
        if self.remote is not None:
            self.remote.close()
        await self._install(not_ready)
        self.mirror.remove()
        self._stage_changed()

    # --- commands

    async def init(self) -> None:
        """Make this directory the resource's: this host serves its disk alone until start.

        Raises `Error(INVALID_STATE)` if it is that already, or if the peer knows of a pair.
        """
        async with self._command():
            if self.manifest.sequence:
                raise Error(Kind.INVALID_STATE, f"{self._directory} has a manifest of {self.name} already")
            not_ready = self.top.not_ready
            if not_ready is not None and not_ready.kind is Kind.NOT_READY:
                raise Error(Kind.INVALID_STATE, str(not_ready))
            self._save()
            await self._end_waiting()
            await self._install(self.mirror)

    async def start(
        self,
        mode: Mode,
        *,
        again: bool = False,
        compare: bool = False,
        assume_clean: bool = False,
        force: bool = False,
    ) -> bool:
        """Begin to forward; False if QEMU's rules ignore the command.

        `again`: a pairing that is done begins anew. `compare`: both disks are compared as
        a whole, by hash, behind it; until then the pair is not in sync. `assume_clean`:
        the operator vouches that they are equal, which is refused where anything here says
        otherwise. `force`: this host's disk is the one that counts, although it waits for
        the peer's word, or was superseded.
        """
        async with self._command():
            if self._waiting is not None and force:
                await self._take_up(self._waiting)
                return True
            waits = self.top.not_ready is not None and self.manifest.sequence == 0
            if waits and not force:
                await self._new_here(await self._peer.hello(News()))
            if not force and self.top.not_ready is not None:
                raise Error(Kind.INVALID_STATE, str(self.top.not_ready))
            before = self.machine
            if again and self.stage is Stage.DONE:
                self.machine = Machine(Mode.PRIMARY)
            try:
                if self.machine.ask(Operation.START) is Action.IGNORE:
                    return False
                self.machine.check_mode(mode)
                if assume_clean:
                    self._refuse_assumption(before)
                await self._connect_and_begin(compare=compare and not assume_clean, probe=not assume_clean)
            except Error:
                self.machine = before
                raise
            log.info("%s: running as primary, epoch %d", self.name, self.epoch)
            return True

    def _refuse_assumption(self, before: Machine) -> None:
        """Raise `Error` if something here knows better than whoever vouches for equal disks."""
        known = []
        if self.manifest.written_alone:
            known.append("the LUN was written while nothing was replicated")
        if self.manifest.error or before.error:
            known.append(f"the record has an error ({self.manifest.error or before.error})")
        if self.manifest.outdated_at:
            known.append(f"the secondary misses writes since {self.manifest.outdated_at}")
        if self.manifest.superseded_at or self.manifest.detached_at or self.manifest.disk_error:
            known.append("this host's disk is older than the secondary's")
        if known:
            raise Error(
                Kind.MISCOMPARE,
                f"the disks of {self.name} are not known to be equal: {'; '.join(known)}. Start without "
                "--assume-clean, which compares them",
            )

    async def _connect_and_begin(self, *, compare: bool, probe: bool) -> None:
        state = await self._hello()
        remote = self._connect(self.verify)
        try:
            async with self._quiet():
                await remote.open()
                if probe:
                    await self._probe(remote)
                self._begin(state, remote, verified=not compare)
        except Error:
            remote.close()
            await remote.wait_closed()
            raise
        if self.top.not_ready is not None:
            await self._end_waiting()
            await self._install(self.mirror)
        with contextlib.suppress(Error):  # else the next beat tells it
            await self._ours()
        self._begin_pulse()
        if compare:
            self._begin_comparison()

    def _begin(self, state: PeerState, remote: Remote, *, verified: bool) -> None:
        """With requests held: from now on every write goes to both disks."""
        self.missed.open(anew=True)
        if self._in_flight is None:
            self._in_flight = InFlight(self._in_flight_path, self.disk.length)
        self._in_flight.clear()
        self._save(
            stage=Stage.RUNNING,
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
            disk_error=None if verified else self.manifest.disk_error,
            map_complete=True,
            written_alone=False,
        )
        self.machine.forget_error()
        self.machine.move(Operation.START)
        self._attach(remote, None)

    async def _hello(self) -> PeerState:
        """The secondary's state, checked for what start needs."""
        state = await self._peer.hello(News(), settled=True)
        self.heard.note()
        if state.stage is not Stage.RUNNING:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} is in stage {state.stage.value}; start it first "
                f"(tcmu-replication start {self.name}, on the secondary)",
            )
        if state.length != self.disk.length:
            raise Error(
                Kind.BAD_CONFIG,
                f"the secondary's disk has {state.length} bytes, this one {self.disk.length}; they must be equal",
            )
        if state.error is not None:
            raise Error(Kind.INVALID_STATE, f"the secondary of {self.name} has an error: {state.error}")
        return state

    async def _probe(self, remote: Remote) -> None:
        """Compare parts of both disks. Raises `Error(MISCOMPARE)` at the first difference."""
        length = self.disk.length
        ends = [(0, min(MiB, length)), (max(0, length - MiB), min(MiB, length))]
        blocks = [random.randrange(max(1, length // BLOCK)) * BLOCK for _ in range(PROBES)]
        for offset, size in [*ends, *((o, min(BLOCK, length - o)) for o in blocks)]:
            theirs = memoryview(bytearray(size))
            pending = remote.read(offset, [theirs])
            remote.unplug()
            await settle(pending)
            if self.disk.fetch(offset, size) != theirs:
                raise Error(
                    Kind.MISCOMPARE,
                    f"the disks of {self.name} differ. Stop the initiators, copy this host's disk to the "
                    "secondary's, and start both again; nothing may write to this LUN from the copy's beginning "
                    "until start has ended",
                    offset=offset,
                    length=size,
                )

    # --- the comparison of both disks

    def _begin_comparison(self) -> None:
        threads = Offload(threads=2, niceness=BACKGROUND)

        async def theirs(offset: int, length: int, piece: int) -> list[str]:
            try:
                return await self._peer.digests(offset, length, piece)
            except Error as error:
                if error.kind is not Kind.UNSUPPORTED or self.remote is None:
                    raise
                return await digests(self.remote, offset, length, piece, threads)

        job = self._compare = Compare(
            f"compare-{self.name}", self.disk, theirs, self._differs, self._quiet, threads
        )
        self._spawn(self._run_comparison(job, threads))

    def _differs(self, found: Difference) -> None:
        self.missed.mark(found.offset, found.length)

    async def _run_comparison(self, job: Compare, threads: Offload) -> None:
        try:
            await job.run()
        except Error as error:
            reason = f"the comparison of both disks failed: {error}"
            self._open_gap(Error(Kind.MISCOMPARE, reason))
            return
        except asyncio.CancelledError:
            job.end(JobStatus.CANCELLED, "cancelled")
            raise
        finally:
            threads.close()
        if not self.forwards:
            return
        if job.different:
            self._open_gap(
                Error(
                    Kind.MISCOMPARE,
                    f"the disks differ: {format_size(job.different)} of {format_size(job.length)}, first at byte "
                    f"{job.first}",
                )
            )
        elif self._write_down(verified=True, disk_error=None):
            log.info("%s: both disks are equal", self.name)
            with contextlib.suppress(Error):  # else the next beat tells it
                await self._peer.hello(self._news())
        self._stage_changed()

    # --- checkpoints

    async def checkpoint(self, name: str = "") -> float | None:
        """End the pair's epoch, as the checkpoint `name` if it has one.

        The pause in milliseconds, or None if QEMU's rules ignore it.
        New writes are held and those in flight awaited; then the secondary moves its
        epoch. If it does not answer, nothing is sent to it before it has said whether
        it has moved: a checkpoint that was given up never gets later writes.
        """
        async with self._command():
            with self._showing_a_checkpoint():
                return await self._make_checkpoint(name or str(uuid.uuid4()))

    async def _make_checkpoint(self, name: str) -> float | None:
        if self.machine.ask(Operation.CHECKPOINT) is Action.IGNORE:
            return None
        self._refuse_checkpoint()
        # Ours may be behind: a checkpoint whose answer was lost has moved the secondary alone.
        epoch = (await self._ours()).epoch
        await self._peer.prepare(epoch)
        began = time.monotonic()
        async with self._quiet():
            self._refuse_checkpoint()
            try:
                state = await self._peer.checkpoint(epoch, name)
            except Error as error:
                if self.remote is not None:
                    self.remote.renew(f"the checkpoint of epoch {epoch} was not confirmed: {error}")
                raise
            pause = (time.monotonic() - began) * 1000
        self._save(
            epoch=state.epoch,
            checkpoint_id=name,
            checkpoint_at=now(),
            checkpoint_pause_ms=round(pause, 3),
        )
        log.info("%s: checkpoint, epoch %d, paused for %.1f ms", self.name, state.epoch, pause)
        return pause

    def _refuse_checkpoint(self) -> None:
        if self._waiting is not None:
            raise Error(Kind.INVALID_STATE, str(self.top.not_ready))
        if self._removed and self.machine.error is None:
            raise Error(
                Kind.INVALID_STATE,
                f"the replica of {self.name} was removed from the mirror; add it again (x-blockdev-change) or stop",
            )
        if self.filter is not None and self.filter.gap is not None:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} misses writes ({self._known_missed()}: {self.machine.error}); a "
                f"checkpoint now would be a state that never was. To mend it: {THE_WAY_BACK.format(name=self.name)}",
            )
        if not self.manifest.verified:
            raise Error(
                Kind.INVALID_STATE,
                f"both disks of {self.name} are still being compared (status shows how far); a checkpoint now could "
                "be a state that never was",
            )
        if self.out_of_sync_bytes:
            raise Error(
                Kind.INVALID_STATE,
                f"{format_size(self.out_of_sync_bytes)} are still being sent to the secondary of {self.name} again; "
                "a checkpoint now could be a state that never was. Try again when status shows none",
            )
        if self.machine.error is not None and not self.mirror.detached:
            raise Error(Kind.INVALID_STATE, f"{self.name} has an error: {self.machine.error}")

    def _known_missed(self) -> str:
        least = "" if self.missed.complete else "at least "
        return f"{least}{format_size(self.out_of_sync_bytes)} are known to differ"

    # --- the replica as the mirror's child

    async def remove_replica(self) -> None:
        """Take the filter out of the mirror, as QEMU's x-blockdev-change does: nothing is forwarded any more.

        The stage stays; what is written from now on is marked as missed by the
        secondary, and is an error from the first such write. Raises `Error(INVALID_STATE)`.
        """
        async with self._command():
            if (
                self.filter is None
                or self.stage is not Stage.RUNNING
                or self.mirror.detached
                or self._removed
            ):
                raise Error(
                    Kind.INVALID_STATE, f"the mirror of {self.name} has no replica that could be removed"
                )
            async with self._quiet():
                if self.filter.gap is None:
                    self.filter.gap = Error(Kind.PEER_LOST, "the replica was removed from the mirror")
                self._removed = True
            log.warning("%s: the replica was removed from the mirror, nothing is forwarded", self.name)

    async def add_replica(self) -> None:
        """Put the filter back, over a new connection where the old one was closed.

        Raises `Error(INVALID_STATE)` if the secondary has missed anything meanwhile.
        """
        async with self._command():
            remote = self.remote
            if self.stage is not Stage.RUNNING or remote is None or not self._removed:
                raise Error(Kind.INVALID_STATE, f"no replica of {self.name} was removed")
            self._refuse_missed()
            await self.verify()
            if remote.state is State.CLOSED:
                remote = self.remote = self._connect(self.verify)  # there already, so that it can be cut off
                try:
                    await remote.open()
                except Error:
                    remote.close()
                    raise
            async with self._quiet():
                self._refuse_missed()
                # A flush that ended meanwhile did not reach the secondary.
                flushed = remote.flush()
                remote.unplug()
                await settle(flushed)
                self._attach(remote, None)
            if not self.manifest.verified and self.comparing is None:
                self._begin_comparison()
            log.info("%s: the replica is in the mirror again", self.name)

    def _refuse_missed(self) -> None:
        if self.machine.error is not None or self.out_of_sync_bytes:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} misses writes ({self._known_missed()}: {self.machine.error}). To mend "
                f"it: {THE_WAY_BACK.format(name=self.name)}",
            )

    async def failover(self, *, latest: bool, force: bool = False, fenced: bool = False) -> bool:
        """A primary has nothing to fail over to. Raises `Error(INVALID_STATE)`."""
        raise Error(
            Kind.INVALID_STATE,
            f"this host is the primary of {self.name} and serves already; fail over on the secondary, "
            "or stop replication here",
        )

    async def stop(self, *, force: bool = False) -> bool:
        """End replication: the LUN serves this disk alone. False if QEMU's rules ignore it.

        `force` is for the secondary, whose LUN may be old; a primary's is not.
        """
        async with self._command():
            if self.machine.ask(Operation.STOP) is Action.IGNORE:
                return False
            if self._waiting is not None:
                raise Error(Kind.INVALID_STATE, str(self.top.not_ready))
            if self.mirror.detached:
                raise Error(
                    Kind.INVALID_STATE,
                    f"the local disk of {self.name} has failed and the secondary serves; "
                    "stop the initiators and fail over there",
                )
            if self._pulse is not None:
                await self._pulse.stop()
                await self._tell_of_the_end()
            await self._end_tasks()
            async with self._quiet():
                self._save(stage=Stage.DONE, error=None, outdated_at="", written_alone=self._differs_by_now())
                self.mirror.remove()
                self.mirror.alone = self._written_alone
                self.machine.forget_error()
                self.machine.move(Operation.STOP)
            await self._hang_up()
            log.info("%s: stopped, serving the disk alone", self.name)
            return True

    async def _tell_of_the_end(self) -> None:
        """The LUN goes on alone: the secondary has to know, should it ever be asked for the latest."""
        if self.manifest.outdated_at:
            return  # it knows
        news = News(self.manifest.verified, now(), "replication was stopped there")
        try:
            await self._peer.hello(news)
        except Error as error:
            log.warning(
                "%s: %s could not be told that this host goes on alone: %s", self.name, self._peer_name, error
            )

    def _differs_by_now(self) -> bool:
        """Whether the disks are not known to be equal, so that nobody may vouch for it later."""
        return (
            bool(self.manifest.outdated_at)
            or not self.manifest.verified
            or self.machine.error is not None
            or self.out_of_sync_bytes > 0
        )

    # --- steps

    def _attach(self, remote: Remote, gap: Error | None) -> None:
        """Hang the filter below the mirror; with `gap` it only marks what the peer misses."""
        self._removed = False
        self.remote = remote
        self.filter = Forward("replication", remote, self._missed, gap)
        detached = bool(self.manifest.detached_at)
        self.filter.alone = detached
        self.mirror.attach(self.filter, remote, self._in_flight, detached=detached)

    async def _hang_up(self) -> None:
        if self.remote is not None:
            self.remote.close()
            await self.remote.wait_closed()

    def _heal(self) -> None:
        """Send again, behind, what is marked though nothing keeps it from being sent."""
        if self.forwards and self.out_of_sync_bytes and (self._healing is None or self._healing.done()):
            self._healing = self._spawn(self._resend())

    async def _resend(self) -> None:
        trouble = None
        forward = self.filter
        assert forward is not None

        def stopped() -> bool:
            return self.filter is not forward or not self.forwards or self.mirror.detached

        while self.out_of_sync_bytes and not stopped():
            try:
                await self.missed.resend(self.disk, forward, stopped)
            except Error as error:
                if trouble is None:
                    log.error("%s: what differs could not be sent again yet: %s", self.name, error)
                trouble = error
                await asyncio.sleep(RETRY_S)
        if not self.out_of_sync_bytes:
            log.info("%s: what may have differed was sent again", self.name)

    def _missed(self, offset: int, length: int, error: Error) -> bool:
        """The filter: the peer did not get this range, or fails a flush. Whether it is written down."""
        self.missed.mark(offset, length)
        if not self.manifest.outdated_at:
            self._open_gap(Error(error.kind, f"not forwarded: {error}"))
        elif self._unwritten or self.manifest.map_complete != self.missed.complete:
            self._write_down(map_complete=self.missed.complete)
        refusal = None
        if self._unwritten:
            refusal = Error(Kind.IO, f"{self._peer_name} misses this write, and that cannot be written down")
        self.mirror.refuse(refusal)
        return refusal is None

    def _open_gap(self, error: Error) -> None:
        """From now on the secondary misses what is written: record it before any of that is acknowledged."""
        if self.filter is not None and self.filter.gap is None:
            self.filter.gap = error
            if self.mirror.detached:
                log.error("%s: the secondary does not serve any more: %s", self.name, error)
        if self.manifest.outdated_at or self.mirror.detached:
            return  # without a disk here the secondary misses nothing that anybody has
        self._record(str(error))
        log.error("%s: the secondary misses writes from now on: %s", self.name, error)
        self._write_down(outdated_at=now(), map_complete=self.missed.complete)
        self._stage_changed()

    def _write_down(self, **changes: object) -> bool:
        """See `End._write_down`; what could not be noted is said in the memory that outlives this process."""
        done = super()._write_down(**changes)
        if not done and self._in_flight is not None:
            self._in_flight.set_unknown()
        return done

    def _written_alone(self) -> None:
        """The first write to the LUN while nothing is replicated."""
        if (self.manifest.written_alone and not self._unwritten) or self._write_down(written_alone=True):
            self.mirror.alone = None

    def _disk_lost(self, error: Error) -> None:
        """A sync of the local disk failed: what was written since the last one may be on no medium here."""
        reason = one_line(
            f"this host's disk could not make writes durable: {error}. What was written since the flush before may be "
            "lost here",
            LONGEST,
        )
        self._record(reason)
        log.critical("%s: %s", self.name, reason)
        self._write_down(disk_error=self.manifest.disk_error or reason)
        self._stage_changed()
        if self.stage is Stage.RUNNING:
            self._spawn(self._tell())

    async def _tell(self) -> None:
        """Tell the peer the news now, and not with the next beat."""
        with contextlib.suppress(Error):
            await self._beats.hello(self._news())

    def _report(self, failure: Failure) -> None:
        """The mirror: a child failed."""
        if failure.final and failure.child == self.disk.name and failure.operation not in ("read", "flush"):
            # The peer may have taken it. What is on this disk now is what both shall have.
            if not self.missed.mark(failure.offset, failure.length) and self.stage is Stage.RUNNING:
                self._open_gap(
                    Error(failure.error.kind, f"the disks differ, it is not known where: {failure.error}")
                )
            self._heal()
        if failure.child == self.disk.name and failure.operation == "flush" and self.machine.error is None:
            self._disk_lost(failure.error)
        log.error(
            "%s: %s failed to %s at %d, %d bytes: %s",
            self.name,
            failure.child,
            failure.operation,
            failure.offset,
            failure.length,
            failure.error,
        )
        self._failed(failure)

    def _may_detach(self) -> bool:
        """Go on without the local disk? Only if that is the policy, the peer has all, and it is written down."""
        if not self._detach or not self.forwards or self.out_of_sync_bytes or not self.manifest.verified:
            return False
        at = now()
        try:
            self._save(
                detached_at=at,
                error=self.machine.error or DETACHED,
                disk_error=self.manifest.disk_error or DETACHED,
                error_at=self.manifest.error_at or at,
            )
        except Error as error:
            log.error(
                "%s: the local disk is kept, since its failure cannot be written down: %s", self.name, error
            )
            return False
        self._record(DETACHED)
        assert self.filter is not None
        self.filter.alone = True
        self._spawn(self._tell())
        log.critical("%s: the local disk failed; the secondary serves from now on", self.name)
        return True
