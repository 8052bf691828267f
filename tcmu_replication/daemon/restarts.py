"""How soon a worker that died is started again. Pure: times come in, delays come out."""

from __future__ import annotations

DELAYS_S = (0.0, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""By the number of deaths in a row: at once while it may be chance (the initiator waits), then ever later."""
STABLE_S = 60.0
"""A worker that lived this long died of something new."""


class Restarts:
    """The deaths of one worker. `count` is how many there were, `row` how many in quick succession."""

    def __init__(self, delays_s: tuple[float, ...] = DELAYS_S, stable_s: float = STABLE_S) -> None:
        self.count = 0
        self.row = 0
        self._delays_s = delays_s
        self._stable_s = stable_s

    def died(self, lived_s: float, *, hopeless: bool) -> float:
        """The delay after a death; with `hopeless` (wrong configuration) the longest."""
        self.row = 1 if lived_s >= self._stable_s else self.row + 1
        self.count += 1
        last = len(self._delays_s) - 1
        return self._delays_s[last if hopeless else min(self.row - 1, last)]
