"""The primary's end: forwards writes, commands the pair's checkpoints, remembers what the peer missed.

    the LUN -> gate (top) -> mirror -+-> disk
                                     +-> replication filter -> remote (NBD) ~~~> the secondary

The filter hangs below the mirror only while replication runs. The first write
that the secondary does not take opens a gap: nothing is forwarded any more, so
the peer's disk stays at a point in time that this one had, and what it misses
is marked, block by block, in a map that survives this process. As in QEMU the
LUN goes on and the error is recorded; other than QEMU, a checkpoint is refused
from then on, since it would make a baseline of a disk that misses writes.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from tcmu_replication.block import allocation_map, boot
from tcmu_replication.block.allocation_map import HERE, AllocationMap
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote, State
from tcmu_replication.block.replication import Forward
from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.jobs.job import Job
from tcmu_replication.replication.end import End, now
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.stages import Action, Machine, Mode, Operation, Stage
from tcmu_replication.units import BLOCK, MiB, format_size

log = logging.getLogger(__name__)

PROBES = 64
"""Blocks that start compares, beside the first and the last mebibyte: disks that were never made equal show."""


class PeerState(NamedTuple):
    """What the secondary says of itself over the control channel."""

    stage: Stage
    epoch: int
    generation: str
    length: int
    error: str | None


class Peer(Protocol):
    """The control channel to the secondary. Each call raises `Error` (PEER_LOST, TIMED_OUT, or the peer's)."""

    def hello(self) -> Awaitable[PeerState]:
        """Its state."""

    def prepare(self, epoch: int) -> Awaitable[None]:
        """Do what can be done of the checkpoint after `epoch` while writes go on."""

    def checkpoint(self, epoch: int) -> Awaitable[PeerState]:
        """End `epoch`; the state after it."""


class Primary(End):
    """One primary. All commands are coroutines of the worker's loop and run one at a time.

    `connect(verify)` makes the remote node of the secondary's export, not yet
    open; it awaits `verify` before a connection counts. `detach` says that the
    peer serves where the local disk fails.
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
    ) -> None:
        super().__init__(name, disk, directory)
        self._connect = connect
        self._peer = peer
        self._detach = detach
        self._failed = failed
        self._removed = False
        self.remote: Remote | None = None
        self.filter: Forward | None = None
        self.mirror = Mirror("mirror", disk, report=self._report, may_detach=self._may_detach)
        self.top = Gate(self.mirror)
        self.out_of_sync: AllocationMap | None = None

    # --- what is shown

    @property
    def job(self) -> Job | None:
        """A primary has no jobs."""
        return None

    @property
    def out_of_sync_bytes(self) -> int:
        """What the secondary is known to miss, in bytes of whole blocks."""
        return 0 if self.out_of_sync is None else self.out_of_sync.here * BLOCK

    @property
    def removed(self) -> bool:
        """Whether the replica was taken out of the mirror while replication runs."""
        return self._removed

    # --- life

    async def open(self) -> None:
        """Take up what the manifest says. Raises `Error`, with nothing changed."""
        found = self._load()
        if found is not None and not self._is_ours(found):
            found = None
        if found is not None:
            self.manifest = found
            self.machine = Machine(Mode.PRIMARY, found.stage, found.error)
            if found.stage is Stage.RUNNING:
                self._resume(found)
        self._opened = True

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
        self._open_map()
        this_boot = boot.boot_id()
        if found.boot != this_boot and not found.clean:
            self.machine.record(
                "this host went down without a clean stop: the disks may differ in what was written since the last "
                "flush"
            )
        self._save(boot=this_boot, clean=False, error=self.machine.error)
        remote = self._connect(self.verify)
        gap = None if self.machine.error is None else Error(Kind.PEER_LOST, self.machine.error)
        if gap is None:
            remote.open_later()
        self._attach(remote, gap)

    async def close(self) -> None:
        """End the process's part; a running primary is taken up again at the next open."""
        async with self._lock:
            suspend = self._opened and self.machine.ask(Operation.CLOSE) is Action.SUSPEND
            self._opened, self._ended = False, True
            if suspend:
                try:
                    flushed = self.mirror.flush()
                    self.mirror.unplug()
                    await settle(flushed)
                    self._save(clean=True)
                except Error as error:
                    log.error("%s: not stopped cleanly: %s", self.name, error)
            await self._hang_up()
            if self.out_of_sync is not None:
                self.out_of_sync.close()

    # --- commands

    async def start(self, mode: Mode, *, anew: bool = False) -> bool:
        """Begin to forward; False if QEMU's rules ignore the command.

        The disks must hold the same; that is probed. With `anew` the operator vouches
        for it: it is not probed, what an earlier pairing missed is forgotten, and a
        pairing that is done begins again.
        """
        async with self._command():
            before = self.machine
            if anew and self.stage is Stage.DONE:
                self.machine = Machine(Mode.PRIMARY)
            try:
                if self.machine.ask(Operation.START) is Action.IGNORE:
                    return False
                self.machine.check_mode(mode)
                await self._connect_and_begin(anew)
            except Error:
                self.machine = before
                raise
            log.info("%s: running as primary, epoch %d", self.name, self.epoch)
            return True

    async def _connect_and_begin(self, anew: bool) -> None:
        state = await self._hello()
        remote = self._connect(self.verify)
        try:
            async with self.top.quiet():
                await remote.open()
                if not anew:
                    await self._probe(remote)
                self._begin(state, remote)
        except Error:
            remote.close()
            await remote.wait_closed()
            raise

    def _begin(self, state: PeerState, remote: Remote) -> None:
        """With requests held: from now on every write goes to both disks."""
        self._open_map(anew=True)
        self._save(
            stage=Stage.RUNNING,
            generation=state.generation,
            epoch=state.epoch,
            error=None,
            boot=boot.boot_id(),
            clean=False,
        )
        self.machine.forget_error()
        self.machine.move(Operation.START)
        self._attach(remote, None)

    async def _hello(self) -> PeerState:
        """The secondary's state, checked for what start needs."""
        state = await self._peer.hello()
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

    async def verify(self) -> None:
        """Before a connection counts as good: is the peer still the one that has all we sent?

        Raises `Error(CONFLICT)` if not. The remote node asks this at every connect.
        """
        if self.stage is Stage.RUNNING:
            await self._ours()

    async def _ours(self) -> PeerState:
        """The state of the secondary, if it is the one that we started with and misses nothing."""
        state = await self._peer.hello()
        if state.stage is not Stage.RUNNING or state.generation != self.manifest.generation:
            raise Error(
                Kind.CONFLICT,
                f"the secondary of {self.name} is not ours any more: stage {state.stage.value}, generation "
                f"{state.generation or 'none'} instead of {self.manifest.generation}",
            )
        if state.error is not None:
            raise Error(Kind.CONFLICT, f"the secondary of {self.name} may miss writes: {state.error}")
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
                    f"the disks of {self.name} differ; copy this host's disk to the secondary's before both are "
                    "started. --assume-clean skips this check, if you know better",
                    offset=offset,
                    length=size,
                )

    async def checkpoint(self) -> float | None:
        """End the pair's epoch. The pause in milliseconds, or None if QEMU's rules ignore it.

        New writes are held and those in flight awaited; then the secondary moves its
        epoch. If it does not answer, the writes go on and the epoch is learnt later.
        """
        async with self._command():
            if self.machine.ask(Operation.CHECKPOINT) is Action.IGNORE:
                return None
            self._refuse_gap()
            # Ours may be behind: a checkpoint whose answer was lost has moved the secondary alone.
            epoch = (await self._ours()).epoch
            await self._peer.prepare(epoch)
            began = time.monotonic()
            async with self.top.quiet():
                self._refuse_gap()
                state = await self._peer.checkpoint(epoch)
                pause = (time.monotonic() - began) * 1000
            self._save(epoch=state.epoch, checkpoint_at=now(), checkpoint_pause_ms=round(pause, 3))
            log.info("%s: checkpoint, epoch %d, paused for %.1f ms", self.name, state.epoch, pause)
            return pause

    def _refuse_gap(self) -> None:
        if self._removed and self.machine.error is None:
            raise Error(
                Kind.INVALID_STATE,
                f"the replica of {self.name} was removed from the mirror; add it again (x-blockdev-change) or stop",
            )
        if self.filter is not None and self.filter.gap is not None:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} misses writes ({format_size(self.out_of_sync_bytes)} are known to "
                f"differ: {self.machine.error}); a checkpoint now would be a state that never was. Stop both ends, "
                "copy the disk to the secondary, and start both again with --assume-clean",
            )

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
            async with self.top.quiet():
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
            async with self.top.quiet():
                self._refuse_missed()
                # A flush that ended meanwhile did not reach the secondary.
                flushed = remote.flush()
                remote.unplug()
                await settle(flushed)
                self._attach(remote, None)
            log.info("%s: the replica is in the mirror again", self.name)

    def _refuse_missed(self) -> None:
        if self.machine.error is not None or self.out_of_sync_bytes:
            raise Error(
                Kind.INVALID_STATE,
                f"the secondary of {self.name} misses writes ({format_size(self.out_of_sync_bytes)} are known to "
                f"differ: {self.machine.error}). Stop both ends, copy the disk to the secondary, and start both "
                "again with --assume-clean",
            )

    async def failover(self, *, latest: bool) -> bool:
        """A primary has nothing to fail over to. Raises `Error(INVALID_STATE)`."""
        raise Error(
            Kind.INVALID_STATE,
            f"this host is the primary of {self.name} and serves already; fail over on the secondary, "
            "or stop replication here",
        )

    async def stop(self) -> bool:
        """End replication: the LUN serves this disk alone. False if QEMU's rules ignore it."""
        async with self._command():
            if self.machine.ask(Operation.STOP) is Action.IGNORE:
                return False
            if self.mirror.detached:
                raise Error(
                    Kind.INVALID_STATE,
                    f"the local disk of {self.name} has failed and the secondary serves; "
                    "stop the initiators and fail over there",
                )
            async with self.top.quiet():
                self._save(stage=Stage.DONE, error=None)
                self.mirror.remove()
                self.machine.forget_error()
                self.machine.move(Operation.STOP)
            await self._hang_up()
            log.info("%s: stopped, serving the disk alone", self.name)
            return True

    # --- steps

    def _attach(self, remote: Remote, gap: Error | None) -> None:
        """Hang the filter below the mirror; with `gap` it only marks what the peer misses."""
        self._removed = False
        self.remote = remote
        self.filter = Forward("replication", remote, self._missed, gap)
        self.mirror.attach(self.filter, remote)

    async def _hang_up(self) -> None:
        if self.remote is not None:
            self.remote.close()
            await self.remote.wait_closed()

    def _open_map(self, anew: bool = False) -> None:
        """The map of what the peer misses; `anew` with nothing in it. Raises `Error`."""
        path = self._directory / "out-of-sync.map"
        if self.out_of_sync is not None:
            self.out_of_sync.close()
            self.out_of_sync = None
        try:
            if anew:
                path.unlink(missing_ok=True)
            if not path.exists():
                with open(path, "xb") as file:
                    file.truncate(allocation_map.file_size(self.disk.length))
                    file.write(allocation_map.header(self.disk.length))
        except OSError as e:
            raise from_os(e, f"create {path}") from e
        self.out_of_sync = AllocationMap(str(path), self.disk.length)
        # Before a manifest names it: without its header the next boot would refuse it.
        self.out_of_sync.flush()

    def _missed(self, offset: int, length: int, error: Error) -> None:
        """The filter: the peer did not get this range."""
        if self._removed and length == 0:
            return  # a flush of what it has
        if self.machine.error is None:
            self.machine.record(f"not forwarded: {error}")
            log.error("%s: the secondary misses writes from now on: %s", self.name, error)
            self._write_down(error=self.machine.error)
        self._mark(offset, length)

    def _mark(self, offset: int, length: int) -> None:
        if self.out_of_sync is None or length == 0:
            return
        try:
            self.out_of_sync.mark(offset // BLOCK, allocation_map.blocks_of(offset + length), HERE)
        except Error as error:
            log.error("%s: the map of missed writes is incomplete: %s", self.name, error)

    def _report(self, failure: Failure) -> None:
        """The mirror: a child failed."""
        if failure.child == self.disk.name and failure.operation != "read":
            self._mark(failure.offset, failure.length)
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
        """Go on without the local disk? Only if that is the policy and the peer misses nothing."""
        if not self._detach or self.filter is None or self.filter.gap is not None:
            return False
        self.filter.alone = True
        self.machine.record("the local disk failed; the secondary serves")
        log.critical("%s: the local disk failed; the secondary serves from now on", self.name)
        return True
