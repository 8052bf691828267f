"""What the kernel puts into the memory that it shares with us.

byte 0      bit 0: the mailbox, too, is what follows (its first 68 bytes); bit 1: more than one round
byte 1      cmd_head, in words of eight bytes
the rest    the ring from its start on; zeroes behind that
"""

from __future__ import annotations

from tcmu_replication.block.gate import Gate
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend.scsi import Runner
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.task import Answer
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu import layout
from tcmu_replication.tcmu.ring import Command, Ring
from tests.fuzz.disk import Disk
from tests.fuzz.script import Script, told
from tests.support.fake_kernel import FakeKernel

RING, DATA = 2048, 4 * 4096
DATA_START = layout.MAILBOX_SIZE + RING
WORDS = (
    (128 | layout.Opcode.COMMAND).to_bytes(4, "little"),
    (48 | layout.Opcode.TASK_MANAGEMENT).to_bytes(4, "little"),
    (64 | layout.Opcode.PAD).to_bytes(4, "little"),
    DATA_START.to_bytes(8, "little"),
    (layout.MAILBOX_SIZE + layout.COMMAND_SIZE).to_bytes(8, "little"),
)
MAX_LENGTH = 2 + RING

_MAILBOX = 68
_IDENTITY = Identity(vendor="ACME", product="fuzz", revision="1.0", serial="0123456789abcdef")
_KERNEL = FakeKernel(RING, DATA)
_FRESH = bytes(_KERNEL.memory[: layout.MAILBOX_SIZE])


def check(data: bytes) -> None:
    """Entries become commands inside the data area, faults or the end of the ring; only slots are written."""
    script = Script(data)
    flags, head = script.number(), script.number() * 8
    memory = _KERNEL.memory
    memory[:] = bytes(len(memory))
    memory[: layout.MAILBOX_SIZE] = _FRESH
    if flags & 1:
        mailbox = script.take(_MAILBOX)
        memory[: len(mailbox)] = mailbox
    content = script.take(RING)
    memory[layout.MAILBOX_SIZE : layout.MAILBOX_SIZE + len(content)] = content
    if not flags & 1:
        memory[:_MAILBOX].cast("I")[layout.HEAD_WORD] = head % RING
    try:
        ring = Ring(memory)
    except Error as error:
        told(error, Kind.PEER_LIED, Kind.UNSUPPORTED)
        return
    try:
        _serve(ring, rounds=2 if flags & 2 else 1)
    finally:
        ring.release()


def _serve(ring: Ring, *, rounds: int) -> None:
    memory = _KERNEL.memory
    start, size = layout.MAILBOX.unpack_from(memory)[2:4]
    disk = Disk(64 << 10)
    unit = LogicalUnit(disk.length, 512, lambda: _IDENTITY)
    runner = Runner(Gate(disk))
    for _ in range(rounds):
        for _ in range(RING // layout.HEADER.size):
            try:
                commands = ring.fetch()
            except Error as error:
                told(error, Kind.PEER_LIED)
                return
            if not commands:
                break
            for command in commands:
                _run(ring, unit, runner, command, start + size)
            ring.publish()
            tail = memory[: layout.MAILBOX_SIZE].cast("I")[layout.TAIL_WORD]
            assert tail < size
            assert not tail % layout.ALIGNMENT
        else:
            raise AssertionError("more batches than the ring has room for")
        assert sum(len(abort.cmd_ids) for abort in ring.aborts) <= rounds * size // 2
        assert not ring.outstanding


def _run(ring: Ring, unit: LogicalUnit, runner: Runner, command: Command, data_start: int) -> None:
    if command.fault is not None:
        assert command.fault.isprintable()
        assert not command.buffers
        ring.complete(command.cmd_id, 2, b"\x70")
        return
    assert command.length == sum(map(len, command.buffers))
    assert command.length <= len(_KERNEL.memory) * layout.HEADER_FIELDS[-1].offset * RING
    # The unit takes bytes, of which the disk keeps no view; what it fills must not be the ring itself.
    outcome = unit.command(command.cdb, command.buffers, command.length)
    if isinstance(outcome, Answer):
        ring.complete(command.cmd_id, outcome.status, outcome.sense)
        return
    ends: list[Answer] = []
    runner.run(outcome, command.buffers, command.buffers, lambda answer, _: ends.append(answer), command)
    (answer,) = ends
    ring.complete(command.cmd_id, answer.status, answer.sense)
