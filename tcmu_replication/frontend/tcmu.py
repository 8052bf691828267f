"""A LUN of the kernel's target: commands from the ring, through the SCSI unit, to a chain, and back.

Everything found in the ring is run, the chain is told once (unplug), everything
that ended is answered, the kernel is woken once; then the ring is looked at
again. What ends later is answered in batches likewise.

Data-In. The pages of the data area are recycled and never cleared. The kernel
copies to the initiator's buffer what READ_LEN says, or all of a Data-In area if
READ_LEN is 0, whatever the status is (CHECK CONDITION alone copies nothing).
With a status that is not GOOD a network fabric then sends none of it; loopback
has no such step, the buffer is the initiator's own. So an answer that filled
less always says how much, and one that filled nothing says one byte, which is
made zero first. (drivers/target/target_core_user.c, tcmu_handle_completion;
target_core_transport.c, target_complete_ok_work)

Late commands. Every command gets an answer within `deadline_s`: one still under
way then is answered BUSY, before the kernel's own time-out turns it into an
I/O error. Its buffers are in use by the chain, so it is answered with
KEEP_BUF: the kernel leaves the pages and the cmd_id alone until the chain has
let go and free_kept_buf says so. The initiator sends the command again; the
chain keeps the order of writes, so the late one cannot undo a newer one, and of
a command of several calls those that were not made are not made any more. The
commands that a task-management entry names are answered in the same way at
once. A kernel without KEEP_BUF (before 5.15) gets the answer only when the
chain lets go.

A disk that hangs. A system call of the chain may not return, and the loop's
thread is stuck in it. Then another thread calls `stand_in` again and again: it
takes what is new in the ring and answers what is overdue. What the chain had
not begun by then is never begun. The `Baton` keeps the two apart: whatever
touches the ring here holds it, and no call of the chain is made with it.

An exception that is no `Error` is a defect. It goes to the loop's exception
handler, which should end the process: the next one resets the ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from functools import partial

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.baton import Baton
from tcmu_replication.frontend.scsi import Runner
from tcmu_replication.scsi import sense
from tcmu_replication.scsi.command import Data
from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.task import Answer, Task
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu.configfs import Backstore
from tcmu_replication.tcmu.layout import Capability
from tcmu_replication.tcmu.ring import Command, Ring
from tcmu_replication.tcmu.uio import Device

log = logging.getLogger(__name__)

DEADLINE_S = 20.0
SHARE_OF_TIME_OUT = 2 / 3
"""The deadline is at most this part of the kernel's cmd_time_out."""
READY_LIMIT_S = 10.0
_READY_POLL_S = 0.02
_ROUNDS = 16
"""Looks at the ring before the rest of the loop gets its turn."""

_CHECK_CONDITION = sense.Status.CHECK_CONDITION
_DATA_OUT = frozenset(row.opcode for row in COMMANDS if row.data is Data.OUT)
_MALFORMED = sense.CheckCondition(sense.INTERNAL_TARGET_FAILURE).answer()


class Counters:
    """Since the start: `commands` taken, `batches` they came in, and of them
    `failed` (CHECK CONDITION), `late` (BUSY at the deadline), `aborted` by
    task management, `malformed` ring entries; and `resets` of a broken ring.
    """

    __slots__ = ("aborted", "batches", "commands", "failed", "late", "malformed", "resets")

    def __init__(self) -> None:
        self.commands = self.batches = self.failed = self.late = self.aborted = self.malformed = (
            self.resets
        ) = 0


