"""What a logical unit makes of a command: an `Answer` from memory, or a `Task` for the chain below.

Offsets and lengths of a task are bytes, already checked against the disk; lba
and blocks exist only inside this package.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Op(enum.Enum):
    """The work that a task asks of a chain."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    UNMAP = "unmap"
    WRITE_SAME = "write same"
    VERIFY = "verify"
    COMPARE_AND_WRITE = "compare and write"


class Task(NamedTuple):
    """Work on the disk. `length` is never zero, but for FLUSH and UNMAP, which have no range of their own.

    READ fills the first `length` bytes of the Data-In area (which is at least
    that long; with `fua`, what is read is on stable storage first). WRITE
    takes the first `length` bytes of the Data-Out area, which may be longer.
    UNMAP discards `ranges` (offset, length). WRITE_SAME repeats `pattern`
    (one block) over the range; an empty pattern means zeroes, and then space
    may be given back if `unmap` is set. VERIFY with `compare` compares the
    range with `pattern`, block by block, or with the Data-Out area if the
    pattern is empty; without it the range is only read. For
    COMPARE_AND_WRITE `length` is the disk's range; Data-Out holds exactly
    twice that, what to compare and then what to write. FLUSH is of everything.
    """

    op: Op
    offset: int = 0
    length: int = 0
    fua: bool = False
    unmap: bool = False
    compare: bool = False
    pattern: bytes = b""
    ranges: tuple[tuple[int, int], ...] = ()


class Answer(NamedTuple):
    """A command's end: SAM status, sense data (with CHECK CONDITION), and Data-In bytes."""

    status: int
    sense: bytes = b""
    data: bytes = b""
