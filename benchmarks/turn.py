"""A turn: one side runs one group once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from benchmarks.loads import Load
from benchmarks.memory import Memory
from benchmarks.scale import Scale
from tcmu_replication.units import KiB

CLUSTER = 64 * KiB
"""QEMU's: what its random first touches of smaller blocks fill."""


class Turn(NamedTuple):
    """What a group is given. `directory` is an empty one on tmpfs, `disks` a place on a real file system."""

    side: str
    directory: Path
    disks: Path
    scale: Scale
    number: int
    memory: Memory

    def warm(self, load: Load) -> AbstractContextManager[None]:
        """Let a load find memory that need not be fetched from a host, whoever runs it.

        It is as much as QEMU's overlays take: whole clusters. What remains is taken back.
        """
        clusters = load.span // CLUSTER
        missed = (1 - 1 / clusters) ** (load.total // load.block) if load.block < CLUSTER else 0.0
        taken = int(load.span * (1 - missed)) if missed else load.total
        return self.memory.lent(taken)
