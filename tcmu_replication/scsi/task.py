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
    """Work on the disk.

    READ fills the Data-In buffers, WRITE takes the Data-Out buffers; both are
    `length` bytes long in total. UNMAP discards `ranges` (offset, length).
    WRITE_SAME repeats `pattern` (one block) over the range, or, with `unmap`,
    discards it if that reads as zeroes. VERIFY compares the range with the
    Data-Out buffers if `compare` is set and else only reads it. For
    COMPARE_AND_WRITE `length` is the disk's range; Data-Out holds twice that,
    what to compare and then what to write. FLUSH has no range.
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
