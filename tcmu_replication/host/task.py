"""What the kernel says of one of our threads: whether it runs, and whether it still waits for the same thing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple


class Task(NamedTuple):
    """A look at a thread. Two looks that are equal and not `runs` saw one uninterrupted wait in the kernel.

    `state` is proc(5)'s letter: "D" for a wait that no signal ends, SIGKILL included
    (that of a disk, as a rule), "S" for any other. `waits` counts those that it began.
    """

    state: str
    waits: int

    @property
    def runs(self) -> bool:
        """It computes, or would if it got a processor."""
        return self.state == "R"


def this() -> int:
    """The number of the calling thread, for `look`."""
    return threading.get_native_id()


def look(number: int) -> Task | None:
    """Thread `number` of this process as it is now; None if there is none. From /proc/self/task, proc(5)."""
    try:
        text = Path(f"/proc/self/task/{number}/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return Task(fields["State"].strip()[:1], int(fields["voluntary_ctxt_switches"]))
