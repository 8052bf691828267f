"""Measuring and cutting the Data-Out and Data-In areas of a command, which are lists of memoryviews."""

from __future__ import annotations

from collections.abc import Sequence

Buffers = Sequence[memoryview]


def total(buffers: Buffers) -> int:
    """Bytes in all of `buffers`."""
    if len(buffers) == 1:
        return len(buffers[0])
    return sum(map(len, buffers))


def cut(buffers: Buffers, start: int, length: int) -> list[memoryview]:
    """Views of `length` bytes from byte `start` on; fewer if `buffers` end before. Nothing is copied."""
    parts = []
    for view in buffers:
        if start >= len(view):
            start -= len(view)
            continue
        if length <= 0:
            break
        part = view[start : start + length]
        parts.append(part)
        start = 0
        length -= len(part)
    return parts


def take(buffers: Buffers, start: int, length: int) -> bytes:
    """A copy of `length` bytes from byte `start` on; fewer if `buffers` end before."""
    return b"".join(cut(buffers, start, length))
