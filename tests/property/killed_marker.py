"""A process that marks and clears blocks until it is killed; it says each time that it has done one.

Run as `python -m tests.property.killed_marker PATH SEED`.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tcmu_replication.block.bitmap import PER_PAGE, Bitmap
from tcmu_replication.units import BLOCK

BLOCKS = 3 * PER_PAGE - 77
LENGTH = BLOCKS * BLOCK - 1


def changes(seed: int) -> Iterator[tuple[bool, int, int]]:
    """What is done, without end: whether to mark or to clear, and which blocks."""
    dice = random.Random(seed)
    while True:
        first = dice.randrange(BLOCKS)
        count = dice.choice([1, 1, 1, dice.randrange(100), PER_PAGE])
        yield dice.random() < 0.7, first, min(BLOCKS, first + count)


def main(path: Path, seed: int) -> None:
    dirty = Bitmap.create(path, LENGTH)
    for mark, first, last in changes(seed):
        (dirty.mark if mark else dirty.clear)(first, last)
        os.write(1, b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
