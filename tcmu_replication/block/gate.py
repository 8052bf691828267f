"""The checked door at the top of a chain: bounds, read-only, the hold of a checkpoint, and claims.

Everything from outside comes through here once, whichever frontend brings it;
below, nodes trust each other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from tcmu_replication.block.buffers import size
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending, attempt, gather, settle
from tcmu_replication.block.turns import Turn, Turns
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import MiB, format_size

_MANY = 64
"""So many writes that have ended are remembered, and as many as are under way."""

SPAN = 16 * MiB
"""The longest zero or discard that is passed on as one. The kernel may have to write all of it at once, on the loop."""

Call = Callable[[], Pending | None]
"""A request that waits: makes the call of the node that is below then."""


class Gate(Node):
    """Refuses what does not fit the disk, counts what passes, and can hold it.

    A checkpoint calls `hold()`, waits for `drained()`, changes what lies below
    (`swap`), and releases the `Hold`: the requests made meanwhile then run in
    the order in which they were made (`quiet()` is all of that). Several may hold; it is
    over when the last of them has released, or its time is up. Requests of no
    bytes end at once.

    `claim()` is for a request of several calls, as COMPARE AND WRITE is: until
    it is released nobody else writes to its range, through any frontend.

    A zero or discard of more than SPAN is passed on in spans, and others have
    their turn in between; it claims its range meanwhile.

    Counters since the start: `reads`, `writes` (zeroing included), `bytes_read`
    and `bytes_written`; what is refused does not count.
    """

    def __init__(self, child: Node, *, name: str = "gate") -> None:
        super().__init__(name, child.length, child, read_only=child.read_only)
        self.reads = 0
        self.writes = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self._held = False
        self._holds = 0
        self._releasing = False
        self._guarded = False  # held, or there are claims: what a write looks at
        self._queue: deque[tuple[Call, Pending]] = deque()
        self._turns = Turns()
        self._writes: list[tuple[int, int, Pending]] = []  # from, to; some of them have ended
        self._many = _MANY
        self._in_flight = 0
        self._drained: Pending | None = None

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        """See `Node.read`. Raises `Error` OUT_OF_RANGE."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        if offset < 0 or offset + length > self.length or not length:
            self._refuse(offset, length)
            return None
        self.reads += 1
        self.bytes_read += length
        if self._held:
            return self._wait(partial(self._read_later, offset, buffers))
        pending = self.child.read(offset, buffers)
        return None if pending is None else self._follow(pending)

    def fetch(self, offset: int, length: int) -> memoryview:
        """See `Node.fetch`: at once, held or not. Raises `Error` OUT_OF_RANGE."""
        self._check(offset, length)
        return self.child.fetch(offset, length) if length else memoryview(b"")

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        if self.read_only or offset < 0 or offset + length > self.length or not length:
            self._refuse(offset, length, writes=True)
            return None
        self.writes += 1
        self.bytes_written += length
        if self._guarded:
            return self._guard(offset, length, partial(self._write_later, offset, buffers, fua))
        pending = self.child.write(offset, buffers, fua)
        return None if pending is None else self._follow_write(pending, offset, length)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        if self.read_only or offset < 0 or length <= 0 or offset + length > self.length:
            self._refuse(offset, length, writes=True)
            return None
        self.writes += 1
        self.bytes_written += length
        if length > SPAN:
            return _InSpans(self, offset, length, partial(self._zero_later, fua=fua, unmap=unmap)).whole
        if self._guarded:
            return self._guard(offset, length, partial(self._zero_later, offset, length, fua, unmap))
        return self._follow_write(self.child.zero(offset, length, fua, unmap), offset, length)

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        if self.read_only or offset < 0 or length <= 0 or offset + length > self.length:
            self._refuse(offset, length, writes=True)
            return None
        if length > SPAN:
            return _InSpans(self, offset, length, self._discard_later).whole
        if self._guarded:
            return self._guard(offset, length, partial(self._discard_later, offset, length))
        return self._follow_write(self.child.discard(offset, length), offset, length)

    def flush(self) -> Pending | None:
        """See `Node.flush`."""
        if self._held:
            return self._wait(self._flush_later)
        return self._follow(self.child.flush())

    def claim(self, offset: int, length: int) -> Claim:
        """A range of at least one byte for one request alone. Raises `Error` READ_ONLY or OUT_OF_RANGE."""
        if self.read_only or offset < 0 or length <= 0 or offset + length > self.length:
            self._refuse(offset, length, writes=True)
        claim = Claim(self, offset, length)
        claim.granted = self._wait(claim.stand) if self._held else claim.stand()
        return claim

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Node.extents`: at once, held or not. Raises `Error` OUT_OF_RANGE."""
        self._check(offset, length)
        return self.child.extents(offset, length) if length else []

    def hold(self, limit_s: float | None = None) -> Hold:
        """From now on requests wait for the answer's release. What was gathered below is started.

        After `limit_s` seconds it is released by itself: no peer that dies, and no disk that hangs, keeps
        a LUN held.
        """
        self._held = self._guarded = True
        self._holds += 1
        self._releasing = False
        self.child.unplug()
        return Hold(self, limit_s)

    @property
    def not_ready(self) -> Error | None:  # type: ignore[override]
        """See `Node.not_ready`: that of what lies below now."""
        return self.child.not_ready

    @property
    def held(self) -> bool:
        """Whether new requests wait."""
        return self._held

    @property
    def in_flight(self) -> int:
        """Requests that were passed on and have not ended, or wait for a claim; not those that a hold lets wait."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for the release of what holds them."""
        return len(self._queue)

    def drained(self) -> Pending | None:
        """Ends when nothing that was passed on is under way; None if nothing is."""
        if self._in_flight == 0:
            return None
        if self._drained is None:
            self._drained = Pending()
        return self._drained

    def swap(self, child: Node) -> Node:
        """Put `child` below instead of the present node, which is returned and stays open.

        Raises `Error` INVALID_STATE unless held and drained, BAD_CONFIG when the length differs.
        """
        if not self._held or self._in_flight:
            raise Error(
                Kind.INVALID_STATE,
                f"{self.name}: the node below is exchanged only while requests are held and none is in flight"
                f" (held: {self._held}, in flight: {self._in_flight})",
            )
        if child.length != self.length:
            raise Error(
                Kind.BAD_CONFIG,
                f"{child.name} has {child.length} bytes and {self.child.name} has {self.length}; "
                "they must be equal",
            )
        before, self.child = self.child, child
        self.read_only = child.read_only
        return before

    def _let_go(self) -> None:
        """A hold is over. After the last: run what waited, in order, and let requests pass again.

        Requests made by whoever is told of an end meanwhile come after those
        that waited. A `hold` from there stops the release.
        """
        self._holds -= 1
        if self._holds:
            return
        self._releasing = True
        while self._queue and self._releasing:
            call, promised = self._queue.popleft()
            error, pending = attempt(call)
            if pending is None:
                promised.complete(error)
            else:
                pending.then(partial(_pass_on, promised))
        if self._releasing:
            self._releasing = self._held = False
            self._guarded = bool(self._turns)
        self.child.unplug()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Within it nothing is under way, and new requests wait."""
        hold = self.hold()
        try:
            await settle(self.drained())
            yield
        finally:
            hold.release()

    def _wait(self, call: Call) -> Pending:
        promised = Pending()
        self._queue.append((call, promised))
        return promised

    def _guard(self, offset: int, length: int, call: Call) -> Pending | None:
        """A write that a hold, or the claim of another, may let wait."""
        if self._held:
            return self._wait(partial(self._in_turn, offset, length, call))
        return self._in_turn(offset, length, call)

    def _in_turn(self, offset: int, length: int, call: Call) -> Pending | None:
        """Make a write when those in line before it have begun (the nodes below keep the order) or been released."""
        ahead = self._turns.ahead(offset, offset + length)
        if not ahead:
            return self._follow_write(call(), offset, length)
        promised = Pending()

        def begin() -> None:
            error, pending = attempt(call)
            self._follow_write(pending, offset, length)
            self._turns.leave(turn)
            if pending is None:
                promised.complete(error)
            else:
                pending.then(partial(_pass_on, promised))

        turn = Turn(offset, offset + length, begin)
        self._turns.stand(turn, ahead)
        return self._follow(promised)

    def _follow_write(self, pending: Pending | None, offset: int, length: int) -> Pending | None:
        """As `_follow`, and whoever claims its range waits for its end. (Several may share one `Pending`.)"""
        if pending is not None and not pending.done:
            self._in_flight += 1
            pending.then(self._ended)
            self._writes.append((offset, offset + length, pending))
            if len(self._writes) > self._many:  # cheaper than to look for each that ends
                self._writes = [write for write in self._writes if not write[2].done]
                self._many = 2 * len(self._writes) + _MANY
        return pending

    # What waits does so with the node that is below when it is made: another may be put there meanwhile. (Functions and
    # not lambdas, which would make every request slower, also where nothing waits.)

    def _read_later(self, offset: int, buffers: Buffers) -> Pending | None:
        return self._follow(self.child.read(offset, buffers))

    def _write_later(self, offset: int, buffers: Buffers, fua: bool) -> Pending | None:
        return self.child.write(offset, buffers, fua)

    def _zero_later(self, offset: int, length: int, fua: bool, unmap: bool) -> Pending | None:
        return self.child.zero(offset, length, fua, unmap)

    def _discard_later(self, offset: int, length: int) -> Pending | None:
        return self.child.discard(offset, length)

    def _flush_later(self) -> Pending | None:
        return self._follow(self.child.flush())

    def _follow(self, pending: Pending | None) -> Pending | None:
        if pending is not None and not pending.done:
            self._in_flight += 1
            pending.then(self._ended)
        return pending

    def _ended(self, _: Pending) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._drained is not None:
            drained, self._drained = self._drained, None
            drained.complete()

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise Error(
                Kind.OUT_OF_RANGE,
                f"{self.name}: outside the disk of {self.length} bytes ({format_size(self.length)})",
                offset=offset,
                length=length,
            )

    def _refuse(self, offset: int, length: int, *, writes: bool = False) -> None:
        """The error of a request that does not pass, or nothing if it is only empty."""
        if writes and self.read_only:
            raise Error(Kind.READ_ONLY, f"{self.name}: {self.child.name} is read-only")
        self._check(offset, length)


class Hold:
    """One reason why a gate is held; by `Gate.hold`."""

    def __init__(self, gate: Gate, limit_s: float | None) -> None:
        self.expired = False
        self._gate = gate
        self._over = False
        self._timer: asyncio.TimerHandle | None = None
        if limit_s is not None:
            self._timer = asyncio.get_running_loop().call_later(limit_s, self._expire)

    def release(self) -> None:
        """End it. Twice is fine."""
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._gate._let_go()

    def check(self, what: str) -> None:
        """Raise `Error(TIMED_OUT)` if the time was up before `what` was done."""
        if self.expired:
            raise Error(Kind.TIMED_OUT, f"{what} took too long: requests were held, and go on without it")

    def _expire(self) -> None:
        self.expired = True
        self.release()


class Claim:
    """A request of several calls on one range, to which nobody else writes until `release`; by `Gate.claim`.

    `granted` is None, or ends when the request may begin: when no write to the
    range is under way and no earlier claim is left. Writes to the range that
    come later stand in line. It is in flight from when it stands in line, so
    what it reads and writes passes a gate that is held meanwhile.
    """

    def __init__(self, gate: Gate, offset: int, length: int) -> None:
        self.granted: Pending | None = None
        self._gate = gate
        self._offset = offset
        self._length = length
        self._ready = Pending()
        self._released = Pending()
        self._turn = Turn(offset, offset + length, self._begin)

    def read(self, buffers: Buffers) -> Pending | None:
        """Fill `buffers`, which are as long as the range. See `Node.read`."""
        self._gate.reads += 1
        self._gate.bytes_read += self._length
        return self._gate.child.read(self._offset, buffers)

    def write(self, buffers: Buffers, fua: bool = False) -> Pending | None:
        """Write `buffers`, which are as long as the range. See `Node.write`."""
        self._gate.writes += 1
        self._gate.bytes_written += self._length
        return self._gate.child.write(self._offset, buffers, fua)

    def release(self) -> None:
        """Let the next in line begin: once, when it was granted and its calls have ended."""
        gate = self._gate
        gate._turns.leave(self._turn)
        gate._guarded = gate._held or bool(gate._turns)
        gate.child.unplug()
        self._released.complete()

    def stand(self) -> Pending | None:
        """For the gate, when nothing is held: stand in line. What `granted` is to be."""
        gate = self._gate
        gate._guarded = True
        gate._follow(self._released)
        gate._turns.stand(self._turn, gate._turns.ahead(self._turn.start, self._turn.end))
        return None if self._ready.done else self._ready

    def _begin(self) -> None:
        """It is the first in line; writes that were there before any line may be under way still."""
        busy = gather(
            pending
            for start, end, pending in self._gate._writes
            if start < self._turn.end and self._turn.start < end and not pending.done
        )
        if busy is None:
            self._ready.complete()
        else:
            busy.then(lambda _: self._ready.complete())


class _InSpans:
    """A long zero or discard under way; `whole` ends with it, or with the first span that fails."""

    def __init__(
        self, gate: Gate, offset: int, length: int, call: Callable[[int, int], Pending | None]
    ) -> None:
        self.whole = Pending()
        self._gate = gate
        self._at = offset
        self._end = offset + length
        self._call = call
        self._claim = gate.claim(offset, length)
        if self._claim.granted is None:
            self._next()
        else:
            self._claim.granted.then(self._next)

    def _next(self, ended: Pending | None = None) -> None:
        """The next span, if the one before has ended well."""
        error = None if ended is None else ended.error
        while error is None and self._at < self._end:
            at, length = self._at, min(SPAN, self._end - self._at)
            self._at += length
            error, pending = attempt(self._call, at, length)
            if pending is not None:
                self._gate.unplug()  # most spans are in no batch of a frontend's
                if not pending.done:
                    pending.then(self._next)
                    return
                error = pending.error
            if error is None and self._at < self._end and self._make_way():
                return
        self._claim.release()
        self.whole.complete(error)

    def _make_way(self) -> bool:
        """Go on when the loop has looked after others; False if no loop runs, and so nobody else waits."""
        try:
            asyncio.get_running_loop().call_soon(self._next)
        except RuntimeError:
            return False
        return True


def _pass_on(promised: Pending, ended: Pending) -> None:
    promised.complete(ended.error, ended.value)
