"""CDBs with their data, for one logical unit.

byte 0      bit 0: blocks of 4096 bytes; 1: read-only; 2: no write cache; 3: answers come late
then        any number of commands: length of the CDB (a byte), the CDB, length of the Data-In area (two
            bytes), length of the Data-Out area (two bytes; 0xFFFF: 128 KiB of zeroes), Data-Out
"""

from __future__ import annotations

from tcmu_replication.block.gate import Gate
from tcmu_replication.frontend.scsi import Runner
from tcmu_replication.scsi.commands import COMMANDS
from tcmu_replication.scsi.identity import Identity
from tcmu_replication.scsi.task import Answer
from tcmu_replication.scsi.unit import LogicalUnit
from tcmu_replication.tcmu.ring import Command
from tests.fuzz.disk import Disk
from tests.fuzz.script import Script

LENGTH = 64 << 10
WORDS = tuple(
    bytes((len(c.encode()),)) + c.encode(**({"blocks": 1} if "blocks" in c.by_name else {})) for c in COMMANDS
)
MAX_LENGTH = 1024

_GUARD = 0xEE
_SENSE_KEYS = (0x05, 0x06, 0x07, 0x0E)
IDENTITY = Identity(vendor="ACME", product="fuzz", revision="1.0", serial="0123456789abcdef")


def check(data: bytes) -> None:
    """Every command ends once with a status, inside of its areas and of the disk."""
    script = Script(data)
    flags = script.number()
    disk = Disk(LENGTH, 0xFF if flags & 8 else 0)
    unit = LogicalUnit(
        LENGTH,
        4096 if flags & 1 else 512,
        lambda: IDENTITY,
        read_only=bool(flags & 2),
        write_cache=not flags & 4,
    )
    before = bytes(disk.data)
    runner = Runner(Gate(disk))
    while script.left:
        cdb = script.take(script.number())
        in_length, out_length = script.number(2), script.number(2)
        data_out = bytes(128 << 10) if out_length == 0xFFFF else script.take(out_length)
        _run(unit, runner, disk, cdb, data_out, in_length)
    assert len(disk.data) == LENGTH
    assert not flags & 2 or disk.data == before, "a read-only disk was written"


def _run(unit: LogicalUnit, runner: Runner, disk: Disk, cdb: bytes, data_out: bytes, in_length: int) -> None:
    area = bytearray([_GUARD]) * in_length
    out = [memoryview(data_out[:7]), memoryview(data_out[7:])]
    outcome = unit.command(cdb, out, in_length)
    ends = [(outcome, 0)] if isinstance(outcome, Answer) else []
    if not isinstance(outcome, Answer):
        runner.run(outcome, out, [memoryview(area)], lambda *end: ends.append(end), Command(0, cdb, [], 0))
        while disk.release():
            pass
    ((answer, filled),) = ends
    assert len(answer.data) <= in_length
    assert filled <= in_length
    if answer.status:
        assert answer.status == 2
        assert answer.sense[0] & 0x7F == 0x70
        assert answer.sense[2] & 0x0F in _SENSE_KEYS
        assert not answer.data
        assert not filled
    else:
        assert area[filled:].count(_GUARD) == in_length - filled
