"""How pieces of a resync go to the peer: claimed, read, handed on, arrived, flushed there, and only then clean.

Each step begins in the callback of the one before, so that many pieces are under way and none is a task. The
piece is handed on in the same step of the loop in which its claim is released: what is written to it later
follows it. It is clean after a flush of the peer that began when it had arrived, since nothing else
remembers that it was sent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from tcmu_replication.block.dirty import Sweep
from tcmu_replication.block.gate import Claim, Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending, attempt, gather
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.pace import Clock
from tcmu_replication.units import BLOCK, MiB, blocks_of

UNDER_WAY = 8 * MiB
"""Bytes that the peer has not answered to yet, about: what the memory holds of them."""
PIECES = 64
"""And so many pieces."""
FLUSH = 16 * MiB
"""So much has arrived: flush the peer. Four times as much waits for a flush at most."""
FLUSH_PIECES = 128
"""Or so many pieces have; twice as many wait at most."""
FLUSH_S = 1.0
"""Or so long ago the first of them."""

_LOST = frozenset((Kind.PEER_LOST, Kind.PEER_LIED, Kind.TIMED_OUT, Kind.CANCELLED, Kind.INVALID_STATE))
"""What a remote node says of a request without an answer. Whether there will be one again is the engine's to know."""

_ZEROES = bytes(MiB)


class Piece:
    """Blocks that are claimed and read together; `parts` of them are sent: (offset, length, zero)."""

    __slots__ = ("claim", "data", "length", "offset", "parts", "sweep")

    def __init__(self, offset: int, length: int, claim: Claim) -> None:
        self.offset = offset
        self.length = length
        self.claim = claim
        self.sweep: Sweep | None = None
        self.parts: list[tuple[int, int, bool]] = []
        self.data = memoryview(b"")


