"""Warm memory: pages that the machine has, lent to what is measured.

A virtual machine with free page reporting gives memory back to its host once
it has been free for about two seconds, and the next touch of each page then
costs microseconds more, whoever makes it. So memory is held here between the
loads and let go immediately before one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tcmu_replication.units import GiB, MiB

CHUNK = 64 * MiB
SPARE = 2 * GiB
"""What is never taken from the rest of the machine."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14); the module mmap does not name it."""


class Memory:
    """A reservoir of memory that has been touched."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give(self.held)

    @property
    def held(self) -> int:
        """How many bytes are held."""
        return len(self._held) * CHUNK

    def hold(self, length: int) -> None:
        """Hold at least `length` bytes, as far as the machine has them to spare."""
        while self.held < length and _kib("MemAvailable") * 1024 > SPARE + CHUNK:
            chunk = mmap.mmap(-1, CHUNK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # Huge pages are touched ten times as fast, and go back in one piece.
            for advice in (mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE, _POPULATE_WRITE):
                chunk.madvise(advice)
            self._held.append(chunk)

    def give(self, length: int) -> None:
        """Let go of `length` bytes, for what is written now and stays."""
        for _ in range(min(-(-length // CHUNK), len(self._held))):
            self._held.pop().close()

    @contextmanager
    def lent(self, length: int) -> Iterator[None]:
        """Let go of `length` bytes for as long as a load runs, and take back what it left."""
        self.hold(length)
        free = _kib("MemFree")
        held = self.held
        self.give(length)
        try:
            yield
        finally:
            left = max(0, _kib("MemFree") - free) * 1024
            self.hold(min(held, self.held + left))


def _kib(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(f"/proc/meminfo has no {name}")
