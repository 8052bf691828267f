"""What a server says to our client once it has the export: replies to `CALLS`, cookies 1 to 8.

byte 0      bit 0: structured replies; 1: block status
byte 1      bytes of a piece, 0 for all at once
byte 2      bytes that the socket takes at a time, 0 for everything
the rest    replies
"""

from __future__ import annotations

from collections.abc import Sequence

from tcmu_replication.block.remote_queue import Queue, Request
from tcmu_replication.errors import Error, Kind
from tcmu_replication.nbd import protocol
from tcmu_replication.nbd.client import Session
from tcmu_replication.nbd.handshake_client import Agreement
from tcmu_replication.nbd.protocol import Chunk, Command, CommandFlag, TransmissionFlag
from tests.fuzz.script import Script, told
from tests.fuzz.wire import Loop, Wire, running

LENGTH = 1 << 20
CALLS: tuple[tuple[Command, int, int, int], ...] = (
    (Command.READ, 0, 64, 0),
    (Command.READ, 4096, 600, 0),
    (Command.WRITE, 8192, 512, int(CommandFlag.FUA)),
    (Command.WRITE_ZEROES, 16384, 4096, 0),
    (Command.TRIM, 32768, 4096, 0),
    (Command.FLUSH, 0, 0, 0),
    (Command.BLOCK_STATUS, 0, 65536, 0),
    (Command.READ, 0, 512, 0),
)
"""What the client has asked: command, offset, length, flags."""
CONTEXT = 1

_COOKIES = [number.to_bytes(8) for number in range(1, len(CALLS) + 1)]
WORDS = (
    *(protocol.SIMPLE_REPLY_MAGIC.to_bytes(4) + bytes(4) + cookie for cookie in _COOKIES),
    *(
        protocol.STRUCTURED_REPLY_MAGIC.to_bytes(4) + b"\0\1" + kind.to_bytes(2) + cookie
        for kind in Chunk
        for cookie in _COOKIES[:2]
    ),
)
MAX_LENGTH = 4096

_ABLE = (
    TransmissionFlag.HAS_FLAGS
    | TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
)
"""So each of `CALLS` is sent as it is; without block status the seventh is answered at once."""
_GUARD = 0xEE
_KINDS = (Kind.PEER_LIED, *set(protocol.KIND_OF_ERROR.values()))


class _Counted(Request):
    """A request that takes no more data than it asked for, whatever its parts."""

    __slots__ = ("taken",)

    def place(self, start: int, length: int) -> list[memoryview]:
        """See `Call.place`."""
        self.taken = getattr(self, "taken", 0) + length
        assert self.taken <= self.length, "data without an end"
        return super().place(start, length)


def requests(queue: Queue) -> tuple[Sequence[Request], list[bytearray]]:
    """The calls of `CALLS`, and the memory that their data is in, between two guards."""
    made, memory = [], []
    for command, offset, length, flags in CALLS:
        area = bytearray([_GUARD]) * (length + 2)
        views = []
        if command in (Command.READ, Command.WRITE):
            half = 1 + length // 2
            views = [memoryview(area)[1:half], memoryview(area)[half : length + 1]]
        made.append(_Counted(queue, command, offset, length, views, flags))
        memory.append(area)
    return made, memory


def check(data: bytes) -> None:
    """Each call ends at most once, with data that the server sent or an error; the session ends once."""
    script = Script(data)
    flags, step, window = (script.number() for _ in range(3))
    structured = bool(flags & 1)
    agreement = Agreement(LENGTH, _ABLE, structured, CONTEXT if structured and flags & 2 else None)
    queue = Queue(16)
    made, memory = requests(queue)
    wire = Wire(script.rest(), step=step, window=window * 16)
    lost: list[Error] = []
    with running(Loop()) as loop:
        session = Session(
            wire,  # type: ignore[arg-type]
            agreement,
            b"",
            timeout_s=10.0,
            answered=lambda: None,
            lost=lost.append,
        )
        for request in made:
            queue.add(request)
        queue.send(session)
        loop.run(wire, lambda: False)
    assert session.closed
    assert len(lost) == 1
    told(lost[0], Kind.PEER_LIED, Kind.PEER_LOST)
    unanswered = set(map(id, session.calls.values()))
    for request, area in zip(made, memory, strict=True):
        assert area[0] == area[-1] == _GUARD, "data outside of a read's buffers"
        assert request.pending.done == (id(request) not in unanswered)
        if request.command != Command.READ:
            assert area.count(_GUARD) == len(area), "data into the buffers of something else"
        if request.pending.error is not None:
            told(request.pending.error, *_KINDS)
        elif request.pending.done and request.command == Command.BLOCK_STATUS:
            extents = request.pending.value
            assert 0 < sum(extent.length for extent in extents) <= request.length
