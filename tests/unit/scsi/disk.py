"""A logical unit on memory, driven by commands that are named as in the table."""

from __future__ import annotations

from typing import Any, NamedTuple

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Node
from tcmu_replication.frontend.scsi import Runner
from tcmu_replication.scsi.command import Command
from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.sense import Sense
from tcmu_replication.scsi.task import Answer, Task
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu import ring
from tcmu_replication.units import MiB

BY_NAME = {command.name: command for command in COMMANDS}
SERIAL = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
IDENTITY = Identity(vendor="ACME", product="replication", revision="1.0", serial=SERIAL)
GUARD = 0xEE


def row(name: str) -> Command:
    """The table's row."""
    return BY_NAME[name]


def views(*parts: bytes) -> list[memoryview]:
    """A Data-Out area of several pieces."""
    return [memoryview(part) for part in parts]


def sense_of(answer: Answer) -> Sense:
    """Key, code and qualifier of fixed format sense data."""
    assert answer.status == 2, answer
    assert answer.sense[0] & 0x7F == 0x70
    return Sense(answer.sense[2] & 0x0F, answer.sense[12], answer.sense[13])


def pointer_of(answer: Answer) -> tuple[bool, int, int | None]:
    """Whether in the CDB, which byte, which bit: the field pointer of fixed format sense data."""
    flags = answer.sense[15]
    assert flags & 0x80, "no field pointer"
    return bool(flags & 0x40), int.from_bytes(answer.sense[16:18], "big"), flags & 7 if flags & 8 else None


class Result(NamedTuple):
    """A command's end as an initiator sees it."""

    answer: Answer
    data: bytes

    @property
    def good(self) -> bool:
        return self.answer.status == 0

    @property
    def sense(self) -> str:
        return str(sense_of(self.answer))


class Disk:
    """`unit` on `node`; both are open to tests."""

    def __init__(
        self, length: int = MiB, block_size: int = 512, node: Node | None = None, **options: Any
    ) -> None:
        self.node = node or Memory(length)
        self.unit = LogicalUnit(length, block_size, lambda: IDENTITY, **options)
        self.runner = Runner(Gate(self.node))

    def outcome(self, name: str, data_out: bytes = b"", in_length: int = 0, **fields: int) -> Answer | Task:
        """What the unit makes of a command."""
        return self.unit.command(row(name).encode(**fields), views(data_out) if data_out else [], in_length)

    def send(self, cdb: bytes, data_out: bytes = b"", in_length: int = 0) -> Result:
        """Run a CDB to its end, which must come at once, and look that it stays in its areas."""
        out = views(data_out[:7], data_out[7:])
        data_in = bytearray([GUARD]) * in_length
        outcome = self.unit.command(cdb, out, in_length)
        if isinstance(outcome, Answer):
            assert len(outcome.data) <= in_length
            return Result(outcome, outcome.data)
        ends: list[Result] = []
        self.runner.run(
            outcome,
            out,
            [memoryview(data_in)],
            lambda a, filled: ends.append(Result(a, bytes(data_in[:filled]))),
            ring.Command(0, cdb, [], 0),
        )
        (end,) = ends
        assert data_in[len(end.data) :].count(GUARD) == in_length - len(end.data) or not end.good
        return end

    def command(self, name: str, data_out: bytes = b"", in_length: int = 0, **fields: int) -> Result:
        """Run a named command to its end."""
        return self.send(row(name).encode(**fields), data_out, in_length)
