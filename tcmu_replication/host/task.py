"""What the kernel says of one of our threads: whether it runs, and whether it has done anything since the last look."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

_STATE, _USER_TIME = 0, 11
"""Places in /proc/PID/stat behind the name in parentheses, proc(5)."""


class Task(NamedTuple):
    """A look at a thread. Two looks that are equal and not `runs` saw it in the kernel all the time between.

    `state` is proc(5)'s letter: "D" for a wait that no signal ends, SIGKILL included
    (that for a disk, as a rule), "S" for any other. `used` is the processor's time in
    clock ticks that its own code took. (Waits are not counted: a write that the kernel
    holds back for too many dirty pages is many waits of a fifth of a second.)
    """

    state: str
    used: int

    @property
    def runs(self) -> bool:
        """It computes, or would if it got a processor."""
        return self.state == "R"


def this() -> int:
    """The number of the calling thread, for `look`."""
    return threading.get_native_id()


def look(number: int) -> Task | None:
    """Thread `number` of this process as it is now; None if there is none. From /proc/self/task."""
    try:
        text = Path(f"/proc/self/task/{number}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return Task(fields[_STATE], int(fields[_USER_TIME]))
