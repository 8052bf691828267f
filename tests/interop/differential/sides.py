"""The two that are compared: QEMU's secondary and ours, behind the same few calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from tcmu_replication.block.faults import Faults
from tcmu_replication.block.file import File
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending, attempt, settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd.protocol import ERROR_OF_KIND
from tcmu_replication.replication.assemble import secondary
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.replica import Replica
from tcmu_replication.replication.stages import Mode, Stage
from tests.interop.differential import steps
from tests.interop.differential.steps import BAD, LENGTH, SECTOR, Command, Fault, Request, Verb
from tests.support import nbd, qemu

PIECE = 64 * 1024


class Outcome(NamedTuple):
    """How a request ended: an errno, or 0, and what was read."""

    errno: int
    data: bytes = b""


class Side(Protocol):
    """One secondary that lives through a sequence."""

    stage: Stage

    async def command(self, command: Command) -> str | None:
        """Give a command; the text of its error."""

    async def requests(self, requests: Sequence[Request]) -> list[Outcome]:
        """Put the requests in flight together; how each ended."""

    async def top(self) -> list[bytes | None]:
        """What the LUN shows; None for a piece that cannot be read."""

    def disk(self) -> bytes:
        """What the disk holds."""


NO_EXPORT = Outcome(-1)
"""A forwarded request while the primary is not let in."""


def pieces(fault: Fault) -> list[tuple[int, int]]:
    """The ranges in which the LUN is read: in one, or so that a bad one hides nothing else."""
    size = LENGTH if fault is Fault.NONE else PIECE
    return [(offset, min(size, LENGTH - offset)) for offset in range(0, LENGTH, size)]


def make_image(path: Path) -> None:
    """The disk at the beginning: data where it may be bad (QEMU does not read what it knows to be a hole)."""
    qemu.make_raw(path, LENGTH)
    with path.open("r+b") as image:
        image.seek(BAD.start)
        image.write(bytes(range(1, 129)) * (len(BAD) // 128))


class NbdDoors:
    """The two doors of a secondary that is reached over NBD: its LUN, and the primary's while it is let in."""

    COMMANDS = {
        Verb.FORWARD: nbd.WRITE,
        Verb.FORWARD_ZERO: nbd.ZEROES,
        Verb.FORWARD_TRIM: nbd.TRIM,
        Verb.FORWARD_READ: nbd.READ,
        Verb.OWN: nbd.WRITE,
        Verb.OWN_ZERO: nbd.ZEROES,
        Verb.OWN_TRIM: nbd.TRIM,
        Verb.READ: nbd.READ,
    }

    def __init__(self, lun: nbd.Nbd) -> None:
        self.lun = lun
        self.forward: nbd.Nbd | None = None

    def close(self) -> None:
        """Hang up. Twice is fine."""
        self.end_forwarding()
        self.lun.close()

    def end_forwarding(self) -> None:
        """Close the primary's door."""
        if self.forward is not None:
            self.forward.close()
            self.forward = None

    def requests(self, requests: Sequence[Request]) -> list[Outcome]:
        """Put them in flight together; how each ended."""
        started: list[tuple[nbd.Nbd, nbd.Request] | None] = []
        for request in requests:
            door = self.forward if request.verb.forwarded else self.lun
            if door is None:
                started.append(None)
                continue
            command = self.COMMANDS[request.verb]
            data = request.data if command == nbd.WRITE else b""
            started.append((door, door.start(command, request.offset, request.length, data)))
        for door in (self.forward, self.lun):
            if door is not None:
                door.finish([entry[1] for entry in started if entry is not None and entry[0] is door])
        return [NO_EXPORT if entry is None else Outcome(entry[1].error, entry[1].data) for entry in started]

    def top(self, fault: Fault) -> list[bytes | None]:
        """What the LUN shows."""
        reads = [self.lun.start(nbd.READ, *piece) for piece in pieces(fault)]
        self.lun.finish(reads)
        return [None if read.error else read.data for read in reads]