class TcmuFrontend:
    """Serves `unit` on `node` through `device`, which it takes over; `backstore` is its configfs directory.

    `on_closed(error)` is called once if the frontend ends by itself: with None
    because the kernel removed the device, or with the `Error` that made the
    ring unusable. It is not called for stop().
    """

    def __init__(
        self,
        device: Device,
        backstore: Backstore,
        unit: LogicalUnit,
        node: Gate,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline_s: float = DEADLINE_S,
        on_closed: Callable[[Error | None], None] | None = None,
    ) -> None:
        self.device = device
        self.unit = unit
        self.node = node
        self.counters = Counters()
        self._backstore = backstore
        self._runner = Runner(node)
        self._loop = loop
        self._deadline_s = deadline_s
        self._on_closed = on_closed
        self._switches = Offload(loop, threads=1)  # configfs can make its caller wait; in order
        self._ring: Ring | None = None
        self._kept: set[Command] = set()
        self._baton = Baton()
        self._fetched: list[Command] = []  # by the thread that stands in; the chain has not seen them
        self._serving = False
        self._publishing = False
        self._timer: asyncio.TimerHandle | None = None
        self._idle: Pending | None = None
        self._recovery: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """Commands that were taken and not answered."""
        return len(self._ring.outstanding) if self._ring is not None else 0

    @property
    def kept(self) -> int:
        """Commands that were answered late and whose buffers the chain still has."""
        return len(self._kept)

    async def start(self) -> None:
        """Take the ring up: what an earlier handler left in it ends BUSY, new commands are served.

        Raises `Error`: TIMED_OUT if the backstore does not become enabled,
        else as the ring or configfs says. New commands end BUSY after a failure.
        """
        await self._enabled()
        kernel_s = self._backstore.time_out_s
        if kernel_s:
            self._deadline_s = min(self._deadline_s, kernel_s * SHARE_OF_TIME_OUT)
        await self._take_up()

    async def stop(self, limit_s: float = DEADLINE_S) -> int:
        """Answer what is under way, take no more, and close the device.

        Until a handler starts again the kernel answers BUSY. Returns how many
        commands the chain had not ended within `limit_s`; they were answered
        BUSY, and their buffers stay valid until it does. Twice is fine. An
        `Error` of configfs is raised after the device was closed.
        """
        if self._recovery is not None:
            self._recovery.cancel()
        if self._ring is None:
            self.device.close()
            self._switches.close()
            return 0
        try:
            await self._switch(self._backstore.block, "block")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled(), limit_s)
            unfinished = self.in_flight + self.kept
            with self._baton:
                if self._ring is not None:
                    self._abandon(self._ring, list(self._ring.outstanding.values()))
            self._publish()
        finally:
            self._close()
            self._switches.close()
        return unfinished

    def stand_in(self) -> int:
        """From another thread, while the loop's does not turn: take what is new, answer BUSY what is overdue.

        Returns how many commands it answered. Does nothing while the loop's thread is at the ring.
        """
        if not self._baton.take():
            return 0
        try:
            ring = self._ring
            return 0 if ring is None or self._recovery is not None else self._stand_in(ring)
        finally:
            self._baton.give_back()

    def resize(self, length: int) -> None:
        """The disk has `length` bytes now; initiators are told. Raises ValueError below one block."""
        self.unit.resize(length)

    async def _enabled(self) -> None:
        """Wait for the end of the backstore's creation: until then configfs refuses its actions."""
        end_s = self._loop.time() + READY_LIMIT_S
        while not self._backstore.ready():
            if self._loop.time() > end_s:
                path = self._backstore.path
                raise Error(Kind.TIMED_OUT, f"{path} was not enabled within {READY_LIMIT_S:g} s; enable it")
            await asyncio.sleep(_READY_POLL_S)

    async def _take_up(self) -> None:
        await self._switch(self._backstore.block, "block")
        await self._switch(self._backstore.reset_ring, "reset the ring of")
        with self._baton:
            if self._ring is not None:
                self._ring.release()
            self._fetched.clear()
            self._ring = Ring(self.device.memory)
        if self._ring.capabilities & Capability.TASK_MANAGEMENT:
            await self._switch(self._backstore.notify_task_management, "configure")
        self._loop.add_reader(self.device.fd, self._wake)
        await self._switch(self._backstore.unblock, "unblock")
        self._loop.call_soon(self._serve)  # the event for what is there already may never come

    async def _switch(self, switch: Callable[[], None], doing: str) -> None:
        await settle(self._switches(switch, f"{doing} {self.device.name}"))

    # Serving

    def _wake(self) -> None:
        """The event: new commands, or the end of the device."""
        try:
            self.device.drain()
        except Error:
            self._end(None)
            return
        self._serve()

    def _serve(self) -> None:
        """Run and answer what is in the ring until it is empty, or others must have their turn."""
        ring = self._ring
        if ring is None or self._recovery is not None:
            return
        self._serving = True
        baton = self._baton
        try:
            for _ in range(_ROUNDS):
                baton.held = True
                if baton.lent:
                    baton.wait()
                commands = ring.fetch()
                baton.held = False
                if self._fetched:
                    self._run_fetched()
                if commands:
                    self._run(commands, self._loop.time() + self._deadline_s)
                self._publish()
                if ring.aborts:
                    with baton:
                        self._abort(ring)
                    self._publish()
                if not commands or self._ring is None:
                    break
            else:
                self._loop.call_soon(self._serve)
        except Error as error:
            baton.held = False
            self._run_fetched()
            self._recovery = self._loop.create_task(self._recover(error))
        finally:
            self._serving = baton.held = False
        self._watch()

    def _run(self, commands: list[Command], deadline_s: float) -> None:
        command_of, run, finish = self.unit.command, self._runner.run, self._finish
        self.counters.batches += 1
        self.counters.commands += len(commands)
        for command in commands:
            command.deadline_s = deadline_s
            if command.fault is not None:
                self._refuse(command)
                continue
            buffers = command.buffers
            # The entry does not say which way the data goes; the CDB does, so either is offered.
            outcome = command_of(command.cdb, buffers, command.length)
            if type(outcome) is Task:
                run(outcome, buffers, buffers, partial(finish, command), command)
            else:
                finish(command, outcome, 0)  # type: ignore[arg-type]
        self.node.unplug()

    def _run_fetched(self) -> None:
        """Run what the thread that stood in has taken from the ring; what came later comes after it."""
        with self._baton:
            fetched, self._fetched = self._fetched, []
        if fetched:
            self._run(fetched, min(command.deadline_s for command in fetched))

    def _refuse(self, command: Command) -> None:
        if command.abandoned:  # while an earlier one of its batch was stuck
            self._let_go(command)
            return
        self.counters.malformed += 1
        log.error("%s: a malformed command: %s", self.device.name, command.fault)
        self._finish(command, _MALFORMED, 0)

    def _finish(self, command: Command, answer: Answer, filled: int) -> None:
        """The end of a command: `filled` bytes of its Data-In are there, or the answer brings its own."""
        baton = self._baton
        baton.held = True
        if baton.lent:
            baton.wait()
        if command.abandoned:
            baton.held = False
            self._let_go(command)
            return
        ring = self._ring
        assert ring is not None
        status, sense_data, data = answer
        read_len = 0
        if not status:
            if data:
                filled = _fill(command.buffers, data)
            if filled < command.length:
                read_len = filled or _nothing(command)
        elif status == _CHECK_CONDITION:
            self.counters.failed += 1
        elif command.length:
            read_len = _nothing(command)
        ring.complete(command.cmd_id, status, sense_data, read_len)
        baton.held = False
        if not self._serving and not self._publishing:
            self._publishing = True
            self._loop.call_soon(self._publish)

    def _publish(self) -> None:
        """Answer everything that ended since the last time."""
        self._publishing = False
        baton = self._baton
        baton.held = True
        if baton.lent:
            baton.wait()
        ring = self._ring
        shown = ring is not None and ring.publish()
        baton.held = False
        if ring is None:
            return
        if shown:
            try:
                self.device.wake()
            except Error:
                self._end(None)
                return
        if self._idle is not None and not ring.outstanding and not self._kept:
            self._rest()

    # Commands that take too long

    def _watch(self) -> None:
        """Be called at the deadline of the oldest command, if any is under way."""
        if self._timer is None and self._ring is not None and self._ring.outstanding:
            with self._baton:
                first_s = min((c.deadline_s for c in self._ring.outstanding.values()), default=math.inf)
            if first_s != math.inf:
                self._timer = self._loop.call_at(first_s, self._overdue)

    def _overdue(self) -> None:
        self._timer = None
        ring = self._ring
        if ring is None:
            return
        now_s = self._loop.time()
        with self._baton:
            late = [command for command in ring.outstanding.values() if command.deadline_s <= now_s]
            self.counters.late += len(late)
            self._abandon(ring, late)
        if late:
            limit_s = self._deadline_s
            log.warning("%s: %d commands took longer than %g s", self.device.name, len(late), limit_s)
            self._publish()
        self._watch()

    def _abort(self, ring: Ring) -> None:
        """Task management waits for these commands; whoever sent them does not."""
        named = {cmd_id for abort in ring.aborts for cmd_id in abort.cmd_ids}
        ring.aborts.clear()
        aborted = [ring.outstanding[cmd_id] for cmd_id in named if cmd_id in ring.outstanding]
        self.counters.aborted += len(aborted)
        self._abandon(ring, aborted)

    def _abandon(self, ring: Ring, commands: list[Command]) -> None:
        """Answer BUSY while the chain still has the buffers, if the kernel can keep them. With the baton."""
        if not ring.capabilities & Capability.KEEP_BUFFERS:
            for command in commands:
                command.deadline_s = math.inf
            return
        for command in commands:
            command.abandoned = True
            self._kept.add(command)
            ring.complete(command.cmd_id, sense.Status.BUSY, read_len=_hidden(command), keep=True)

    def _stand_in(self, ring: Ring) -> int:
        """A step in the other thread, with the baton. Nothing that belongs to the loop is touched here."""
        now_s = self._loop.time()
        try:
            commands = ring.fetch()
        except Error:  # the loop's thread will meet it too
            commands = []
        self._fetched += commands
        named = {cmd_id for abort in ring.aborts for cmd_id in abort.cmd_ids}
        ring.aborts.clear()
        late, aborted = [], []
        for command in ring.outstanding.values():
            if not command.deadline_s:  # new, or behind the one that is stuck
                command.deadline_s = now_s + self._deadline_s
            if command.cmd_id in named:
                aborted.append(command)
            elif command.deadline_s <= now_s:
                late.append(command)
        self.counters.late += len(late)
        self.counters.aborted += len(aborted)
        waiting = set(self._fetched)
        begun = []
        for command in late + aborted:
            if command in waiting:
                waiting.remove(command)
                ring.complete(command.cmd_id, sense.Status.BUSY, read_len=_hidden(command))
            else:
                command.fault = "answered before it began"  # if it has not: the chain is not to see it
                begun.append(command)
        self._fetched = [command for command in self._fetched if command in waiting]
        self._abandon(ring, begun)
        if ring.publish():
            with contextlib.suppress(Error):  # the device went: the loop's thread will see it
                self.device.wake()
        return len(late) + len(aborted)

    def _let_go(self, command: Command) -> None:
        """The chain is through with a command that was answered before."""
        self._kept.discard(command)
        command.buffers.clear()
        if self._ring is not None:
            free = partial(self._backstore.free_kept, command.cmd_id)
            self._switches(free, f"free buffers of {self.device.name}").then(self._freed)

    def _freed(self, pending: Pending) -> None:
        if pending.error is not None and self._ring is not None:
            log.error("%s: buffers of a late command are lost: %s", self.device.name, pending.error)
        self._publish()

    # The end

    async def _settled(self) -> None:
        """Wait until the chain has ended every command."""
        if self._ring is not None and (self._ring.outstanding or self._kept):
            if self._idle is None:
                self._idle = Pending()
            await self._idle.wait()

    async def _recover(self, error: Error) -> None:
        """The ring cannot be followed: when the chain has let go of every buffer, start it afresh."""
        log.error("%s: the ring is broken and will be reset: %s", self.device.name, error)
        self.counters.resets += 1
        self._loop.remove_reader(self.device.fd)
        try:
            await self._switch(self._backstore.block, "block")
            await self._settled()
            if self._ring is not None:  # it may have been removed meanwhile
                await self._take_up()
        except Error as failure:
            self._end(failure)
        finally:
            self._recovery = None

    def _end(self, error: Error | None) -> None:
        """The device went, or cannot be used. Its configfs must not be touched: rmdir waits there, for us."""
        if self._ring is None:
            return
        self._close()
        if self._on_closed is not None:
            self._on_closed(error)

    def _close(self) -> None:
        self._loop.remove_reader(self.device.fd)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._baton:
            ring, self._ring = self._ring, None
            if ring is not None:
                for command in ring.outstanding.values():
                    command.abandoned = True
                ring.release()
        self._rest()
        self.device.close()

    def _rest(self) -> None:
        """Tell whoever waits in _settled()."""
        if self._idle is not None:
            idle, self._idle = self._idle, None
            idle.complete()


def _nothing(command: Command) -> int:
    """The read_len of a Data-In area of which nothing may be seen: one byte (0 means all), which is zero."""
    command.buffers[0][0] = 0
    return 1


def _hidden(command: Command) -> int:
    """The read_len of an answer that comes before the command's end."""
    if not command.length:
        return 0
    # Data-Out under way must be left alone, and the kernel copies nothing of it. Data-In that the chain
    # still reads into may be written: its first byte is zero then, or what was asked for.
    return 1 if command.cdb[0] in _DATA_OUT else _nothing(command)


def _fill(buffers: list[memoryview], data: bytes) -> int:
    """Copy `data` into `buffers`, as much as fits; returns how much that was."""
    at = 0
    for view in buffers:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)
    return at
