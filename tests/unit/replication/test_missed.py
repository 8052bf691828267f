"""The map of missed writes as a file."""

from __future__ import annotations

import os
import stat
import tracemalloc
from pathlib import Path

import pytest

from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.missed import Missed
from tcmu_replication.units import BLOCK, MiB


def test_map_is_readable_by_its_owner_alone_whatever_the_umask_says(tmp_path: Path) -> None:
    """D2: it was made with the umask of the process."""
    missed = Missed(tmp_path / "out-of-sync.map", 4 * MiB)
    before = os.umask(0)
    try:
        missed.open()
        assert stat.S_IMODE(missed.path.stat().st_mode) == 0o600
        missed.open(anew=True)
        assert stat.S_IMODE(missed.path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
        missed.close()


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_link_in_place_of_a_map_is_not_followed(tmp_path: Path, there: bool) -> None:
    other = tmp_path / "other"
    if there:
        whole = Missed(other, 4 * MiB)
        whole.open()
        whole.close()
    missed = Missed(tmp_path / "out-of-sync.map", 4 * MiB)
    missed.path.symlink_to(other)
    with pytest.raises(Error, match="which is a symbolic link; expected the file itself") as refused:
        missed.open()
    assert refused.value.kind is Kind.BAD_CONFIG
    assert other.exists() is there


def test_map_that_begins_anew_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"mine")
    missed = Missed(tmp_path / "out-of-sync.map", 4 * MiB)
    missed.path.symlink_to(tmp_path / "other")
    missed.open(anew=True)
    missed.mark(0, 1)
    missed.close()
    assert (tmp_path / "other").read_bytes() == b"mine"
    missed.open()
    assert missed.bytes == BLOCK
    missed.close()


def test_marks_of_a_long_gap_take_no_memory(tmp_path: Path) -> None:
    """Each missed write was remembered beside its mark, for as long as the process lived."""
    missed = Missed(tmp_path / "out-of-sync.map", 4 * MiB)
    missed.open()
    missed.mark(0, BLOCK)
    tracemalloc.start()
    try:
        for _ in range(20000):
            missed.mark(0, BLOCK)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
        missed.close()
