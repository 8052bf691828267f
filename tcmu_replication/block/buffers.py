"""Sequences of memoryviews as one run of bytes: their size, a part of them, zeroes into them."""

from __future__ import annotations

from tcmu_replication.block.node import Buffers
from tcmu_replication.units import MiB

ZEROES = memoryview(bytes(MiB))
"""Read-only zeroes that everyone shares, for writing them where nothing better is supported."""


def size(buffers: Buffers) -> int:
    """Bytes of all buffers together."""
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))


def part(buffers: Buffers, start: int, length: int) -> list[memoryview]:
    """Views of the `length` bytes from `start`, over the same memory; what lies beyond is left out."""
    views = []
    for view in buffers:
        if length <= 0:
            break
        if start >= len(view):
            start -= len(view)
            continue
        taken = view[start : start + length]
        views.append(taken)
        length -= len(taken)
        start = 0
    return views


def clear(buffers: Buffers) -> None:
    """Fill every buffer with zeroes."""
    for view in buffers:
        for start in range(0, len(view), len(ZEROES)):
            piece = view[start : start + len(ZEROES)]
            piece[:] = ZEROES[: len(piece)]


def zeroes(length: int) -> list[memoryview]:
    """`length` bytes of zeroes as views of the shared ones, to be written."""
    whole, rest = divmod(length, len(ZEROES))
    views = [ZEROES] * whole
    if rest:
        views.append(ZEROES[:rest])
    return views
