"""What a row of the command table is made of, and how a CDB is decoded by it."""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.buffers import Buffers, take, total
from tcmu_replication.scsi.task import Answer, Task

if TYPE_CHECKING:
    from tcmu_replication.scsi.unit import LogicalUnit


class Data(enum.Enum):
    """Which way a command's data go, seen from the initiator as in SAM."""

    NONE = "none"
    IN = "in"
    OUT = "out"


class Field(NamedTuple):
    """`width` bits of a CDB from bit `msb` of byte `byte` on, most significant first.

    A `zero` field belongs to a feature that the unit does not have: any other
    value is refused. Fields that no row names are reserved or do not matter
    here (GROUP NUMBER, CONTROL) and are ignored, as LIO's own backstores do.
    """

    name: str
    byte: int
    width: int
    msb: int = 7
    zero: bool = False

    @property
    def end(self) -> int:
        """The byte after the last one that the field touches."""
        return self.byte + (7 - self.msb + self.width + 7) // 8

    @property
    def shift(self) -> int:
        """Bits between the field's lowest bit and the end of its last byte."""
        return (self.end - self.byte) * 8 - (7 - self.msb) - self.width

    def value(self, cdb: bytes) -> int:
        """The field in `cdb`, which is long enough."""
        return int.from_bytes(cdb[self.byte : self.end], "big") >> self.shift & (1 << self.width) - 1

    def place(self, value: int) -> int:
        """`value` where it stands in the bytes [byte, end), as a big-endian number."""
        return value << self.shift

    def pointer(self) -> sense.FieldPointer:
        """Where sense data say that this field is wrong."""
        return sense.FieldPointer(self.byte, None if self.width % 8 == 0 else self.msb)


Run = Callable[[bytes, Buffers, int], Answer | Task]
"""(CDB, Data-Out area, length of the Data-In area) to an end or to work. Raises CheckCondition."""

_STRUCT_CODES = {16: "H", 32: "I", 64: "Q"}


@dataclass(frozen=True)
class Command:
    """One row: how a command is recognised, decoded and carried out.

    `bind` makes the function that runs the command for one unit. `action` is
    the service action, in bits 4..0 of byte 1, of commands that share an
    operation code. `writes` says that it changes the medium.
    """

    opcode: int
    name: str
    length: int
    data: Data
    bind: Callable[[LogicalUnit, Command], Run]
    fields: tuple[Field, ...]
    spec: str
    action: int | None = None
    writes: bool = False
    by_name: dict[str, Field] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {f.name: f for f in self.fields})

    @property
    def refused(self) -> tuple[Field, ...]:
        """The fields that must be zero."""
        return tuple(f for f in self.fields if f.zero)

    def mask(self, *fields: Field) -> bytes:
        """A CDB with the bits of `fields` set."""
        whole = bytearray(self.length)
        for f in fields:
            for index, byte in enumerate(f.place((1 << f.width) - 1).to_bytes(f.end - f.byte, "big"), f.byte):
                whole[index] |= byte
        return bytes(whole)

    def usage(self) -> bytes:
        """CDB usage data (SPC-5, REPORT SUPPORTED OPERATION CODES): the bits that are evaluated."""
        whole = bytearray(self.mask(*(f for f in self.fields if not f.zero)))
        whole[0] = self.opcode
        if self.action is not None:
            whole[1] = whole[1] & 0xE0 | self.action
        return bytes(whole)

    def encode(self, **values: int) -> bytes:
        """A CDB with the named fields set; the other bits are zero."""
        whole = bytearray(self.length)
        whole[0] = self.opcode
        whole[1] = self.action or 0
        for name, value in values.items():
            f = self.by_name[name]
            assert 0 <= value < 1 << f.width, f"{name}={value} does not fit {f.width} bits of {self.name}"
            for index, byte in enumerate(f.place(value).to_bytes(f.end - f.byte, "big"), f.byte):
                whole[index] |= byte
        return bytes(whole)

    def layout(self, *names: str) -> struct.Struct:
        """Unpacks byte 1 and then the named fields, which are whole bytes and in this order in the CDB."""
        form, position = ">xB", 2
        for f in (self.by_name[name] for name in names):
            form += f"{f.byte - position}x{_STRUCT_CODES[f.width]}"
            position = f.end
        return struct.Struct(form + f"{self.length - position}x")


class Request:
    """One command on its way through a handler: `request["lba"]` is a field's value."""

    __slots__ = ("cdb", "command", "data_out", "in_length")

    def __init__(self, command: Command, cdb: bytes, data_out: Buffers, in_length: int) -> None:
        self.command = command
        self.cdb = cdb
        self.data_out = data_out
        self.in_length = in_length

    def __getitem__(self, name: str) -> int:
        return self.command.by_name[name].value(self.cdb)

    def has(self, name: str) -> bool:
        """Whether this command has the field at all."""
        return name in self.command.by_name

    def refuse(self, name: str) -> sense.CheckCondition:
        """What to raise if the field has a value that cannot be."""
        return sense.CheckCondition(sense.INVALID_FIELD_IN_CDB, pointer=self.command.by_name[name].pointer())

    def parameters(self, length: int) -> bytes:
        """The parameter list, `length` bytes as the CDB says; raises if the Data-Out area is shorter."""
        if total(self.data_out) < length:
            raise sense.CheckCondition(sense.PARAMETER_LIST_LENGTH_ERROR)
        return take(self.data_out, length)


Handler = Callable[["LogicalUnit", Request], Answer | Task]


def checked(handler: Handler) -> Callable[[LogicalUnit, Command], Run]:
    """Bind `handler` with the checks that all commands share.

    CDB length, fields that must be zero and write protection are looked at
    before it; its Data-In bytes are cut to the allocation length and to the
    area after it.
    """

    def bind(unit: LogicalUnit, command: Command) -> Run:
        refused = command.refused
        allocation = command.by_name.get("allocation_length")

        def run(cdb: bytes, data_out: Buffers, in_length: int) -> Answer | Task:
            if len(cdb) < command.length:
                raise sense.CheckCondition(sense.INVALID_FIELD_IN_CDB)
            request = Request(command, cdb, data_out, in_length)
            for f in refused:
                if f.value(cdb):
                    raise request.refuse(f.name)
            if command.writes and unit.read_only:
                raise sense.CheckCondition(sense.WRITE_PROTECTED)
            outcome = handler(unit, request)
            if isinstance(outcome, Answer) and outcome.data:
                room = in_length if allocation is None else min(in_length, allocation.value(cdb))
                return outcome._replace(data=outcome.data[:room])
            return outcome

        return run

    return bind