class Sender:
    """Sends what is dirty in ranges of blocks from `disk` through `forward`; `gate` is the top of the LUN's chain.

    `wake` is called whenever something has ended. Then `lost` may say that the peer does not answer, and
    `failure` what else went wrong, in `failed_to`. `sent` are bytes of data, `zeroed` those that travelled
    as zeroes; `zeroes` says that the last piece was nothing else.
    """

    def __init__(
        self, disk: Node, gate: Gate, forward: Resyncing, wake: Callable[[], None], clock: Clock
    ) -> None:
        self.pieces = 0
        self.sent = 0
        self.zeroed = 0
        self.zeroes = False
        self.lost: Error | None = None
        self.failure: Error | None = None
        self.failed_to: Literal["read", "write"] = "write"
        self.probing = False
        """One piece at a time, until the peer has answered to one."""
        self._disk = disk
        self._gate = gate
        self._forward = forward
        self._dirty = forward.dirty
        self._wake = wake
        self._clock = clock
        self._stopped = False
        self._bytes = 0
        self._claims: list[Claim] = []
        self._arrived: list[Sweep] = []
        self._arrived_bytes = 0
        self._arrived_at = 0.0
        self._flushing: list[Sweep] = []

    @property
    def full(self) -> bool:
        """Whether as much is under way as may be."""
        return (
            self._bytes >= UNDER_WAY
            or self.pieces >= (1 if self.probing else PIECES)
            or len(self._arrived) + len(self._flushing) >= 2 * FLUSH_PIECES
            or self._arrived_bytes >= 4 * FLUSH
        )

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way, and what has arrived was flushed."""
        return not (self.pieces or self._arrived or self._flushing)

    def begin(self, first: int, last: int) -> None:
        """Send what is dirty in these blocks, when the claim is granted."""
        offset, length = self._range(first, last)
        piece = Piece(offset, length, self._gate.claim(offset, length))
        self.pieces += 1
        self._bytes += length
        if piece.claim.granted is None:
            self._read(piece)
        else:
            piece.claim.granted.then(partial(self._read_later, piece))

    def hand_over(self) -> None:
        """Release the claims of what was handed on, which starts it. In the same step of the loop as `begin`."""
        claims, self._claims = self._claims, []
        for claim in claims:
            claim.release()

    def flush(self, *, now: bool = False) -> None:
        """Flush the peer if enough has arrived, or anything `now`; not while a flush is under way."""
        if self._flushing or not self._arrived or self.lost is not None:
            return
        due = (
            now
            or self._arrived_bytes >= FLUSH
            or len(self._arrived) >= FLUSH_PIECES
            or self._clock() - self._arrived_at >= FLUSH_S
        )
        if not due:
            return
        self._flushing, self._arrived, self._arrived_bytes = self._arrived, [], 0
        error, flushing = attempt(self._forward.flush_resent)
        if flushing is None:
            self._flushed(error)
        else:
            flushing.then(lambda p: self._flushed(p.error))
            self._forward.unplug()

    def give_up(self) -> None:
        """What has arrived and was not flushed stays dirty: the peer may have lost it."""
        arrived, self._arrived, self._arrived_bytes = self._arrived, [], 0
        for sweep in arrived:
            self._dirty.failed(sweep)

    def stop(self) -> None:
        """Send nothing more. What is under way ends by itself, and makes nothing clean but for a flush under way."""
        self._stopped = True
        self.hand_over()
        self.give_up()

    # --- claimed, read

    def _read_later(self, piece: Piece, _: Pending) -> None:
        self._read(piece)
        self.hand_over()

    def _read(self, piece: Piece) -> None:
        """The claim is granted: read what is dirty now."""
        first = piece.offset // BLOCK
        last = first + blocks_of(piece.length)
        piece.sweep = self._dirty.sweep_blocks(first, last)
        if self._stopped:
            self._not_sent(piece, Error(Kind.CANCELLED))
            return
        try:
            piece.parts = self._parts(piece, first, last)
            reading = self._read_data(piece)
        except Error as error:
            self._not_read(piece, error)
            return
        if reading is None:
            self._send(piece)
        else:
            reading.then(partial(self._was_read, piece))
            self._disk.unplug()

    def _parts(self, piece: Piece, first: int, last: int) -> list[tuple[int, int, bool]]:
        """The dirty runs of a piece, split where zeroes begin and end."""
        found: list[tuple[int, int, bool]] = []
        extents = iter(self._disk.extents(piece.offset, piece.length))
        until, zero = piece.offset, False
        for run in self._dirty.marks.runs(first, last):
            start, length = self._range(*run)
            end = start + length
            while start < end:
                while until <= start:
                    extent = next(extents)
                    until, zero = until + extent.length, extent.zero
                stop = min(end, until)
                found.append((start, stop - start, zero))
                start = stop
        return found

    def _read_data(self, piece: Piece) -> Pending | None:
        """Read from the first to the last byte that is not known to be zero."""
        data = [(start, start + length) for start, length, zero in piece.parts if not zero]
        if not data:
            return None
        start, end = data[0][0], data[-1][1]
        piece.data = memoryview(bytearray(end - start))
        return self._disk.read(start, [piece.data])

    def _was_read(self, piece: Piece, reading: Pending) -> None:
        if reading.error is not None:
            self._not_read(piece, reading.error)
        elif self._stopped:
            self._not_sent(piece, Error(Kind.CANCELLED))
        else:
            self._send(piece)
        self.hand_over()

    def _not_read(self, piece: Piece, error: Error) -> None:
        if self.failure is None:
            self.failed_to = "read"
            self.failure = error
        self._not_sent(piece, error)

    def _not_sent(self, piece: Piece, error: Error) -> None:
        self._claims.append(piece.claim)
        self._arrives(piece, error)

    # --- handed on, arrived

    def _send(self, piece: Piece) -> None:
        """Hand it on. The claim is released in the same step of the loop, with those of other pieces."""
        self.zeroes = piece.parts != [] and all(zero for _, _, zero in piece.parts)
        base = next((start for start, _, zero in piece.parts if not zero), 0)
        sending: list[Pending | None] = []
        error = None
        try:
            for start, length, zero in piece.parts:
                data = piece.data[start - base : start - base + length]
                if zero or _is_zero(data):
                    sending.append(self._forward.resend(start, length))
                    self.zeroed += length
                else:
                    sending.append(self._forward.resend(start, data))
                    self.sent += length
        except Error as met:
            error = met
        error, whole = attempt(gather, sending, error)
        self._claims.append(piece.claim)
        if whole is None:
            self._arrives(piece, error)
        else:
            whole.then(lambda p: self._arrives(piece, p.error))

    def _arrives(self, piece: Piece, error: Error | None) -> None:
        """The peer has answered, or will not."""
        assert piece.sweep is not None
        self.pieces -= 1
        self._bytes -= piece.length
        if error is None and not self._stopped:
            self.probing = False
            if not self._arrived:
                self._arrived_at = self._clock()
            self._arrived.append(piece.sweep)
            self._arrived_bytes += piece.length
        else:
            self._dirty.failed(piece.sweep)
            if error is not None:
                self._peer_failed(error)
        self._wake()

    def _flushed(self, error: Error | None) -> None:
        flushed, self._flushing = self._flushing, []
        for sweep in flushed:
            if error is not None:
                self._dirty.failed(sweep)
                continue
            try:
                self._dirty.arrived(sweep)
            except Error as met:
                self.failure = self.failure or met
        if error is not None:
            self._peer_failed(error)
        self._wake()

    def _peer_failed(self, error: Error) -> None:
        if self._stopped or self.failure is not None:
            return
        if error.kind in _LOST or self._forward.gap is not None:
            self.lost = self.lost or error
        else:
            self.failure = error

    def _range(self, first: int, last: int) -> tuple[int, int]:
        """Blocks as (offset, length): the last one of the disk may be short."""
        offset = first * BLOCK
        return offset, min(last * BLOCK, self._disk.length) - offset


def _is_zero(data: memoryview) -> bool:
    """Whether these bytes are all zero; a look at two of them says no, mostly."""
    return not (data[0] or data[-1]) and data.tobytes() == _ZEROES[: len(data)]
