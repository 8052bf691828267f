"""How soon a worker that died is started again. Pure: times come in, delays come out."""

from __future__ import annotations

DELAYS_S = (0.0, 0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
"""By the number of deaths in a row: at once while it may be chance (the initiator waits), then ever later.

The longest and a start of some seconds are well below the kernel's cmd_time_out of 30 s."""
HOPELESS_S = 30.0
"""For a worker that no try will help soon, and that no initiator waits for."""
STABLE_S = 60.0
"""A worker that lived this long died of something new."""


class Restarts:
    """The deaths of one worker. `count` is how many there were, `row` how many in quick succession."""

    def __init__(
        self,
        delays_s: tuple[float, ...] = DELAYS_S,
        stable_s: float = STABLE_S,
        hopeless_s: float = HOPELESS_S,
    ) -> None:
        self.count = 0
        self.row = 0
        self._delays_s = delays_s
        self._stable_s = stable_s
        self._hopeless_s = hopeless_s

    def died(self, lived_s: float, *, hopeless: bool) -> float:
        """The delay after a death, in seconds. `hopeless`: wrong configuration, and no initiator waits."""
        self.row = 1 if lived_s >= self._stable_s else self.row + 1
        self.count += 1
        if hopeless:
            return self._hopeless_s
        return self._delays_s[min(self.row, len(self._delays_s)) - 1]
