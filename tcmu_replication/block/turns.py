"""Who has to wait for whom: claims of ranges, and the writes that touch them, first come, first served.

A turn waits for those before it that touch its range, and is looked at again
only when one of these leaves. To wait for the newest that covers the range is
enough, since that one waits for the others: so a thousand turns for one block
are a line, and not a million pairs. Standing in line looks at each turn once at
most; leaving looks at those right behind alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from tcmu_replication.block.waiting import Range


class Turn:
    """A place in the line for the bytes from `start` to `end`; `begin()` is called when it is the first there."""

    __slots__ = ("ahead", "begin", "behind", "end", "start")

    def __init__(self, start: int, end: int, begin: Callable[[], None]) -> None:
        self.start = start
        self.end = end
        self.begin = begin
        self.ahead = 0
        self.behind: list[Turn] = []


class Turns:
    """The turns that have not left, in the order in which they came. True if there are any.

    What is in it is bounded by the requests of the frontends.
    """

    def __init__(self) -> None:
        self._turns: dict[Turn, None] = {}
        self._ready: deque[Turn] = deque()
        self._beginning = False

    def __bool__(self) -> bool:
        return bool(self._turns)

    def ahead(self, start: int, end: int) -> list[Turn]:
        """Whom a new turn for the range waits for."""
        found = []
        left: list[Range] = [(start, end)]
        for turn in reversed(self._turns):
            rest = [piece for at, to in left for piece in _without(at, to, turn)]
            if rest != left:
                found.append(turn)
                left = rest
                if not left:
                    break
        return found

    def stand(self, turn: Turn, ahead: Iterable[Turn]) -> None:
        """Stand in line behind what `ahead` said just now. It may begin at once."""
        self._turns[turn] = None
        for other in ahead:
            other.behind.append(turn)
            turn.ahead += 1
        if not turn.ahead:
            self._begin(turn)

    def leave(self, turn: Turn) -> None:
        """Let those behind step up."""
        del self._turns[turn]
        for other in turn.behind:
            other.ahead -= 1
            if not other.ahead:
                self._begin(other)

    def _begin(self, turn: Turn) -> None:
        """Not by recursion: many may wait in a row for each other."""
        self._ready.append(turn)
        if self._beginning:
            return
        self._beginning = True
        try:
            while self._ready:
                self._ready.popleft().begin()
        finally:
            self._beginning = False


def _without(start: int, end: int, turn: Turn) -> list[Range]:
    """What of the range the turn does not touch."""
    if turn.end <= start or end <= turn.start:
        return [(start, end)]
    return [(at, to) for at, to in ((start, turn.start), (turn.end, end)) if at < to]
