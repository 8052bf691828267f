"""What a control server says to the worker or the manager that has connected to it.

byte 0      bytes of a piece, 0 for all at once
the rest    QMP: greeting, replies to three commands, events
"""

from __future__ import annotations

import asyncio

from tcmu_replication.control.connection import Connection
from tcmu_replication.control.protocol import SPOKEN, Host, Range, agree
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication import peer
from tests.fuzz.script import Script, pieces, told
from tests.fuzz.wire import Loop, Wire, running

WORDS = (
    b'{"QMP":{}}',
    b'{"id":1,"return":{"stage":"running","epoch":7,"generation":"3f2a","length":4096,"error":"no"}}',
    b'{"id":1,"return":{"lowest":2,"highest":3,"version":"0.2.0"}}',
    *(b'{"id":%d,"return":{}}' % number for number in (1, 2, 3)),
    b'{"id":1,"error":{"class":"GenericError","desc":"no"}}',
    b'{"event":"REPLICATION_STAGE","data":{}}',
    b'"data":{"kind":"peer-lost","offset":1,"length":2}',
)
MAX_LENGTH = 2048

_NOTHING = Wire(b"")


class _Transport(asyncio.Transport):
    """Takes what is written; nobody hears it."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Lost."""

    def abort(self) -> None:
        """Remember it."""
        self.aborted = True


def check(data: bytes) -> None:
    """A command gets its answer, an error or the end of the connection; an answer is what it should be or a lie."""
    script = Script(data)
    step = script.number()
    with running(Loop()) as loop:
        connection = Connection()
        transport = _Transport()
        connection.connection_made(transport)
        commands = [
            asyncio.Task(connection.execute("peer-hello"), loop=loop)  # type: ignore[arg-type]
            for _ in range(3)
        ]
        loop.run(_NOTHING, lambda: False)
        for piece in pieces(script.rest(), step):
            if transport.aborted:
                break
            connection.data_received(piece)
            loop.run(_NOTHING, lambda: False)
        connection.connection_lost(None)
        loop.run(_NOTHING, lambda: False)
        assert connection.lost.done()
        for command in commands:
            _outcome(command)


def _outcome(command: asyncio.Task[object]) -> None:
    assert command.done(), "a command without an end"
    error = command.exception()
    if error is not None:
        assert isinstance(error, Error), repr(error)
        told(error, *Kind)
        return
    _greeting(command.result())
    _state(command.result())


def _greeting(answer: object) -> None:
    try:
        found = peer.greeting_of(answer)
    except Error as lie:
        told(lie, Kind.PEER_LIED)
        return
    theirs = Host("beta", Range(found.lowest, found.highest), found.version)
    terms = agree(Host("alpha", SPOKEN, "0.1.0"), theirs)
    assert (terms.refusal == "") == (terms.protocol is not None)
    assert terms.refusal.isprintable()
    if terms.protocol is not None:
        assert found.lowest <= terms.protocol <= found.highest
        assert SPOKEN.lowest <= terms.protocol <= SPOKEN.highest


def _state(answer: object) -> None:
    try:
        state = peer.state_of(answer)
    except Error as lie:
        told(lie, Kind.PEER_LIED)
        return
    assert 0 <= state.epoch < 1 << 63
    assert 0 <= state.length < 1 << 63
    assert (state.generation + (state.error or "")).isprintable()
