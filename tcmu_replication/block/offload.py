"""Blocking calls off the event loop's thread: the only place of the data path where threads exist."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind, from_os

BACKGROUND = 10
"""The niceness of threads whose work may wait: they make way for the loop's, which answers requests."""


class Offload:
    """Runs blocking calls in a few threads; their `Pending`s complete on the loop's thread.

    A call may touch only what its caller leaves alone until the `Pending` has
    ended. Calls start in the order in which they were given and may overtake
    each other. What is queued is bounded by the requests in flight.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop | None = None, threads: int = 4, *, niceness: int = 0
    ) -> None:
        """`loop` is where completions run; without it the running one.

        `niceness` is added to that of the threads (nice(2) of Linux changes the calling thread alone).
        """
        self._loop = loop or asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="offload", initializer=os.nice, initargs=(niceness,)
        )

    def __call__(self, call: Callable[[], Any], doing: str) -> Pending:
        """Run `call()` in a thread. The Pending gets its value, or its `Error`.

        An OSError is translated with `doing` ("flush /dev/sdb"). Raises `Error`
        CANCELLED after `close`.
        """
        pending = Pending()
        try:
            self._pool.submit(self._run, pending, call, doing)
        except RuntimeError as error:
            raise Error(Kind.CANCELLED, f"{doing}: this process is shutting down") from error
        return pending

    def close(self) -> None:
        """Wait for the calls that run, and take no more. Twice is fine."""
        self._pool.shutdown(wait=True)

    def _run(self, pending: Pending, call: Callable[[], Any], doing: str) -> None:
        error: Error | None = None
        value = None
        try:
            value = call()
        except Error as met:
            error = met
        except OSError as met:
            error = from_os(met, doing)
            error.__cause__ = met
        except Exception as met:  # a defect must fail the request, for nobody reads the thread's future
            error = Error(Kind.IO, f"{doing}: {met!r}")
            error.__cause__ = met
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(pending.complete, error, value)
