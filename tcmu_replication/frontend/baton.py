"""Whose turn it is at a ring, when a second thread may have to answer for the first.

The loop's thread is at the ring for an instant of each command, and asks
nobody. While it is stuck in a call of the kernel (a disk that hangs) another
thread stands in for it, in short steps; if it comes back in the middle of one
it waits for the end of that step. Neither can be at the ring while the other is.

    baton.held = True                   # the loop's thread
    if baton.lent:
        baton.wait()
    ...
    baton.held = False

    if baton.take():                    # the other
        try: ...
        finally: baton.give_back()

Two flags, and each thread sets its own before it looks at the other's (Dekker).
That is enough where one thread runs at a time and stores are seen in order, as
the interpreter has it; a lock would cost the data path five times as much.
"""

from __future__ import annotations

import threading
from types import TracebackType


class Baton:
    """`held`: the loop's thread is at the ring, or about to be. `lent`: the other is, or looks whether it may."""

    __slots__ = ("_step", "held", "lent")

    def __init__(self) -> None:
        self.held = False
        self.lent = False
        self._step = threading.Lock()

    def wait(self) -> None:
        """The loop's thread, with `held` set, found `lent`: return when the other's step has ended."""
        with self._step:
            pass

    def take(self) -> bool:
        """The other thread's: True if it may go to the ring, until `give_back`."""
        self._step.acquire()
        self.lent = True
        if not self.held:
            return True
        self.give_back()
        return False

    def give_back(self) -> None:
        """End the step that `take` began."""
        self.lent = False
        self._step.release()

    def __enter__(self) -> None:
        """The loop's thread, where a few nanoseconds do not count. Not to be nested."""
        self.held = True
        if self.lent:
            self.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held = False
