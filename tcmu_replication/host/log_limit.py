"""A limit on log lines: what a client or a broken disk can make happen all the time cannot fill the log.

    handler.addFilter(LogLimit(handler))

A kind of line is a place in the source that logs. Of each kind LINES lines pass in SECONDS; the rest are counted, and
when that time is over one line tells how many there were, and what the last one said:

    NBD client 127.0.0.1: no handshake in 10 s; hung up    (50 times)
    and 170,000 more like it, the last: NBD client 127.0.0.1: no handshake in 10 s; hung up
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

LINES = 50
SECONDS = 60.0


class _Burst:
    """Lines of one kind since `began`; of those beyond the limit only how many there were, and the last."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.passed = 0
        self.held = 0
        self.last: logging.LogRecord | None = None


class LogLimit(logging.Filter):
    """The filter of one handler, from any thread. `close` tells what is still untold.

    `now` is a clock in seconds; `later` calls a function after so many, for tests.
    """

    def __init__(
        self,
        handler: logging.Handler,
        *,
        now: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], None] | None = None,
    ) -> None:
        super().__init__()
        self._handler = handler
        self._now = now
        self._later = later or _later
        self._lock = threading.Lock()
        self._bursts: dict[tuple[str, int], _Burst] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written."""
        kind = record.pathname, record.lineno
        with self._lock:
            burst = self._bursts.get(kind)
            if burst is None or (not burst.held and self._now() - burst.began >= SECONDS):
                burst = self._bursts[kind] = _Burst(self._now())
            if burst.passed < LINES:
                burst.passed += 1
                return True
            burst.held += 1
            burst.last = record
            if burst.held > 1:
                return False
        self._later(max(0.0, burst.began + SECONDS - self._now()), lambda: self._tell(kind))
        return False

    def close(self) -> None:
        """Tell of everything that was held back."""
        for kind in list(self._bursts):
            self._tell(kind)

    def _tell(self, kind: tuple[str, int]) -> None:
        with self._lock:
            burst = self._bursts.pop(kind, None)
        if burst is None or burst.last is None:
            return
        last = burst.last
        text = f"and {burst.held:,} more like it, the last: {last.getMessage()}"
        line = logging.LogRecord(last.name, last.levelno, last.pathname, last.lineno, text, None, None)
        self._handler.acquire()
        try:
            self._handler.emit(line)
        finally:
            self._handler.release()


def _later(seconds: float, tell: Callable[[], None]) -> None:
    """From a thread of its own: the loop may be what is stuck."""
    timer = threading.Timer(seconds, tell)
    timer.daemon = True
    timer.start()
