"""A replicated disk as one host has it: its disk, the door to it, its record, and its present role.

Identity and lifetime are here and not in the role: the gate that frontends hold stays, and `become`
puts another role's node below it. Commands come through here, one at a time, and the table of stages
says what each of them does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

from tcmu_replication.background import background
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.jobs.compare import Compare
from tcmu_replication.jobs.resync import Resync
from tcmu_replication.replication.clock import now
from tcmu_replication.replication.manifest import Manifest
from tcmu_replication.replication.missed import Missed
from tcmu_replication.replication.peer_state import News
from tcmu_replication.replication.pulse import Heard
from tcmu_replication.replication.receiver import Receiver
from tcmu_replication.replication.record import Record
from tcmu_replication.replication.role import Role, StartOptions
from tcmu_replication.replication.sender import Sender
from tcmu_replication.replication.stages import Action, Machine, Mode, Operation, Stage
from tcmu_replication.units import format_size

_BEGINS = frozenset({Action.ATTACH, Action.WATCH})
"""What the role of the next stage carries out, and not the present one."""


class Roles(Protocol):
    """Which role a host has; see `replication.roles`."""

    def of(self, replica: Replica, stage: Stage) -> Role:
        """A new role, that of `stage`."""

    def first(self, replica: Replica, *, known: bool) -> Role:
        """The role at the open of a host that has a record (`known`), or none."""


class Replica:
    """One host's part of resource `name`, over `disk`; all of its coroutines run on the worker's loop.

    `sender` is what a primary has, `receiver` what a secondary has. `heard` says when the other host
    was heard last, `stage_changed` is called when the stage or the error changed by itself.
    `peer_name` is for messages. `checkpoint_since`: when the checkpoint under way began.
    """

    def __init__(
        self,
        name: str,
        disk: Node,
        record: Record,
        roles: Roles,
        *,
        sender: Sender | None = None,
        receiver: Receiver | None = None,
        heard: Heard | None = None,
        stage_changed: Callable[[], None] = lambda: None,
        peer_name: str,
    ) -> None:
        self.name = name
        self.disk = disk
        self.record = record
        self.heard = Heard() if heard is None else heard
        self.peer_name = peer_name
        self.stage_changed = stage_changed
        self.checkpoint_since: str | None = None
        self._sender = sender
        self._receiver = receiver
        self._roles = roles
        self._opened = False
        self._ended = False
        self._changes: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self._holding = asyncio.Lock()
        self.role: Role = roles.of(self, Stage.NONE)
        self.top = Gate(self.role.node)
        if receiver is not None:
            receiver.shown_by(self.top)
        if sender is not None:
            sender.told_to(self._child_failed, self._may_detach)
        disk.on_lost = self._disk_lost

    # --- what is shown

    @property
    def mode(self) -> Mode:
        """Primary or secondary, now."""
        return self.record.machine.mode

    @property
    def machine(self) -> Machine:
        """The stage and the recorded error."""
        return self.record.machine

    @property
    def manifest(self) -> Manifest:
        """What is on record."""
        return self.record.manifest

    @property
    def stage(self) -> Stage:
        """Where replication is."""
        return self.record.stage

    @property
    def epoch(self) -> int:
        """The pair's epoch, from 1, as this host knows it; 0 before the first start."""
        return self.manifest.epoch

    @property
    def sender(self) -> Sender:
        """What this host forwards with."""
        assert self._sender is not None, "this host has no link to a secondary"
        return self._sender

    @property
    def receiver(self) -> Receiver:
        """What this host takes forwarded writes with."""
        assert self._receiver is not None, "this host has no port for a primary"
        return self._receiver

    @property
    def job(self) -> Commit | None:
        """The commit, running or ended."""
        return None if self._receiver is None else self._receiver.commit

    @property
    def comparing(self) -> Compare | None:
        """The comparison of both disks, while it runs."""
        return self.role.comparing

    @property
    def resyncing(self) -> Resync | None:
        """The resync, while it sends."""
        return self.role.resyncing

    @property
    def resync_in_words(self) -> str | None:
        """How far a resync is that this primary carries out; None if it carries out none."""
        if not self.role.heals:
            return None
        job, comparing = self.role.resyncing, self.role.comparing
        if comparing is not None:
            done, whole = format_size(comparing.offset), format_size(comparing.length)
            return f"both disks are compared first, {done} of {whole}"
        if job is None:
            return "it begins"
        return f"{format_size(job.left)} are left" + (f"; {job.waits}" if job.waits else "")

    @property
    def out_of_sync_bytes(self) -> int:
        """What the secondary is known to miss, in bytes of whole blocks."""
        return 0 if self._sender is None else self._sender.missed.bytes

    @property
    def removed(self) -> bool:
        """Whether the replica was taken out of the mirror while replication runs."""
        return self.role.removed

    @property
    def forwards(self) -> bool:
        """Whether what is written goes to the secondary now."""
        return self.role.forwards

    @property
    def remote(self) -> Remote | None:
        """The link to the secondary, of a primary that has one."""
        return None if self._sender is None else self._sender.remote

    @property
    def filter(self) -> Node | None:
        """QEMU's replication node: of a primary the one below its mirror, if it is there."""
        return self.receiver.filter if self._sender is None else self._sender.filter

    @property
    def mirror(self) -> Mirror:
        """The primary's two disks."""
        return self.sender.mirror

    @property
    def missed(self) -> Missed:
        """The map of what the secondary misses."""
        return self.sender.missed

    @property
    def forwarded(self) -> Gate | None:
        """Where forwarded writes enter; None if none are taken."""
        return None if self._receiver is None else self._receiver.export

    @property
    def overlay_bytes(self) -> tuple[int, int]:
        """What active and hidden hold, in bytes of whole blocks."""
        return (0, 0) if self._receiver is None else self._receiver.overlay_bytes

    @property
    def forwarding_in_flight(self) -> int:
        """Forwarded requests under way."""
        return 0 if self.forwarded is None else self.forwarded.in_flight

    @property
    def last_forwarded(self) -> str:
        """About when the last forwarded write came, to a second; "" if none is known."""
        if self._receiver is not None:
            self._receiver.look_for_writes()
        return self.manifest.last_forwarded

    @property
    def settled(self) -> int:
        """The calls of `settle`."""
        return 0 if self._receiver is None else self._receiver.settled

    def get_error(self) -> None:
        """Raises QEMU's "not running" or "I/O error occurred"."""
        self.machine.get_error()

    # --- life

    async def open(self) -> None:
        """Take up what the record says. Raises `Error`, with nothing changed."""
        found = self.record.load()
        exchanged = found is not None and found.mode is not self.mode
        if found is not None and exchanged:
            self._refuse_running(found)
            self.record.exchange_role(found)
        elif found is not None:
            self.record.take_up(found)
        role = self._roles.first(self, known=found is not None)
        if self.machine.ask(Operation.OPEN) is Action.RESUME:
            await role.resume()
        role.take()
        await self.become(role)
        if self._receiver is not None:
            # Only now: what the record names has been opened, so nothing else is needed any more.
            self._receiver.sweep()
        self._opened = True

    def _refuse_running(self, found: Manifest) -> None:
        """Raise `Error` if this host still is what the resource file does not say."""
        ended = (Stage.NONE, Stage.DONE)
        if found.mode is Mode.SECONDARY and found.stage not in ended:
            raise Error(
                Kind.BAD_CONFIG,
                f"this host is a secondary of {self.name} in stage {found.stage.value}, but the resource file "
                "makes it the primary; fail over or stop before the roles are changed",
            )
        if found.mode is Mode.PRIMARY and found.stage not in ended:
            raise Error(
                Kind.BAD_CONFIG,
                f"this host is a running primary of {self.name}, but the resource file makes it the secondary; "
                "stop replication before the roles are changed",
            )

    async def close(self) -> None:
        """End the process's part; what was running is taken up again at the next open."""
        async with self._lock:
            suspend = self._opened and self.machine.ask(Operation.CLOSE) is Action.SUSPEND
            self._opened, self._ended = False, True
            for change in list(self._changes):
                change.cancel()
            await asyncio.gather(*self._changes, return_exceptions=True)
            await self.role.close(suspend=suspend)
            if self._sender is not None:
                await self._sender.close()
            if self._receiver is not None:
                await self._receiver.close()

    def role_of(self, stage: Stage) -> Role:
        """A new role, that of `stage`."""
        return self._roles.of(self, stage)

    async def become(self, role: Role) -> None:
        """The only change of roles: what the old one does by itself ends, and the LUN serves the new one's node."""
        old, self.role = self.role, role
        if old is not role:
            await old.leave()
        if self.top.child is not role.node:
            await self.install(role.node)
        await role.enter()

    def later(self, change: Coroutine[Any, Any, None]) -> None:
        """A change of roles by itself, for whoever cannot wait for it."""
        task = background(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    # --- commands

    async def init(self) -> None:
        """Make this directory the resource's: this host serves its disk alone until start.

        Raises `Error(INVALID_STATE)` if it is that already, or if the peer knows of a pair.
        """
        async with self._command():
            if self.manifest.sequence:
                raise Error(
                    Kind.INVALID_STATE, f"{self.record.directory} has a manifest of {self.name} already"
                )
            await self.role.init()

    async def start(
        self,
        mode: Mode,
        *,
        again: bool = False,
        compare: bool = False,
        assume_clean: bool = False,
        force: bool = False,
        discard: bool = False,
        sync: bool = False,
    ) -> bool:
        """Begin to replicate; False if QEMU's rules ignore the command.

        `again` begins a new pairing where an earlier one is done. See `StartOptions` for the rest. Raises
        the table's error or the first failed check's, with nothing started.
        """
        operation = Operation.START_AGAIN if again else Operation.START
        async with self._command():
            return await self.role.start(
                operation, StartOptions(mode, compare, assume_clean, force, discard, sync)
            )

    async def begin(self, operation: Operation, options: StartOptions) -> bool:
        """For the roles: carry out what begins another one."""
        return await self._carry_out(operation, operation, options) is not Action.IGNORE

    async def checkpoint(self, name: str = "") -> float | None:
        """Make the present the new baseline. The pause in milliseconds, or None if QEMU's rules ignore it.

        `name` is that of whoever asks, who may have to ask twice: a checkpoint of the same name is
        made once. A failure leaves the old epoch in force.
        """
        async with self._command():
            with self._showing_a_checkpoint():
                made = await self._carry_out(Operation.CHECKPOINT, name)
                return None if made is Action.IGNORE else made

    async def failover(self, *, latest: bool, force: bool = False, fenced: bool = False) -> bool:
        """Make this host the one that counts; False if QEMU's rules ignore the command.

        To the checkpoint (plus own writes), or to the `latest` write that the primary
        had acknowledged. The LUN is writable when it returns. Raises `Error(CONFLICT)`
        while the primary lives, unless `fenced` (whoever asks has made sure that it is
        off) or `force`; and `Error(INVALID_STATE)` if what it would serve is known not to
        be what it is asked for, unless `force`; and always on a primary.
        """
        operation = Operation.FAILOVER_TO_LATEST if latest else Operation.FAILOVER
        async with self._command():
            return await self._carry_out(operation, force, fenced) is not Action.IGNORE

    async def stop(self, *, force: bool = False) -> bool:
        """End replication: the LUN serves this disk alone. False if QEMU's rules ignore it.

        Raises `Error(INVALID_STATE)` if the disk is known to be old and `force` does not say so.
        """
        async with self._command():
            return await self._carry_out(Operation.STOP, force) is not Action.IGNORE

    async def verify(self) -> None:
        """Before a connection to the secondary counts as good. Raises `Error(CONFLICT)` if it is not ours any more."""
        await self.role.verify()

    async def remove_replica(self) -> None:
        """Take the filter out of the mirror, as QEMU's x-blockdev-change does: nothing is forwarded any more.

        The stage stays; what is written from now on is marked as missed by the
        secondary, and is an error from the first such write. Raises `Error(INVALID_STATE)`.
        """
        async with self._command():
            await self.role.remove_replica()

    async def add_replica(self) -> None:
        """Put the filter back, over a new connection where the old one was closed.

        Raises `Error(INVALID_STATE)` if the secondary has missed anything meanwhile.
        """
        async with self._command():
            await self.role.add_replica()

    async def backup_ended(self, reason: str) -> None:
        """The backup job is gone without a failover: no pre-images any more, so no forwarded writes either."""
        async with self._command():
            await self._carry_out(Operation.BACKUP_ENDED, reason)
            await self.receiver.end_backup()
            self.stage_changed()

    async def cancel_commit(self) -> None:
        """End the commit before its time, as if it had failed: the LUN stays right, the next open tries again.

        Raises `Error(INVALID_STATE)` if none is under way.
        """
        async with self._command():
            await self.role.cancel_commit()

    async def hear(self, generation: str | None, news: News) -> None:
        """The primary says hello, in the `generation` that it believes in. Raises `Error` if it cannot be noted."""
        self.heard.note()
        await self.role.hear(generation, news)

    async def settle(self) -> None:
        """Return when no command is under way: what this end says then is not about to change."""
        async with self._command():
            self.receiver.settled += 1

    async def resync(self) -> None:
        """Send the secondary what it misses, on the operator's word. Returns when it has begun. Raises `Error`."""
        async with self._command():
            await self.role.resync()

    async def pace_resync(self, *, paused: bool | None = None, limit: int | None = None) -> None:
        """Pause resyncs, or let them go on; `limit` is in bytes per second, 0 for none but what the LUN allows.

        Raises `Error(INVALID_STATE)` where nothing is forwarded.
        """
        async with self._command():
            self.role.pace_resync(paused, limit)

    async def begin_resync(self, generation: str, name: str) -> bool:
        """The primary will send what this secondary misses: its disk is a mix until `end_resync`.

        The state before becomes the checkpoint `name`, where that is a state that the primary had. True if
        this host does not know where its disk may differ: then all has to be compared. Raises `Error`.
        """
        async with self._command():
            return await self.role.begin_resync(generation, name)

    async def end_resync(self, generation: str) -> None:
        """Everything was sent, and nothing is under way: this disk has all again, durably. Raises `Error`."""
        async with self._command():
            await self.role.end_resync(generation)

    async def prepare_checkpoint(self, epoch: int) -> None:
        """Do now what the checkpoint that ends `epoch` would else do while requests are held."""
        async with self._command():
            if self.machine.ask(Operation.CHECKPOINT) is Action.MOVE_EPOCH and epoch == self.epoch:
                await self.role.prepare_epoch()

    # --- for the roles

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Within it nothing is under way in the LUN, and new requests wait. One at a time."""
        async with self._holding, self.top.quiet():
            yield

    async def install(self, node: Node) -> None:
        """Serve `node` from now on."""
        async with self._holding:
            hold = self.top.hold()
            try:
                await settle(self.top.drained())
                self.top.swap(node)
            finally:
                hold.release()

    @asynccontextmanager
    async def between_commands(self) -> AsyncIterator[None]:
        """Within it no command runs, though this is none."""
        async with self._lock:
            yield

    # --- what a node below tells: to the role of that moment

    def _disk_lost(self, error: Error) -> None:
        self.role.disk_lost(error)

    def _child_failed(self, failure: Failure) -> None:
        self.role.child_failed(failure)

    def _may_detach(self) -> bool:
        return self.role.may_detach()

    # --- steps

    async def _carry_out(self, operation: Operation, *arguments: Any) -> Any:
        """The table's action for `operation`; Action.IGNORE if that is to do nothing. Raises the table's error."""
        action = self.machine.ask(operation)
        if action is Action.IGNORE:
            return action
        role = self.role
        if action in _BEGINS:
            role = self.role_of(self.machine.row(operation).next or self.stage)
        return await getattr(role, action.name.lower())(*arguments)

    @asynccontextmanager
    async def _command(self) -> AsyncIterator[None]:
        """Within it no other command runs. Raises `Error(CANCELLED)` for one that comes, or waited, too long.

        One that meets a defect may have done half of what it does: the loop's exception handler hears of it.
        """
        async with self._lock:
            if self._ended:
                raise Error(
                    Kind.CANCELLED,
                    f"the worker of {self.name} is shutting down; the command was not carried out",
                )
            try:
                yield
            except Error:
                raise
            except Exception as defect:
                context = {"message": f"a command of {self.name} met a defect", "exception": defect}
                asyncio.get_running_loop().call_exception_handler(context)
                raise

    @contextmanager
    def _showing_a_checkpoint(self) -> Iterator[None]:
        """Within it `status` says that one is under way, and since when."""
        self.checkpoint_since = now()
        try:
            yield
        finally:
            self.checkpoint_since = None
