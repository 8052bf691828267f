"""What the peer's disk lacks, block by block, and what is under way to make it whole.

    clean    the peer has what this host has, or will have it by a write that is under way
    dirty    it has not, or may not have
    swept    dirty still; but all of the block is under way to the peer (a `Sweep`), and what is sent behind
             that finds it whole

A sweep makes its blocks clean when it has arrived. Not so a block that was marked anew meanwhile, by a write
that failed behind it, say: the sweep is spoiled there. So marks go through here and not to the bitmap
itself, whoever makes them. A mark is in the file before the call returns, and a block is taken from the
file only after its sweep has arrived: whenever the process dies, what differs is marked, but for the writes
that were under way themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tcmu_replication.units import BLOCK, blocks_of


class Marks(Protocol):
    """What `block.bitmap.Bitmap` is here: numbers of blocks, half-open. `mark` and `clear` may raise `Error`."""

    count: int

    @property
    def bytes(self) -> int:
        """Bytes of the disk in dirty blocks."""

    def mark(self, first: int, last: int) -> None:
        """The blocks are dirty."""

    def clear(self, first: int, last: int) -> None:
        """They are not."""

    def test(self, block: int) -> bool:
        """Whether a block is dirty."""

    def runs(
        self, first: int = 0, last: int | None = None, *, longest: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """The runs of dirty blocks in a range, in order."""


class Sweep:
    """The blocks from `first` to `last`: those that are dirty are under way, each as a whole."""

    __slots__ = ("first", "last", "spoiled")

    def __init__(self, first: int, last: int) -> None:
        self.first = first
        self.last = last
        self.spoiled: set[int] = set()


class Dirty:
    """The dirty blocks of a disk of `length` bytes, in `marks`.

    `cleaned` counts the bytes that sweeps have made clean. Sweeps are few: those of a resync, which bounds
    them, and those of the writes that frontends have under way.
    """

    def __init__(self, marks: Marks, length: int) -> None:
        self.marks = marks
        self.length = length
        self.cleaned = 0
        self._sweeps: dict[Sweep, None] = {}

    @property
    def bytes(self) -> int:
        """What is dirty, in bytes."""
        return self.marks.bytes

    def mark(self, offset: int, length: int) -> None:
        """The peer may not have this range of bytes. Raises `Error` if it could not be marked, or not all of it."""
        if length:
            self.spoil(offset, length)
            self.marks.mark(*self._touched(offset, length))

    def spoil(self, offset: int, length: int) -> None:
        """No sweep that is under way makes this range of bytes clean."""
        first, last = self._touched(offset, length)
        for sweep in self._sweeps:
            sweep.spoiled.update(range(max(first, sweep.first), min(last, sweep.last)))

    def spoil_all(self) -> None:
        """No sweep that is under way makes anything clean: the peer may have lost what it took."""
        for sweep in self._sweeps:
            sweep.spoiled.update(range(sweep.first, sweep.last))

    def sent_part(self, start: int, end: int) -> tuple[int, int]:
        """What of a write from byte `start` to `end` is of use to the peer: as (start, end), perhaps nothing.

        A part of a dirty block is not: all of that has to be sent anyhow.
        """
        if start % BLOCK and self._only_dirty(start // BLOCK):
            start = start - start % BLOCK + BLOCK
        if start < end < self.length and end % BLOCK and self._only_dirty(end // BLOCK):
            end -= end % BLOCK
        return start, max(start, end)

    def sweep(self, start: int, end: int) -> Sweep | None:
        """A request for the bytes from `start` to `end` begins: the sweep of its dirty whole blocks, if it has any."""
        first = blocks_of(start)
        last = blocks_of(self.length) if end == self.length else end // BLOCK
        if first >= last or next(self.marks.runs(first, last), None) is None:
            return None
        return self.sweep_blocks(first, last)

    def sweep_blocks(self, first: int, last: int) -> Sweep:
        """All that is dirty in these blocks will be sent. To be ended with `arrived` or `failed`."""
        sweep = Sweep(first, last)
        self._sweeps[sweep] = None
        return sweep

    def arrived(self, sweep: Sweep) -> None:
        """The peer has it: clean, but for what was spoiled. Raises `Error` where a mark stays for want of a disk."""
        del self._sweeps[sweep]
        before = self.marks.bytes
        try:
            at = sweep.first
            for block in sorted(sweep.spoiled):
                if at < block:
                    self.marks.clear(at, block)
                at = block + 1
            if at < sweep.last:
                self.marks.clear(at, sweep.last)
        finally:
            self.cleaned += before - self.marks.bytes

    def failed(self, sweep: Sweep) -> None:
        """The peer may not have it: all stays dirty."""
        del self._sweeps[sweep]

    def _only_dirty(self, block: int) -> bool:
        """Whether the block is dirty and not swept."""
        return self.marks.test(block) and not any(
            sweep.first <= block < sweep.last and block not in sweep.spoiled for sweep in self._sweeps
        )

    def _touched(self, offset: int, length: int) -> tuple[int, int]:
        return offset // BLOCK, blocks_of(offset + length)
