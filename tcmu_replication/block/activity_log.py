"""The activity log: where two hosts may differ if this one loses power now, and nowhere else.

A filter above what writes to this host's disk (and, on a primary, to the peer:
the mirror). An extent of 4 MiB is named in a durable file before a write to it
passes, and leaves it only when every write to it has ended, on all disks below,
and a flush that was asked for after that has succeeded. While an extent is hot a
write to it pays for a look at one byte. The precise ranges that a death of the
process alone leaves are in `block.in_flight`.

    write to a hot extent      passes at once
    write to another           waits for one durable update, with all that wait by then; the next is gathered meanwhile

What keeps it fast where a load writes all over a disk that is larger than the log
should cover:

- The target is soft. A write never waits for an extent to leave.
- What leaves is written without a sync: to forget late is safe. What has to leave
  is decided when a flush is asked for anyway, at most once in TURN_S, and what
  was written since the flush before last does not leave.
- The log may keep writes waiting for SHARE of the time, BURST_S of it at once. In
  debt, the neighbours of a missed extent become hot with it, four times as many
  with each update, so that a few updates are enough for any disk; and nothing leaves.
- Where a write continues a run that was missed before, the run ahead is named with
  it, up to STREAM extents.

Whatever fails, what is not written down is not begun: a write whose extent cannot
be named ends with the log's error. After a sync of the log that failed that is so
for every extent that is not hot, until `assume_all` says that something else,
durable, tells as much.

Writes keep their order: one that waits takes its extents out of the fast path
until it has passed, and who comes later for one of them waits behind it.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic

from tcmu_replication.block.buffers import size
from tcmu_replication.block.hot_extents import EXTENT, SHIFT, HotExtents, Piece, Run, extents_of
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import Pending, after, attempt
from tcmu_replication.errors import Error
from tcmu_replication.units import GiB

TARGET = 1 * GiB
"""More than this is not kept hot for long: what one resync after a loss of power may cost, a few seconds."""

SHARE = 0.02
"""The part of the time that writes may wait for the log, over time."""
BURST_S = 0.02
"""So much of it at once. It is saved up while nothing waits."""
DEBT_S = 1.0
"""More is not owed, however slow an update was: extents leave again after DEBT_S / SHARE at the latest."""
TURN_S = 1.0
"""Extents leave at most this often."""
STREAM = 32
"""So many extents at most are named ahead of a sequential writer: 128 MiB."""
STREAMS = 64
"""So many runs are remembered that a write may continue."""
LEAVING = 4096
"""So many runs leave at a time: a few milliseconds."""
MANY = 64
"""So many writes that have ended are remembered, and as many as are under way."""
OVERDUE_S = 30.0
"""Where nobody flushes for so long, and more is hot than the target, somebody should. See `overdue`."""

NOW = 8
"""The age of an extent: NOW if it was written since the last turn, one less for each turn since. 0: a write waits."""
_IDLE = {age: re.compile(bytes([age]) + b"+") for age in range(1, NOW - 1)}
"""The ages of what was written neither in the turn that ends now nor in the one before, and what finds a run of it."""
_OLDER = bytes([0, 1, *range(1, 255)])


class _Update:
    """An update of the file: who waits for it, and the extents that it names."""

    __slots__ = ("forced", "hot", "named", "wanted")

    def __init__(self, *, forced: bool = False) -> None:
        self.hot = Pending()
        self.wanted: list[Run] = []
        self.named: list[Run] = []
        self.forced = forced


class ActivityLog(Node):
    """The filter. `found` are the extents that an earlier life left, as (offset, length); None: it cannot be known.

    Until `clear` or `go_on` has been called nothing leaves, unless the earlier life
    has ended cleanly (nothing was found). `updates` counts the durable updates of the file.
    """

    def __init__(
        self,
        child: Node,
        path: Path,
        *,
        offload: Offload,
        target: int = TARGET,
        may_leave: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Open the log at `path`, or make it. Raises `Error`; see `HotExtents`.

        `target` (bytes) is what may stay hot. `may_leave` is asked when a flush has succeeded: whether it says that
        this host's disk has all, and what the peer missed by then is noted durably too.
        """
        super().__init__("activity-log", child.length, child, read_only=child.read_only)
        # Reads pass by, without a call more.
        self.read = child.read  # type: ignore[method-assign]
        self.fetch = child.fetch  # type: ignore[method-assign]
        self.on_log_lost: Callable[[Error], None] | None = None
        """Told, once, that a sync of the log failed, before the writes that wait are: it may call `assume_all`."""
        self.updates = 0
        self._file = HotExtents(path, child.length)
        self._offload = offload
        self._target = target
        self._may_leave = may_leave
        self._clock = clock
        found = self._file.found
        self.found = None if found is None else self._in_bytes(found)
        self._settled = found == []
        self._everything = False
        # By extent: its age, if it is durable in the file and no write waits for it; else 0. Of a large disk this
        # costs what was touched.
        self._ages = mmap.mmap(-1, extents_of(child.length), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._gathering: _Update | None = None
        self._updating: _Update | None = None
        self._storing = False
        self._closing = False
        self._width = 1
        self._streams: dict[int, int] = {}
        self._credit_s = BURST_S
        self._began_s = self._earned_s = self._turned_s = self._flushed_s = clock()
        # The writes that began in this turn, and those before it that had not ended at its begin; some have by now.
        self._begun: list[Pending] = []
        self._before: list[Pending] = []
        self._many = MANY
        self._turning = False
        self._failed: Error | None = None
        self._age(self._file.runs(), NOW)

    # --- what is shown

    @property
    def hot_bytes(self) -> int:
        """How much may differ after a loss of power, in bytes of whole extents."""
        if self._everything:
            return self.length
        last = extents_of(self.length) - 1
        beyond = (last + 1) * EXTENT - self.length
        return self._file.count * EXTENT - (beyond if self._file.names(last) else 0)

    @property
    def overdue(self) -> bool:
        """Whether somebody should flush: too much is hot, and nobody has flushed for long."""
        return self.hot_bytes > self._target and self._clock() - self._flushed_s > OVERDUE_S

    def hot(self) -> list[tuple[int, int]]:
        """What may differ after a loss of power, as (offset, length), in order."""
        return [(0, self.length)] if self._everything else self._in_bytes(self._file.runs())

    # --- its life

    def clear(self) -> Pending:
        """Nothing is hot any more: it is noted elsewhere, or both disks have it for good.

        Ends when that is durable. No write may be under way.
        """
        assert self._gathering is None, "the caller holds what writes"
        assert self._updating is None, "the caller holds what writes"
        self._age(self._file.runs(), 0)
        self._file.clear()
        self._streams.clear()
        self._sift()
        self._failed = None
        self._everything, self._settled = False, True
        update = self._gathering = _Update(forced=True)
        if not self._storing:
            self._update()
        return update.hot

    def go_on(self) -> None:
        """A process of this boot left what was found: it is not flushed, and that is all. It leaves as others do."""
        self._settled = True

    def assume_all(self) -> None:
        """It is noted elsewhere, durably, that every block may differ: from now on no write waits, until `clear`."""
        self._everything = True
        self._age([(0, len(self._ages))], NOW)
        self._hold_back()

    def close(self) -> None:
        """Close the file, when what is being written to it is, and what lies below. What it names stays."""
        self._closing = True
        if not self._storing:
            self._file.close()
        super().close()

    # --- requests

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        """See `Node.write`. Raises the log's `Error` where the write cannot be written down."""
        length = len(buffers[0]) if len(buffers) == 1 else size(buffers)
        extent = offset >> SHIFT
        age = self._ages[extent]
        if not age or offset + length > (extent + 1) << SHIFT:
            return self._pass(offset, length, partial(self.child.write, offset, buffers, fua))
        if age != NOW:
            self._ages[extent] = NOW
        try:
            pending = self.child.write(offset, buffers, fua)
        except Error as error:
            self._failed = error
            raise
        if pending is not None:
            self._begun.append(pending)
            if len(self._begun) > self._many:
                self._sift()
        return pending

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        """See `Node.zero`."""
        return self._pass(offset, length, partial(self.child.zero, offset, length, fua, unmap))

    def discard(self, offset: int, length: int) -> Pending | None:
        """See `Node.discard`."""
        return self._pass(offset, length, partial(self.child.discard, offset, length))

    def flush(self) -> Pending | None:
        """See `Node.flush`. What it covers may leave the log when it has succeeded."""
        turned = self._begin_turn()
        error, pending = attempt(self.child.flush)
        if pending is not None:
            pending.then(lambda ended: self._flushed(ended.error, turned))
            return pending
        self._flushed(error, turned)
        if error is not None:
            raise error
        return None

    def unplug(self) -> None:
        """See `Node.unplug`: writes the log for all that wait."""
        if self._gathering is not None and not self._storing:
            self._update()
        self.child.unplug()

    # --- writes that may wait

    def _pass(self, offset: int, length: int, call: Callable[[], Pending | None]) -> Pending | None:
        """Make `call`, a write to that range, when its extents are hot."""
        first, last = offset >> SHIFT, extents_of(offset + length)
        if self._ages.find(b"\0", first, last) >= 0:
            return after(self._wait(first, last), partial(self._make, call))
        self._age([(first, last)], NOW)
        return self._make(call)

    def _make(self, call: Callable[[], Pending | None]) -> Pending | None:
        """A write that is hot: its end is seen."""
        try:
            pending = call()
        except Error as error:
            self._failed = error
            raise
        if pending is not None:
            self._begun.append(pending)
            if len(self._begun) > self._many:
                self._sift()
        return pending

    def _wait(self, first: int, last: int) -> Pending:
        """Name the extents; ends when they are hot, and those before have passed."""
        if self._gathering is None:
            self._gathering = _Update()
        update = self._gathering
        update.wanted.append((first, last))
        self._age([(first, last)], 0)
        missing = self._file.missing(first, last)
        if missing:
            for start, end in self._file.missing(*self._run(missing[0][0], last)):
                self._file.add(start, end)
                update.named.append((start, end))
        return update.hot

    def _run(self, first: int, last: int) -> Run:
        """What is named with a miss: the run ahead of a sequential writer; in debt, wide neighbourhoods."""
        before = self._streams.pop(first, 0)
        last = max(last, first + min(2 * before, STREAM))
        if self._width > 1:
            first -= first % self._width
            last += -last % self._width
        last = min(last, len(self._ages))
        if len(self._streams) == STREAMS:
            del self._streams[next(iter(self._streams))]
        self._streams[last] = min(last - first, STREAM)
        return first, last

    # --- the file

    def _update(self) -> None:
        """Write what was changed: with a sync if anybody waits for it."""
        self._storing = True
        while self._gathering is not None or self._file.changed:
            update, self._gathering = self._gathering, None
            pieces = self._file.take()
            if pieces or (update is not None and update.forced):
                self._write(update, pieces)
                return
            assert update is not None, "what was changed is to be written"
            self._release(update)  # it waited for its turn: all of it is in the file already
        self._storing = False

    def _write(self, update: _Update | None, pieces: list[Piece]) -> None:
        self._updating = update
        self._began_s = self._earn()
        if update is not None and update.named:
            widest = 1 << len(self._ages).bit_length()
            self._width = min(4 * self._width, widest) if self._credit_s < 0 else -(-self._width // 4)
        error, stored = attempt(
            self._offload,
            partial(self._file.store, pieces, sync=update is not None),
            f"write the activity log {self._file.path}",
        )
        if stored is None:  # the Offload has been closed
            self._stored(error)
        else:
            stored.then(lambda ended: self._stored(ended.error))

    def _stored(self, error: Error | None) -> None:
        """What `_write` began has ended. Until its waiters have passed no other begins."""
        update, self._updating = self._updating, None
        if update is not None:
            self.updates += 1
            if update.wanted:
                waited_s = self._earn() - self._began_s
                self._credit_s = max(self._credit_s - waited_s, -DEBT_S)
        if error is not None:
            self._fail(update, error)
        elif update is not None:
            self._release(update)
        self._storing = False
        if self._closing:
            self._file.close()
        elif self._gathering is not None or self._file.changed:
            self._update()

    def _fail(self, update: _Update | None, error: Error) -> None:
        """It was not written, so what waits does not pass; unless that was noted elsewhere."""
        if self._file.lost is not None:
            told, self.on_log_lost = self.on_log_lost, None
            if told is not None:
                told(self._file.lost)
        if update is None:
            return  # what was to be forgotten is named still
        if self._everything:
            self._release(update)
            return
        # What is gathered builds on what was to be named: it fails with it.
        updates = [update] if self._gathering is None else [update, self._gathering]
        self._gathering = None
        for failed in updates:
            for first, last in failed.named:
                self._file.remove(first, last)
        for failed in updates:
            self._release(failed, error)

    def _release(self, update: _Update, error: Error | None = None) -> None:
        """Let those pass that wait, in their order, or fail; only then those who come later."""
        update.hot.complete(error)
        for first, last in [*update.wanted, *update.named]:
            self._age(self._file.runs(first, last), NOW)
        self._hold_back()
        self.child.unplug()

    def _hold_back(self) -> None:
        """What waits, and what is not durable, does not pass."""
        for update in (self._updating, self._gathering):
            if update is not None:
                self._age(update.wanted, 0)
                self._age(update.named, 0)

    # --- what leaves

    def _begin_turn(self) -> bool:
        """A flush is about to be asked for: whether extents may leave when it has succeeded."""
        now = self._earn()
        self._sift()
        if (
            self._turning
            or self._before  # else all that began before the last turn has ended, and this flush covers it
            or self._credit_s < 0
            or now - self._turned_s < TURN_S
            or not self._settled
            or self._everything
            or self._failed is not None
            or self._file.lost is not None
            or self.hot_bytes <= self._target
        ):
            return False
        self._before, self._begun = self._begun, []
        self._ages[:] = self._ages[:].translate(_OLDER)
        self._turning, self._turned_s = True, now
        return True

    def _sift(self) -> None:
        """Forget the writes that have ended; that one has failed is remembered. Cheaper than to look for each end."""
        for write in self._begun + self._before:
            if write.error is not None:
                self._failed = write.error
        self._begun = [write for write in self._begun if not write.done]
        self._before = [write for write in self._before if not write.done]
        self._many = 2 * len(self._begun) + MANY

    def _flushed(self, error: Error | None, turned: bool) -> None:
        """A flush has ended, and it was asked for as `turned` says."""
        if turned:
            self._turning = False
        if error is not None:
            return
        self._flushed_s = self._clock()
        if turned and self._failed is None and self._may_leave():
            self._leave((self.hot_bytes - self._target) // EXTENT)
            if self._file.changed and not self._storing:
                self._update()

    def _leave(self, count: int) -> None:
        """The `count` extents that were not written for longest, of those that are idle."""
        ages, left = self._ages[:], LEAVING
        for age, alike in _IDLE.items():
            end = 0
            while count > 0 and left and (first := ages.find(age, end)) >= 0:
                run = alike.match(ages, first, first + count)
                assert run is not None, "it was found"
                end = run.end()
                self._file.remove(first, end)
                self._age([(first, end)], 0)
                count -= end - first
                left -= 1

    def _earn(self) -> float:
        """Save up what writes may wait; the time."""
        now = self._clock()
        self._credit_s = min(BURST_S, self._credit_s + SHARE * (now - self._earned_s))
        self._earned_s = now
        return now

    def _age(self, runs: list[Run], age: int) -> None:
        for first, last in runs:
            self._ages[first:last] = bytes([age]) * (last - first)

    def _in_bytes(self, runs: list[Run]) -> list[tuple[int, int]]:
        return [(first * EXTENT, min(last * EXTENT, self.length) - first * EXTENT) for first, last in runs]
