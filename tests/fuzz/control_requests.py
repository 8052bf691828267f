"""What an operator or the peer says to a control server.

byte 0      bit 0: the peer (an operator otherwise); bit 1: it has negotiated
byte 1      bytes of a piece, 0 for all at once
the rest    QMP
"""

from __future__ import annotations

import json
from typing import NoReturn

from tcmu_replication.control import framing
from tcmu_replication.control.command import Privilege
from tcmu_replication.control.session import Call, Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.tables import COMMANDS
from tests.fuzz.script import Script, pieces, told

WORDS = (
    *(b'{"execute":"%s"' % name.encode() for name in ("qmp_capabilities", *COMMANDS)),
    b',"arguments":{',
    b',"id":',
    b"{'execute':'yank','arguments':{'instances':[",
    b"\\ud800",
    b"1e999",
    b"NaN",
)
MAX_LENGTH = 2048


def check(data: bytes) -> None:
    """Every object is answered in JSON or is a call that its sender may make; anything else is the end."""
    script = Script(data)
    flags, step = script.number(), script.number()
    privilege = Privilege.PEER if flags & 1 else Privilege.OPERATOR
    session = Session(COMMANDS, COMMANDS, privilege, "fuzz")
    session.negotiated = bool(flags & 2)
    objects = framing.Objects()
    try:
        for piece in pieces(script.rest(), step):
            for message in objects.feed(piece):
                _answer(session, message)
    except Error as error:
        told(error, Kind.BAD_REQUEST)


def _answer(session: Session, message: bytes) -> None:
    asked = session.receive(message)
    if isinstance(asked, Call):
        assert session.negotiated
        assert session.privilege is Privilege.OPERATOR or asked.command.privilege is Privilege.PEER
        assert isinstance(asked.arguments, asked.command.arguments)
        asked = session.fail(asked, Error(Kind.IO))
    assert len(asked) < 2000 + 8 * len(message), "an answer much longer than what was asked"
    assert asked.endswith(b"\r\n")
    assert asked.count(b"\n") == 1
    reply = json.loads(asked, parse_constant=_no_json)
    assert ("return" in reply) != ("error" in reply)
    assert ("id" in reply) == ("id" in framing.decode(message))


def _no_json(word: str) -> NoReturn:
    raise AssertionError(f"{word} is not JSON")
