"""The last part of a file system, which overlays leave alone.

An overlay that fills its file system must not keep the host from what it has to
write then: that the pair differs, the log, a resource file, the maps of the next
epoch. So an overlay answers NO_SPACE while there is some space left. The kernel
is asked when a data file or a map grows, and not for each write: what it says
is good for the next ASK bytes, which several overlays of a file system may take
beyond the reserve, each.
"""

from __future__ import annotations

import os
from pathlib import Path

from tcmu_replication.errors import Error, Kind, from_os
from tcmu_replication.units import MiB, format_size

LEAST, MOST = 16 * MiB, 256 * MiB
"""A hundredth of the file system is left, within these bounds: what we write ourselves then is a few KiB, but logs and
other programs live there too. Of a small file system it is an eighth at most."""

ASK = MiB
"""After so many bytes the file system is looked at again."""


def reserve_of(total: int) -> int:
    """Bytes that overlays leave free of a file system of `total` bytes."""
    return min(max(LEAST, total // 100), MOST, total // 8)


class Reserve:
    """What the overlays of `directory` must ask before they grow."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._granted = 0

    def take(self, length: int) -> None:
        """`length` bytes more are about to be stored. Raises `Error` NO_SPACE if the reserve would be used."""
        if length > self._granted:
            self._ask(length)
        self._granted -= length

    def _ask(self, length: int) -> None:
        try:
            found = os.statvfs(self._directory)
        except OSError as error:
            raise from_os(error, f"look at the file system of {self._directory}") from error
        free, reserve = found.f_bavail * found.f_frsize, reserve_of(found.f_blocks * found.f_frsize)
        self._granted = 0
        if free - length < reserve:
            raise Error(
                Kind.NO_SPACE,
                f"{self._directory}: its file system has {format_size(free)} left; expected more than the "
                f"{format_size(reserve)} that overlays leave to the host: make room there, or make a checkpoint, "
                "which begins with empty overlays",
            )
        self._granted = min(length + ASK, free - reserve)
