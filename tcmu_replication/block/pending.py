"""What a node returns when it cannot answer at once.

A node's call has three outcomes: it returns None (done), it raises `Error`
(failed), or it returns a `Pending` that is completed later, exactly once, on
the event loop's thread. Most requests of a local disk end at once, so the
common path costs a plain function call and no object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from tcmu_replication.errors import Error

Callback = Callable[["Pending"], None]


class Pending:
    """A request under way. `done` turns true once; then `error` is None or says why it failed."""

    __slots__ = ("_first", "_more", "done", "error", "value")

    def __init__(self) -> None:
        self.done = False
        self.error: Error | None = None
        self.value: Any = None
        self._first: Callback | None = None  # most have one only, and need no list
        self._more: list[Callback] | None = None

    def complete(self, error: Error | None = None, value: Any = None) -> None:
        """End the request and call whoever waits, in the order in which they asked."""
        assert not self.done, "a request ends once"
        self.done = True
        self.error = error
        self.value = value
        first, more = self._first, self._more
        self._first = self._more = None
        if first is not None:
            first(self)
        if more is not None:
            for callback in more:
                callback(self)

    def then(self, callback: Callback) -> None:
        """Call `callback(self)` when the request has ended; at once if it already has."""
        if self.done:
            callback(self)
        elif self._first is None:
            self._first = callback
        elif self._more is None:
            self._more = [callback]
        else:
            self._more.append(callback)

    async def wait(self) -> Any:
        """For control code: wait for the end; returns `value`, raises `error`."""
        if not self.done:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.then(lambda _: None if future.done() else future.set_result(None))
            await future
        if self.error is not None:
            raise self.error
        return self.value


def attempt(call: Callable[..., Pending | None], *args: Any) -> tuple[Error | None, Pending | None]:
    """Make a node's call and turn its three outcomes into (error, pending)."""
    try:
        return None, call(*args)
    except Error as error:
        return error, None


def gather(pendings: Iterable[Pending | None], error: Error | None = None) -> Pending | None:
    """One outcome for several calls: ends when all have ended, with the first error seen.

    `error` is one that was already met. Returns None if nothing is under way
    and nothing failed, and raises if nothing is under way and something did.
    """
    waiting = [p for p in pendings if p is not None and not (p.done and p.error is None)]
    for pending in waiting:
        if pending.done and error is None:
            error = pending.error
    waiting = [p for p in waiting if not p.done]
    if not waiting:
        if error is not None:
            raise error
        return None
    whole = Pending()
    left = len(waiting)
    first = error

    def ended(part: Pending) -> None:
        nonlocal left, first
        left -= 1
        if first is None:
            first = part.error
        if left == 0:
            whole.complete(first)

    for pending in waiting:
        pending.then(ended)
    return whole


def after(pending: Pending | None, call: Callable[[], Pending | None]) -> Pending | None:
    """One outcome for two steps: `call()`, made when `pending` has ended well.

    At once if `pending` is None; then what the call returns or raises is the
    outcome. Otherwise the first step's error, or else that of the call.
    """
    if pending is None:
        return call()
    whole = Pending()

    def ended(first: Pending) -> None:
        error, second = (first.error, None) if first.error is not None else attempt(call)
        if second is None:
            whole.complete(error)
        else:
            second.then(lambda last: whole.complete(last.error, last.value))

    pending.then(ended)
    return whole


async def settle(pending: Pending | None) -> Any:
    """For control code: the value of a node's call, however it was answered."""
    return None if pending is None else await pending.wait()
