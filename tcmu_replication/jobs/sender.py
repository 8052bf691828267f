"""How pieces of a resync go to the peer: claimed, read, handed on, arrived, flushed there, and only then clean.

Each step begins in the callback of the one before, so that many pieces are under way and none is a task. The
piece is handed on in the same step of the loop in which its claim is released: what is written to it later
follows it. It is clean after a flush of the peer that began when it had arrived, since nothing else
remembers that it was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

from tcmu_replication.block.dirty import Sweep
from tcmu_replication.block.gate import Claim, Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending, attempt
from tcmu_replication.block.resyncing import Part, Resyncing
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.pace import LONGEST, Clock
from tcmu_replication.units import BLOCK, KiB, MiB, blocks_of

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

LOOK = 64 * KiB
"""Zeroes are found in what was read where there are so many at a multiple of this. To ask the disk for each piece
can take longer than to read it: tmpfs looks at all pages up to the next hole."""
SPARE = 8
"""Buffers that are kept for the next pieces, since new memory has to be made and cleared by the kernel."""
SPARE_FROM = LONGEST // 4
"""A piece that is longer takes one of them."""

_ZEROES = bytes(LOOK)


class Piece:
    """A range that is claimed and read together. Its dirty `runs` are sent; without a `buffer` they are zero."""

    __slots__ = ("buffer", "claim", "length", "offset", "runs", "sweep")

    def __init__(self, offset: int, length: int, claim: Claim) -> None:
        self.offset = offset
        self.length = length
        self.claim = claim
        self.sweep: Sweep | None = None
        self.runs: list[tuple[int, int]] = []
        self.buffer: bytearray | None = None


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
        self._spare: list[bytearray] = []
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

    def begin(self, runs: Sequence[tuple[int, int]]) -> None:
        """Send what is dirty from the first to the last of these runs of blocks, when the claim is granted.

        The runs are what is dirty there now.
        """
        offset, length = self._range(runs[0][0], runs[-1][1])
        piece = Piece(offset, length, self._gate.claim(offset, length))
        self.pieces += 1
        self._bytes += length
        if piece.claim.granted is None:
            self._read(piece, runs)
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
        first = piece.offset // BLOCK
        self._read(piece, list(self._dirty.marks.runs(first, first + blocks_of(piece.length))))
        self.hand_over()

    def _read(self, piece: Piece, runs: Sequence[tuple[int, int]]) -> None:
        """The claim is granted: read what is dirty now."""
        first = piece.offset // BLOCK
        last = first + blocks_of(piece.length)
        piece.sweep = self._dirty.sweep_blocks(first, last)
        if self._stopped:
            self._not_sent(piece, Error(Kind.CANCELLED))
            return
        piece.runs = [self._range(*run) for run in runs]
        try:
            reading = self._read_data(piece)
        except Error as error:
            self._not_read(piece, error)
            return
        if reading is None:
            self._send(piece)
        else:
            reading.then(partial(self._was_read, piece))
            self._disk.unplug()

    def _read_data(self, piece: Piece) -> Pending | None:
        """Read from the first to the last dirty byte. Of a piece that is longer than any other the disk knows more."""
        if not piece.runs:
            return None
        start, end = piece.runs[0][0], sum(piece.runs[-1])
        if end - start > LONGEST and all(extent.zero for extent in self._disk.extents(start, end - start)):
            return None
        if SPARE_FROM <= end - start <= LONGEST:
            piece.buffer = self._spare.pop() if self._spare else bytearray(LONGEST)
        else:
            piece.buffer = bytearray(end - start)
        return self._disk.read(start, [memoryview(piece.buffer)[: end - start]])

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
        parts = _parts(piece)
        data = sum([part[1] for part in parts if part[2] is not None])
        self.sent += data
        self.zeroed += sum([part[1] for part in parts]) - data
        self.zeroes = not data
        error, whole = attempt(self._forward.resend, parts)
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
        if piece.buffer is not None and len(piece.buffer) == LONGEST and len(self._spare) < SPARE:
            self._spare.append(piece.buffer)
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


def _parts(piece: Piece) -> list[Part]:
    """What is sent of a piece. Zeroes are looked for in whole LOOKs."""
    if piece.buffer is None:
        return [(start, length, None) for start, length in piece.runs]
    data = memoryview(piece.buffer)
    base = piece.runs[0][0]
    found: list[Part] = []
    for start, length in piece.runs:
        if length > LOOK:
            found += _looked_at(start, data[start - base : start - base + length])
        else:
            part = data[start - base : start - base + length]
            found.append((start, length, None if _is_zero(part) else part))
    return found


def _looked_at(start: int, data: memoryview) -> Iterator[Part]:
    """A long run, split where zeroes begin and end."""
    at, zero = 0, False
    for here in range(0, len(data), LOOK):
        if _is_zero(data[here : here + LOOK]) != zero:
            if at < here:
                yield start + at, here - at, None if zero else data[at:here]
            at, zero = here, not zero
    yield start + at, len(data) - at, None if zero else data[at:]


def _is_zero(data: memoryview) -> bool:
    """Whether these bytes are all zero; a look at two of them says no, mostly."""
    return not (data[0] or data[-1]) and data.tobytes() == _ZEROES[: len(data)]
