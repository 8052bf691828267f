"""Disk images, on tmpfs unless told otherwise, full of data that is not zero."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcmu_replication.units import MiB

TMPFS = Path("/dev/shm")
STOCK = "stock"
"""A directory in which images lie to serve again and again."""


@contextmanager
def directory(where: Path = TMPFS) -> Iterator[Path]:
    """A directory, on tmpfs with a path short enough for sockets; removed at the end."""
    made = Path(tempfile.mkdtemp(prefix="bench-", dir=where))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def full(path: Path, length: int) -> Path:
    """An image of `length` bytes in which every block holds something.

    Below a directory with a stock it is one that no other directory holds any more, if there is one, whatever is
    in it: its memory is in place already.
    """
    stock = next((above / STOCK for above in path.parents if (above / STOCK).is_dir()), None)
    if stock is None:
        return _made(path, length)
    for spare in stock.iterdir():
        found = spare.stat()
        if found.st_nlink == 1 and found.st_size == length:
            break
    else:
        spare = _made(stock / str(len(os.listdir(stock))), length)
    path.hardlink_to(spare)
    return path


def _made(path: Path, length: int) -> Path:
    noise = random.Random(length).randbytes(MiB)
    with path.open("wb", buffering=0) as file:
        for start in range(0, length, MiB):
            file.write(noise[: length - start])
    return path


def sparse(path: Path, length: int) -> Path:
    """An image of `length` bytes that holds nothing."""
    with path.open("wb") as file:
        file.truncate(length)
    return path
