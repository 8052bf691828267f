"""The Data-Out area of a command, which is a list of memoryviews: its length, and bytes from its start."""

from __future__ import annotations

from collections.abc import Sequence

Buffers = Sequence[memoryview]


def total(buffers: Buffers) -> int:
    """Bytes in all of `buffers`."""
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))


def take(buffers: Buffers, length: int) -> bytes:
    """A copy of the first `length` bytes; fewer if `buffers` end before."""
    data = b""
    for view in buffers:
        data += view[: length - len(data)]
    return data
