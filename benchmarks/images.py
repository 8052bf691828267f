"""Disk images on tmpfs, full of data that is not zero."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcmu_replication.units import MiB


@contextmanager
def directory() -> Iterator[Path]:
    """A directory on /dev/shm, with a path short enough for sockets; removed at the end."""
    made = Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def full(path: Path, length: int) -> Path:
    """An image of `length` bytes in which every block holds something, the same whenever it is made."""
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
