"""At most one of certain events a second: a broken disk must not flood whoever listens.

Source: QEMU's monitor/monitor.c, monitor_qapi_event_conf and its throttling: the
first event is sent at once; of those that follow within the period the last one
is sent when it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tcmu_replication.control.command import Document

PERIOD_S = 1.0

Emit = Callable[[str, Document], None]


class Throttle:
    """Passes events on, those with `limited_by` at most once in PERIOD_S for each of its values."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[str, str], Document | None] = {}
        self._timers: dict[tuple[str, str], asyncio.TimerHandle] = {}

    def pass_on(self, name: str, data: Document, emit: Emit) -> None:
        """Call `emit` now, later, or with a later event in this one's place."""
        if not data.limited_by:
            emit(name, data)
            return
        key = name, getattr(data, data.limited_by)
        if key in self._timers:
            self._waiting[key] = data
        else:
            emit(name, data)
            self._begin(key, emit)

    def close(self) -> None:
        """Forget what waits."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _begin(self, key: tuple[str, str], emit: Emit) -> None:
        self._waiting[key] = None
        self._timers[key] = asyncio.get_running_loop().call_later(PERIOD_S, self._end, key, emit)

    def _end(self, key: tuple[str, str], emit: Emit) -> None:
        del self._timers[key]
        data = self._waiting.pop(key)
        if data is not None:
            emit(key[0], data)
            self._begin(key, emit)
