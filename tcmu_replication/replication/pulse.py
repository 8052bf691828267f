"""A sign of life every second, from the primary to the secondary and back.

The primary says hello and gets the secondary's state in return, so each hears the
other. Who was not heard for `dead_after` seconds counts as gone: that is what a
failover may rely on, and what `status` tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from tcmu_replication.background import background
from tcmu_replication.errors import Error
from tcmu_replication.replication.clock import now

log = logging.getLogger(__name__)

PERIOD_S = 1.0
DEAD_AFTER_S = 3.0
"""What a host that lost power is given, if the resource file does not say."""


class Heard:
    """When the other host was last heard. Nobody was, until `note` is called."""

    def __init__(
        self, dead_after_s: float = DEAD_AFTER_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.dead_after_s = dead_after_s
        self.at: str | None = None
        self._clock = clock
        self._last_s: float | None = None

    def note(self) -> None:
        """It was heard just now."""
        self._last_s = self._clock()
        self.at = now()

    @property
    def ago_s(self) -> float | None:
        """Seconds since it was heard; None if it never was."""
        return None if self._last_s is None else self._clock() - self._last_s

    @property
    def alive(self) -> bool:
        """Whether it was heard within `dead_after_s`."""
        ago = self.ago_s
        return ago is not None and ago < self.dead_after_s

    def forget(self) -> None:
        """It has said that it goes."""
        self._last_s = None


class Pulse:
    """Calls `beat` every `period_s` seconds between `start` and `stop`; what it raises is logged once in a row."""

    def __init__(self, name: str, period_s: float = PERIOD_S) -> None:
        self._name = name
        self._period_s = period_s
        self._task: asyncio.Task[None] | None = None
        self._trouble: str | None = None

    def start(self, beat: Callable[[], Awaitable[None]]) -> None:
        """Begin, if it has not begun."""
        if self._task is None or self._task.done():
            self._task = background(self._run(beat))

    async def stop(self) -> None:
        """End. Twice is fine; from within `beat` it ends after it."""
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _run(self, beat: Callable[[], Awaitable[None]]) -> None:
        mine = asyncio.current_task()
        while self._task is mine:
            try:
                await beat()
                self._trouble = None
            except Error as error:
                if self._trouble is None:
                    log.warning("%s: the other host is not heard: %s", self._name, error)
                self._trouble = str(error)
            await asyncio.sleep(self._period_s)
