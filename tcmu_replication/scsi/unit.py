"""The logical unit: a CDB and its data in, an answer or a task for the chain out. No I/O.

It knows no initiators: TCMU does not say whose a command is, so a unit
attention goes to whoever comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tcmu_replication.errors import Error
from tcmu_replication.scsi import sense
from tcmu_replication.scsi.buffers import Buffers
from tcmu_replication.scsi.command import Command, Run
from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.task import Answer, Task
from tcmu_replication.units import KiB, MiB

WITHOUT_DATA_MAX = 32 * MiB
"""The longest range that one command without as much data (WRITE SAME, UNMAP, VERIFY) may touch.

A replication partner may have to save all of it before it answers.
"""
COMPARE_AND_WRITE_MAX = 64 * KiB
UNMAP_DESCRIPTORS_MAX = 256

_INQUIRY, _REQUEST_SENSE, _REPORT_LUNS = 0x12, 0x03, 0xA0
_IN_SPITE_OF_ATTENTION = frozenset((_INQUIRY, _REQUEST_SENSE, _REPORT_LUNS))  # SAM-5, unit attention


class Limits(NamedTuple):
    """What VPD page B0 says, in blocks (`unmap_descriptors`: a number)."""

    transfer: int
    compare_and_write: int
    write_same: int
    unmap: int
    unmap_descriptors: int
    granularity: int
    without_data: int


class LogicalUnit:
    """A disk of `length` bytes in blocks of `block_size` (512 or 4096) bytes.

    `identity` is asked at each INQUIRY, since LIO sets the serial after the
    device is there. `max_transfer` (bytes) is what VPD page B0 recommends as
    the longest READ or WRITE. `granularity` (bytes, a power of two and a
    multiple of `block_size`) is the grain of the disk below: it is shown as
    physical block and as unmap granularity. `not_ready` says why the disk is not
    served now, to whoever tests. Without `write_cache` every write
    is durable when it ends. Raises ValueError for a geometry that cannot be.
    """

    def __init__(
        self,
        length: int,
        block_size: int,
        identity: Callable[[], Identity],
        *,
        read_only: bool = False,
        write_cache: bool = True,
        max_transfer: int = MiB,
        granularity: int = 4 * KiB,
        not_ready: Callable[[], Error | None] = lambda: None,
        commands: Sequence[Command] = COMMANDS,
    ) -> None:
        if block_size not in (512, 4096):
            raise ValueError(f"a block size of {block_size} is not possible; expected 512 or 4096")
        if granularity < block_size or granularity & granularity - 1:
            raise ValueError(
                f"a granularity of {granularity} is not possible; "
                f"expected a power of two of at least {block_size}"
            )
        self.block_size = block_size
        self.blocks = self._blocks(length)
        self.identity = identity
        self.read_only = read_only
        self.write_cache = write_cache
        self.not_ready = not_ready
        self.commands = commands
        without_data = WITHOUT_DATA_MAX // block_size
        self.limits = Limits(
            transfer=max(max_transfer // block_size, 1),
            compare_and_write=min(COMPARE_AND_WRITE_MAX // block_size, 255),
            write_same=without_data,
            unmap=without_data,
            unmap_descriptors=UNMAP_DESCRIPTORS_MAX,
            granularity=granularity // block_size,
            without_data=without_data,
        )
        self._attentions: list[sense.Sense] = []
        self._dispatch = self._bind(commands)

    def _blocks(self, length: int) -> int:
        if length < self.block_size:
            raise ValueError(f"{length} bytes are less than one block of {self.block_size}")
        return length // self.block_size

    def _bind(self, commands: Sequence[Command]) -> list[Run]:
        """One function per operation code; those with service actions choose again."""
        dispatch: list[Run] = [_unsupported] * 256
        actions: dict[int, dict[int, Run]] = {}
        for command in commands:
            run = command.bind(self, command)
            if command.action is None:
                dispatch[command.opcode] = run
            else:
                actions.setdefault(command.opcode, {})[command.action] = run
        for opcode, runs in actions.items():
            dispatch[opcode] = _by_action(runs)
        return dispatch

    def command(self, cdb: bytes, data_out: Buffers, in_length: int) -> Answer | Task:
        """What `cdb` asks for; never raises for what comes from outside.

        `data_out` is the Data-Out area, of any length; `in_length` is the
        length in bytes of the Data-In area, and no answer is longer. `cdb` may
        be followed by padding; one that is too short is refused.
        """
        try:
            if self._attentions and (not cdb or cdb[0] not in _IN_SPITE_OF_ATTENTION):
                raise sense.CheckCondition(self._attentions.pop(0))
            return self._dispatch[cdb[0] if cdb else 0xFF](cdb, data_out, in_length)
        except sense.CheckCondition as condition:
            return condition.answer()

    def attention(self, what: sense.Sense) -> None:
        """Tell the next command of any initiator `what` (a sense of key 6); each `what` waits once."""
        if what not in self._attentions:
            self._attentions.append(what)

    def take_attention(self) -> sense.Sense | None:
        """The oldest unit attention, taken away."""
        return self._attentions.pop(0) if self._attentions else None

    def resize(self, length: int) -> None:
        """The disk has `length` bytes now. Raises ValueError if that is less than a block."""
        blocks = self._blocks(length)
        if blocks != self.blocks:
            self.blocks = blocks
            self.attention(sense.CAPACITY_CHANGED)

    def set_write_cache(self, on: bool) -> None:
        """Whether a write may end before it is durable from now on."""
        if on != self.write_cache:
            self.write_cache = on
            self.attention(sense.MODE_PARAMETERS_CHANGED)


def _unsupported(cdb: bytes, data_out: Buffers, in_length: int) -> Answer | Task:
    raise sense.CheckCondition(sense.INVALID_OPERATION_CODE)


def _by_action(runs: dict[int, Run]) -> Run:
    """A missing service action is a missing command, as LIO says it: initiators take it as "not there"."""

    def run(cdb: bytes, data_out: Buffers, in_length: int) -> Answer | Task:
        if len(cdb) < 2:
            raise sense.CheckCondition(sense.INVALID_FIELD_IN_CDB)
        return runs.get(cdb[1] & 0x1F, _unsupported)(cdb, data_out, in_length)

    return run
