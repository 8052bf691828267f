"""REPORT SUPPORTED OPERATION CODES (SPC-5), answered from the command table."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tcmu_replication.scsi import sense
from tcmu_replication.scsi.command import Command, Request
from tcmu_replication.scsi.task import Answer

if TYPE_CHECKING:
    from tcmu_replication.scsi.unit import LogicalUnit

_ALL, _OPCODE, _WITH_ACTION, _EITHER = 0, 1, 2, 3
_NOT_SUPPORTED, _SUPPORTED = 0x01, 0x03
_TIMEOUTS_FOLLOW_ONE, _TIMEOUTS_FOLLOW, _HAS_ACTION = 0x80, 0x02, 0x01
_NO_TIMEOUTS = struct.pack(">HBBII", 0x0A, 0, 0, 0, 0)  # "no indication" of either


def report(unit: LogicalUnit, request: Request) -> Answer:
    """All commands, or one of them with its CDB usage data."""
    option, timeouts = request["reporting_options"], bool(request["rctd"])
    if option == _ALL:
        body = b"".join(_descriptor(c, timeouts) for c in unit.commands)
        return Answer(sense.Status.GOOD, data=struct.pack(">I", len(body)) + body)
    if option > _EITHER:
        raise request.refuse("reporting_options")
    return Answer(sense.Status.GOOD, data=_one(_find(unit, request, option), timeouts))


def _descriptor(command: Command, timeouts: bool) -> bytes:
    flags = _TIMEOUTS_FOLLOW if timeouts else 0
    if command.action is not None:
        flags |= _HAS_ACTION
    head = struct.pack(">BxHxBH", command.opcode, command.action or 0, flags, command.length)
    return head + (_NO_TIMEOUTS if timeouts else b"")


def _one(command: Command | None, timeouts: bool) -> bytes:
    if command is None:
        return struct.pack(">BBH", 0, _NOT_SUPPORTED, 0)
    flags = _SUPPORTED | (_TIMEOUTS_FOLLOW_ONE if timeouts else 0)
    usage = command.usage()
    return struct.pack(">BBH", 0, flags, len(usage)) + usage + (_NO_TIMEOUTS if timeouts else b"")


def _find(unit: LogicalUnit, request: Request, option: int) -> Command | None:
    """The command that is asked about, or None; asking in a way that does not fit the opcode is refused."""
    opcode, action = request["requested_opcode"], request["requested_action"]
    rows = [c for c in unit.commands if c.opcode == opcode]
    has_actions = any(c.action is not None for c in rows)
    if rows and option != _EITHER and has_actions != (option == _WITH_ACTION):
        raise request.refuse("requested_opcode")
    wanted = action if has_actions else None
    if option == _EITHER and not has_actions and action:
        return None
    return next((c for c in rows if c.action == wanted), None)
