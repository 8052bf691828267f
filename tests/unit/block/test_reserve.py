"""What overlays leave of their file system. (A1)"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tcmu_replication.block import reserve
from tcmu_replication.block.reserve import ASK, Reserve, reserve_of
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import GiB, KiB, MiB

TOTAL = GiB


class Volume:
    """A file system of TOTAL bytes, and how often it was looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free = free
        self.looks = 0
        monkeypatch.setattr(reserve.os, "statvfs", self._statvfs)

    def _statvfs(self, path: Path) -> SimpleNamespace:
        self.looks += 1
        return SimpleNamespace(f_frsize=KiB, f_blocks=TOTAL // KiB, f_bavail=self.free // KiB)

    def fill(self, step: int) -> tuple[int, Error]:
        """Take and use space until it is refused: how much that was, and the error."""
        kept = Reserve(Path("/overlays"))
        used = 0
        while True:
            try:
                kept.take(step)
            except Error as error:
                return used, error
            used += step
            self.free -= step


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (8 * MiB, MiB),
        (128 * MiB, 16 * MiB),
        (GiB, 16 * MiB),
        (10 * GiB, 10 * GiB // 100),
        (1024 * GiB, 256 * MiB),
        (0, 0),
    ],
)
def test_reserve_is_a_hundredth_within_bounds(total: int, expected: int) -> None:
    assert reserve_of(total) == expected


@pytest.mark.parametrize("step", [4 * KiB, 256 * KiB, 3 * MiB])
def test_overlays_stop_where_the_reserve_begins(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    volume = Volume(monkeypatch, 64 * MiB)
    used, error = volume.fill(step)
    assert error.kind is Kind.NO_SPACE
    assert used == (64 * MiB - reserve_of(TOTAL)) // step * step
    for words in ("/overlays", "16 MiB", "make room there", "checkpoint"):
        assert words in str(error)


def test_file_system_is_not_looked_at_for_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(monkeypatch, 64 * MiB)
    used, _ = volume.fill(4 * KiB)
    assert volume.looks <= used // ASK + 2


def test_room_that_was_made_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume(monkeypatch, reserve_of(TOTAL))
    kept = Reserve(Path("/overlays"))
    with pytest.raises(Error):
        kept.take(4 * KiB)
    volume.free += MiB
    kept.take(4 * KiB)


def test_file_system_that_cannot_be_looked_at_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Error) as caught:
        Reserve(tmp_path / "gone").take(1)
    assert caught.value.kind is Kind.NOT_FOUND
    assert os.fspath(tmp_path / "gone") in str(caught.value)
