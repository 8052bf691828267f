"""Blocking calls off the event loop's thread: the only place of the data path where threads exist.

A queue and a list, and not concurrent.futures: a read of a fast disk takes less
time than its Future, and the loop is woken once for all that has ended and not
once for each.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, get_ident
from time import monotonic
from typing import Any, NamedTuple

from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind, from_os

BACKGROUND = 10
"""The niceness of threads whose work may wait: they make way for the loop's, which answers requests."""

THREADS = 8
"""So many reads of a disk are under way at a time. Each further one costs the loop more of the interpreter."""


class Call(NamedTuple):
    """A call under way in a thread: since when (time.monotonic), and what it does ("flush /dev/sdb")."""

    since_s: float
    doing: str


class Offload:
    """Runs blocking calls in a few threads; their `Pending`s complete on the loop's thread.

    A call may touch only what its caller leaves alone until the `Pending` has
    ended. Calls start in the order in which they were given and may overtake
    each other. What is queued is bounded by the requests in flight.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None = None, threads: int = THREADS, *, niceness: int = 0
    ) -> None:
        """`loop` is where completions run; without it the running one.

        `niceness` is added to that of the threads (nice(2) of Linux changes the calling thread alone).
        """
        self._loop = loop or asyncio.get_running_loop()
        self._limit = threads
        self._niceness = niceness
        self._threads: list[Thread] = []
        self._under_way = 0
        self._closed = False
        self._calls: SimpleQueue[tuple[Pending, Callable[[], Any], str] | None] = SimpleQueue()
        self._ended: deque[tuple[Pending, Exception | None, Any]] = deque()
        self._told = False
        self._running: dict[int, Call] = {}

    def __call__(self, call: Callable[[], Any], doing: str) -> Pending:
        """Run `call()` in a thread. The Pending gets its value, or its `Error`. On the loop's thread only.

        An OSError is translated with `doing` ("flush /dev/sdb"). Any other exception is a defect: the
        loop's exception handler gets it, which should end the process, and the Pending does not end.
        Raises `Error` CANCELLED after `close`.
        """
        if self._closed:
            raise Error(Kind.CANCELLED, f"{doing}: this process is shutting down")
        pending = Pending()
        self._under_way += 1
        self._calls.put((pending, call, doing))
        if len(self._threads) < min(self._limit, self._under_way):
            # A daemon: whoever forgets close() must not keep the process from ending.
            thread = Thread(target=self._work, name=f"offload-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return pending

    def oldest(self) -> Call | None:
        """What has been under way in a thread for the longest time. From any thread."""
        return min(list(self._running.values()), default=None)

    def close(self) -> None:
        """Wait for the calls that were given, and take no more. Twice is fine."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        """What each thread does."""
        os.nice(self._niceness)
        me = get_ident()
        while (given := self._calls.get()) is not None:
            pending, call, doing = given
            self._running[me] = Call(monotonic(), doing)
            self._ended.append((pending, *_outcome(call, doing)))
            del self._running[me]
            # Whoever finds it set knows that _tell has not begun to look, and so will see this one.
            if not self._told:
                self._told = True
                if not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        """On the loop: complete what has ended."""
        self._told = False
        left = len(self._ended)
        try:
            while left:
                left -= 1
                self._under_way -= 1
                pending, error, value = self._ended.popleft()
                if error is not None and not isinstance(error, Error):
                    raise error
                pending.complete(error, value)
        finally:
            if left:  # a completion or a call raised: the others come first all the same
                self._loop.call_soon(self._tell)


def _outcome(call: Callable[[], Any], doing: str) -> tuple[Exception | None, Any]:
    """The error (or the defect) or the value of a call."""
    try:
        return None, call()
    except Error as met:
        return met, None
    except OSError as met:
        error = from_os(met, doing)
        error.__cause__ = met
        return error, None
    except Exception as met:
        met.add_note(f"in a thread, while doing: {doing}")
        return met, None