class QemuSide:
    """QEMU's, in processes: a new pairing is a new process over the same disk."""

    def __init__(self, directory: Path, sequence: steps.Sequence) -> None:
        self.directory = directory
        self.stage = Stage.NONE
        self._sequence = sequence
        self._image = directory / "disk.img"
        make_image(self._image)
        self._stack = contextlib.ExitStack()
        self._open()

    def close(self) -> None:
        """Kill the process."""
        self._stack.close()

    def _open(self) -> None:
        self.qemu = self._stack.enter_context(
            qemu.secondary(
                self.directory, LENGTH, cluster=self._sequence.cluster, disk_options=self._disk_options()
            )
        )
        self._doors = NbdDoors(self.qemu.nbd("top"))
        self._stack.callback(self._doors.close)

    def _disk_options(self) -> str:
        """blkdebug over the image, with a rule for every bad sector and kind of request."""
        kinds = {Fault.NONE: (), Fault.WRITE: ("write", "write-zeroes"), Fault.READ: ("read",)}[
            self._sequence.fault
        ]
        if not kinds:
            return ""
        config = self.directory / "blkdebug.conf"
        config.write_text(
            "".join(
                f'[inject-error]\niotype = "{kind}"\nsector = "{sector}"\nerrno = "5"\nevent = "none"\n'
                for kind in kinds
                for sector in range(BAD.start // SECTOR, BAD.stop // SECTOR)
            )
        )
        return (
            f"driver=raw,file.driver=blkdebug,file.config={config},"
            f"file.image.driver=file,file.image.filename={self._image}"
        )

    async def command(self, command: Command) -> str | None:
        """See `Side`."""
        try:
            return self._command(command)
        except qemu.QmpError as error:
            return str(error)

    def _command(self, command: Command) -> str | None:
        match command:
            case Command.REOPEN:
                pass
            case Command.START:
                self.qemu.start()
                if self.stage is Stage.NONE:
                    self._running()
            case Command.START_WRONG:
                self.qemu.start(primary=True)
            case Command.CHECKPOINT:
                self.qemu.checkpoint()
            case Command.GET_ERROR:
                return self.qemu.error()
            case Command.STOP:
                self._end_forwarding()
                if self.stage is Stage.RUNNING:
                    self.stage = Stage.DONE
                self.qemu.stop()
            case Command.FAILOVER:
                self._end_forwarding()
                self.qemu.stop(failover=True)
                if self.stage is Stage.RUNNING:
                    self.stage = Stage.FAILOVER
            case Command.SETTLE:
                self.stage = Stage.DONE if self.qemu.wait_merged() is None else Stage.FAILOVER_FAILED
            case Command.RESTART:
                self.qemu.quit()
                self._stack.close()
                self._open()
                self.qemu.start()
                self._running()
        return None

    def _running(self) -> None:
        self.stage = Stage.RUNNING
        self.qemu.export_disk()
        self._doors.forward = self.qemu.nbd("disk")

    def _end_forwarding(self) -> None:
        if self._doors.forward is not None:
            self._doors.end_forwarding()
            self.qemu.unexport("disk")

    async def requests(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Side`."""
        return self._doors.requests(requests)

    async def top(self) -> list[bytes | None]:
        """See `Side`."""
        return self._doors.top(self._sequence.fault)

    def disk(self) -> bytes:
        """See `Side`."""
        return self._image.read_bytes()


class EngineSide:
    """Ours: the secondary's engine in this process."""

    def __init__(self, directory: Path, sequence: steps.Sequence) -> None:
        self._sequence = sequence
        self._image = directory / "disk.img"
        make_image(self._image)
        self._overlays = directory / "overlays"
        self._overlays.mkdir()
        self._offload = Offload()
        self._file = File(str(self._image), offload=self._offload)
        self._disk: Node = self._file
        if sequence.fault is not Fault.NONE:
            self._disk = faults = Faults(self._file)
            operations = {Fault.WRITE: ("write", "zero"), Fault.READ: ("read", "fetch")}[sequence.fault]
            for operation in operations:
                faults.fail(operation, Kind.IO, offset=BAD.start, length=len(BAD))
        self._export: Node | None = None
        self.engine = self._make()

    def _make(self) -> Replica:
        return secondary(
            "disk0",
            self._disk,
            Epochs(self._overlays, self._disk, offload=self._offload),
            top_id="disk0",
            durable=self._sequence.durable,
            publish=self._publish,
            withdraw=self._withdraw,
        )

    @property
    def stage(self) -> Stage:
        return self.engine.stage

    async def _publish(self, node: Node) -> None:
        self._export = node

    async def _withdraw(self) -> None:
        self._export = None

    async def open(self) -> None:
        """Begin."""
        await self.engine.open()

    async def close(self) -> None:
        """End."""
        await self.engine.close()
        self._file.close()
        self._offload.close()

    async def command(self, command: Command) -> str | None:
        """See `Side`."""
        try:
            await self._command(command)
        except Error as error:
            return str(error)
        return None

    async def _command(self, command: Command) -> None:
        engine = self.engine
        match command:
            case Command.START:
                await engine.start(Mode.SECONDARY)
            case Command.START_WRONG:
                await engine.start(Mode.PRIMARY)
            case Command.CHECKPOINT:
                await engine.checkpoint()
            case Command.GET_ERROR:
                engine.get_error()
            case Command.STOP:
                await engine.stop()
            case Command.FAILOVER:
                await engine.failover(latest=False)
            case Command.SETTLE:
                while engine.stage is Stage.FAILOVER:
                    await asyncio.sleep(0.001)  # the commit's threads give way to a loop that is busy
            case Command.RESTART:
                if engine.stage is Stage.RUNNING:
                    await engine.stop()
                await engine.start(Mode.SECONDARY, again=True, discard=True)
            case Command.REOPEN:
                await engine.close()
                self.engine = self._make()
                await self.engine.open()

    async def requests(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Side`."""
        started = [self._start(request) for request in requests]
        for door in (self._export, self.engine.top):
            if door is not None:
                door.unplug()
        return [await self._ended(start) for start in started]

    def _start(self, request: Request) -> tuple[Error | None, Pending | None, bytearray] | None:
        door = self._export if request.verb.forwarded else self.engine.top
        if door is None:
            return None
        room = bytearray()
        place = request.offset, request.length
        match request.verb:
            case Verb.FORWARD | Verb.OWN:
                error, pending = attempt(door.write, request.offset, [memoryview(request.data)])
            case Verb.FORWARD_ZERO | Verb.OWN_ZERO:
                error, pending = attempt(door.zero, *place)
            case Verb.FORWARD_TRIM | Verb.OWN_TRIM:
                error, pending = attempt(door.discard, *place)
            case Verb.FORWARD_READ | Verb.READ:
                room = bytearray(request.length)
                error, pending = attempt(door.read, request.offset, [memoryview(room)])
        return error, pending, room

    async def _ended(self, started: tuple[Error | None, Pending | None, bytearray] | None) -> Outcome:
        if started is None:
            return NO_EXPORT
        error, pending, room = started
        if pending is not None:
            try:
                await settle(pending)
            except Error as late:
                error = late
        return Outcome(0, bytes(room)) if error is None else Outcome(int(ERROR_OF_KIND[error.kind]))

    async def top(self) -> list[bytes | None]:
        """See `Side`."""
        shown: list[bytes | None] = []
        for offset, length in pieces(self._sequence.fault):
            room = bytearray(length)
            error, pending = attempt(self.engine.top.read, offset, [memoryview(room)])
            outcome = await self._ended((error, pending, room))
            shown.append(None if outcome.errno else outcome.data)
        return shown

    def disk(self) -> bytes:
        """See `Side`."""
        return self._image.read_bytes()
