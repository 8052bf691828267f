"""How fast a resync goes: at a fixed rate, or as fast as the foreground's writes do not suffer from it.

The adaptive pace compares two averages of what a forwarded write takes: with something of the resync under
way, and without. Too much more, and the rate is halved; hardly more, and it rises by a quarter. Nobody
writes: no limit. Pieces shrink with the rate, since a write waits behind a whole one. While a write waits
for longer than usual nothing more is sent. And never less than FLOOR, or a busy LUN would never be in sync.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tcmu_replication.block.pending import Pending
from tcmu_replication.block.resyncing import Watcher
from tcmu_replication.units import BLOCK, KiB, MiB, round_down

Clock = Callable[[], float]

LONGEST = 1 * MiB
"""The longest piece."""
SHORTEST = 64 * KiB
"""The shortest piece: what is smaller costs as much."""
PIECES_PER_S = 256
"""A lower rate makes the pieces shorter than LONGEST, so that there are as many."""

FLOOR = 4 * MiB
"""Bytes a second that the adaptive pace keeps up, whatever the foreground says; what DRBD's manual advises."""
BEGIN = 16 * MiB
"""Bytes a second when somebody begins to write."""
CEILING = 1 << 40

IDLE_S = 1.0
"""Without a write for so long nobody is disturbed."""
LISTEN_S = 0.1
"""For so long, at most, the resync is silent to hear how long a write takes without it."""
HEAR_S = 0.03
"""And for so long at least: what was under way has ended then, and the average is worth something."""
TRUSTED_S = 5.0
"""What was heard then is believed for so long."""
DECIDE_S = 0.1
"""The time between two changes of the rate."""
ENOUGH = 8
"""Writes that are heard before anything is made of them."""
STEP_S = 0.005
"""The pause before an adaptive pace is asked again."""

SUFFERS = 1.3
"""So many times as long as without resync is too long."""
FINE = 1.1
"""And so many times is not."""
PATIENCE = 2.0
"""A write that has been under way for so many times as long holds the resync up."""


class Fixed:
    """`rate` bytes a second."""

    watcher: Watcher | None = None

    def __init__(self, rate: int, clock: Clock = time.monotonic) -> None:
        self.rate = rate
        self._clock = clock
        self._due = clock()

    @property
    def size(self) -> int:
        """Bytes of the next piece, at most."""
        return _size(self.rate)

    def delay(self) -> float:
        """Seconds until the next piece may be sent; 0 if it may now."""
        return max(0.0, self._due - self._clock())

    def sent(self, length: int) -> None:
        """A piece of so many bytes was sent just now."""
        self._due = max(self._due, self._clock()) + length / self.rate


class Adaptive:
    """As fast as the foreground allows. `under_way` says whether anything of the resync is."""

    def __init__(self, under_way: Callable[[], bool], clock: Clock = time.monotonic) -> None:
        self.rate: float | None = None
        self._under_way = under_way
        self._clock = clock
        self._due = self._latest = clock()
        self._heard_at = -IDLE_S
        self._without = _Average()
        self._with = _Average()
        self._listens_since: float | None = None
        self._decided_at = 0.0
        self._trusted_until = 0.0
        self._writes: dict[object, float] = {}  # those under way, and when they began

    @property
    def size(self) -> int:
        """See `Fixed.size`."""
        return LONGEST if self.rate is None else _size(self.rate)

    def delay(self) -> float:
        """See `Fixed.delay`. It may be asked again at any time."""
        now = self._clock()
        if now - self._heard_at >= IDLE_S and not self._writes:
            self.rate = self._listens_since = None
            self._trusted_until = 0.0
            return 0.0
        if self.rate is None:
            self.rate = BEGIN
        if now >= self._trusted_until and self._listens(now):
            return STEP_S
        self._decide(now)
        if now < self._due:
            return self._due - now
        return STEP_S if now < self._latest and self._waits(now) else 0.0

    def sent(self, length: int) -> None:
        """See `Fixed.sent`."""
        now = self._clock()
        self._due = now if self.rate is None else max(self._due, now) + length / self.rate
        self._latest = self._due if self.rate is None else now + length / FLOOR

    def watcher(self) -> Callable[[Pending], None]:
        """A write of the foreground begins; what is returned is called when it has ended."""
        began = self._heard_at = self._clock()
        beside = self._under_way()
        write = object()
        self._writes[write] = began

        def ended(_: Pending) -> None:
            del self._writes[write]
            average = self._with if beside or self._under_way() else self._without
            average.add(self._clock() - began)

        return ended

    def _listens(self, now: float) -> bool:
        """Whether to be silent, until enough was heard."""
        if self._listens_since is None:
            self._listens_since = now
            self._without.begin()
        spent = now - self._listens_since
        if spent < LISTEN_S and (spent < HEAR_S or self._without.count < ENOUGH):
            return True
        self._listens_since = None
        self._trusted_until = now + TRUSTED_S
        return False

    def _decide(self, now: float) -> None:
        if now - self._decided_at < DECIDE_S or self._with.count < ENOUGH or self.rate is None:
            return
        self._decided_at = now
        usual, found = self._without.value, self._with.value
        self._with.begin()
        if not usual:
            return
        ratio = found / usual
        if ratio > SUFFERS:
            self.rate = max(FLOOR, self.rate / 2)
        elif ratio < FINE:
            self.rate = min(CEILING, self.rate * 1.25)

    def _waits(self, now: float) -> bool:
        """Whether the oldest write has been under way for longer than is usual."""
        oldest = next(iter(self._writes.values()), now)
        return bool(self._without.value) and now - oldest > PATIENCE * self._without.value


class _Average:
    """The mean of the `count` values since `begin`; the one before counts as ENOUGH more."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._before = 0.0

    def begin(self) -> None:
        """Begin anew."""
        self._before = self.value
        self.count = 0
        self._sum = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        self._sum += value

    @property
    def value(self) -> float:
        """The mean; 0 if there was never a value."""
        weight = ENOUGH if self._before else 0
        return (self._sum + weight * self._before) / ((self.count + weight) or 1)


def _size(rate: float) -> int:
    return max(SHORTEST, min(LONGEST, round_down(int(rate / PIECES_PER_S), BLOCK)))
