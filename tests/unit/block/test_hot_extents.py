"""The file of the activity log: a torn, damaged, missing or foreign one names too much, never too little."""

import os
import stat
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.block.hot_extents import (
    CHECKSUM,
    EXTENT,
    HEADER,
    LONGEST,
    MAGIC,
    PAGE,
    PER_SECTOR,
    SECTOR,
    VERSION,
    HotExtents,
    extents_of,
    file_size,
)
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import GiB, TiB

EXTENTS = 2 * PER_SECTOR + 5
LENGTH = (EXTENTS - 1) * EXTENT + 4096
"""Three sectors; the last extent is a part."""
ALL = [(0, EXTENTS)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "activity-log"


@pytest.fixture
def empty(path):
    hot = HotExtents(path, LENGTH)
    hot.clear()
    hot.store(hot.take(), sync=True)
    yield hot
    hot.close()


def found(path, length=LENGTH):
    other = HotExtents(path, length)
    other.close()
    return other.found


def name(hot, *runs):
    for first, last in runs:
        hot.add(first, last)
    hot.store(hot.take(), sync=True)


def test_new_file_is_whole_and_names_everything_until_it_is_cleared(path):
    hot = HotExtents(path, LENGTH)
    assert hot.found is None
    assert (hot.runs(), hot.count) == (ALL, EXTENTS)
    assert path.stat().st_size == file_size(LENGTH) == PAGE + 3 * SECTOR
    assert path.stat().st_blocks * 512 >= file_size(LENGTH)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert found(path) == ALL
    hot.clear()
    hot.store(hot.take(), sync=True)
    assert found(path) == []
    assert hot.count == 0


def test_disk_of_16_tib_has_half_a_mebibyte():
    assert file_size(16 * TiB) < 600 << 10


def test_what_was_stored_is_found_and_what_was_not_is_not(path, empty):
    name(empty, (0, 1), (PER_SECTOR - 2, PER_SECTOR + 3), (EXTENTS - 1, EXTENTS))
    empty.add(7, 9)
    assert found(path) == [(0, 1), (PER_SECTOR - 2, PER_SECTOR + 3), (EXTENTS - 1, EXTENTS)]


def test_only_sectors_that_changed_are_written_neighbours_in_one_piece(empty):
    assert empty.take() == []
    empty.add(1, 2)
    empty.add(1, 2)
    empty.remove(2 * PER_SECTOR, EXTENTS)
    assert [(at, len(data)) for at, data in empty.take()] == [(PAGE, SECTOR)]
    empty.add(PER_SECTOR, 2 * PER_SECTOR + 1)
    assert [(at, len(data)) for at, data in empty.take()] == [(PAGE + SECTOR, 2 * SECTOR)]
    assert not empty.changed


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, EXTENTS - 1), st.integers(1, EXTENTS)),
        min_size=1,
        max_size=12,
    )
)
def test_ranges_are_as_a_set_of_extents(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("hot") / "log"
    hot = HotExtents(path, LENGTH)
    hot.clear()
    expected = set()
    for adds, first, count in steps:
        last = min(EXTENTS, first + count)
        before = sorted(set(range(first, last)) - expected)
        assert [extent for start, end in hot.missing(first, last) for extent in range(start, end)] == before
        if adds:
            hot.add(first, last)
            expected |= set(range(first, last))
        else:
            hot.remove(first, last)
            expected -= set(range(first, last))
        runs = hot.runs()
        assert [extent for start, end in runs for extent in range(start, end)] == sorted(expected)
        assert all(one[1] < other[0] for one, other in pairwise(runs))
        assert hot.count == len(expected)
        assert hot.names(first) == (first in expected)
    hot.store(hot.take(), sync=True)
    hot.close()
    assert found(path) == runs


@pytest.mark.parametrize("sector", range(3))
@pytest.mark.parametrize("at", [0, 1, 300, SECTOR - 5, SECTOR - 4, SECTOR - 1])
def test_sector_whose_checksum_does_not_fit_names_all_of_its_extents(path, empty, sector, at):
    data = bytearray(path.read_bytes())
    data[PAGE + sector * SECTOR + at] ^= 0x04
    path.write_bytes(data)
    first = sector * PER_SECTOR
    assert found(path) == [(first, min(EXTENTS, first + PER_SECTOR))]


@pytest.mark.parametrize("what", [bytes(SECTOR), b"\xff" * SECTOR], ids=["zeroes", "ones"])
def test_sector_that_was_never_written_names_all_of_its_extents(path, empty, what):
    data = bytearray(path.read_bytes())
    data[PAGE + SECTOR : PAGE + 2 * SECTOR] = what
    path.write_bytes(data)
    assert found(path) == [(PER_SECTOR, 2 * PER_SECTOR)]


def test_zeroes_are_no_sector_of_any_disk():
    empty = bytes(SECTOR - 4)
    assert all(zlib.crc32(empty, sector) for sector in range(extents_of(LONGEST) // PER_SECTOR + 1))


def test_sector_of_another_place_is_not_believed(path, empty):
    data = bytearray(path.read_bytes())
    data[PAGE : PAGE + SECTOR] = data[PAGE + SECTOR : PAGE + 2 * SECTOR]
    path.write_bytes(data)
    assert found(path) == [(0, PER_SECTOR)]


def test_torn_write_of_several_sectors_leaves_each_old_or_new(path, empty):
    old = path.read_bytes()
    name(empty, (3, 4), (PER_SECTOR, PER_SECTOR + 1), (2 * PER_SECTOR, EXTENTS))
    new = path.read_bytes()
    whole = [(3, 4), (PER_SECTOR, PER_SECTOR + 1), (2 * PER_SECTOR, EXTENTS)]
    for choice in range(8):
        torn = bytearray(old)
        for sector in range(3):
            at = PAGE + sector * SECTOR
            if choice >> sector & 1:
                torn[at : at + SECTOR] = new[at : at + SECTOR]
        path.write_bytes(torn)
        assert found(path) == [run for sector, run in enumerate(whole) if choice >> sector & 1]


def test_bits_beyond_the_disk_are_not_taken(path, empty):
    bits = b"\xff" * (SECTOR - 4)
    data = bytearray(path.read_bytes())
    data[PAGE + 2 * SECTOR :] = bits + CHECKSUM.pack(zlib.crc32(bits, 2))
    path.write_bytes(data)
    assert found(path) == [(2 * PER_SECTOR, EXTENTS)]


@pytest.mark.parametrize(
    "size", [0, 1, HEADER.size, PAGE, PAGE + SECTOR, PAGE + 3 * SECTOR - 1, PAGE + 4 * SECTOR]
)
def test_file_of_another_size_is_made_anew_and_names_everything(path, empty, size):
    with open(path, "r+b") as file:
        file.truncate(size)
    assert found(path) is None
    assert found(path) == ALL


@pytest.mark.parametrize("at", range(HEADER.size + CHECKSUM.size))
def test_damaged_header_names_everything(path, empty, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)
    assert found(path) is None
    assert found(path) == ALL


@pytest.mark.parametrize("length", [LENGTH - 4096, LENGTH + EXTENT, GiB])
def test_file_of_a_disk_of_another_length_names_everything(path, empty, length):
    assert found(path, length) is None


def written_by(version, extent=EXTENT):
    head = HEADER.pack(MAGIC, version, extent, LENGTH)
    return head + CHECKSUM.pack(zlib.crc32(head))


def test_file_of_a_newer_version_is_refused_and_left_alone(path, empty):
    data = bytearray(path.read_bytes())
    data[: HEADER.size + 4] = written_by(VERSION + 1)
    path.write_bytes(data)
    with pytest.raises(
        Error, match=rf"found an activity log of version {VERSION + 1}.*reads version {VERSION}"
    ) as met:
        HotExtents(path, LENGTH)
    assert met.value.kind is Kind.BAD_CONFIG
    assert path.read_bytes() == data


def test_file_of_other_extents_names_everything(path, empty):
    data = bytearray(path.read_bytes())
    data[: HEADER.size + 4] = written_by(VERSION, EXTENT // 2)
    path.write_bytes(data)
    assert found(path) is None


def test_link_is_not_followed(tmp_path):
    (tmp_path / "activity-log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Error):
        HotExtents(tmp_path / "activity-log", LENGTH)
    assert not (tmp_path / "elsewhere").exists()


class Full:
    """A file system without room: nothing new is stored, from the `after`th write on."""

    def __init__(self, monkeypatch, after=0, short=False):
        pwrite = os.pwrite
        self.left = after

        def full(fd, data, at):
            if self.left:
                self.left -= 1
                return pwrite(fd, data, at)
            if short:
                return pwrite(fd, data[: len(data) // 2], at)
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr(os, "pwrite", full)


@pytest.mark.parametrize("short", [False, True])
def test_full_file_system_refuses_a_new_file_and_leaves_nothing(path, monkeypatch, short):
    Full(monkeypatch, short=short)
    with pytest.raises(Error) as met:
        HotExtents(path, LENGTH)
    assert met.value.kind is Kind.NO_SPACE
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("short", [False, True])
def test_store_without_room_fails_and_works_again_when_there_is_some(path, empty, monkeypatch, short):
    with monkeypatch.context() as patch:
        Full(patch, short=short)
        empty.add(1, 2)
        with pytest.raises(Error) as met:
            empty.store(empty.take(), sync=True)
        assert met.value.kind is Kind.NO_SPACE
    assert empty.lost is None
    name(empty, (2, 3))
    assert found(path) in ([(1, 3)], [(0, PER_SECTOR)])


def test_sync_that_failed_is_never_taken_back(path, empty, monkeypatch):
    """The kernel forgets that a sync failed: the next one succeeds and has written nothing."""

    def fails(fd):
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fails)
        empty.add(1, 2)
        with pytest.raises(Error, match="sync the activity log"):
            empty.store(empty.take(), sync=True)
    for sync in (True, False):
        empty.add(2, 3)
        with pytest.raises(Error):
            empty.store(empty.take(), sync=sync)
    assert empty.lost is not None


def test_open_makes_stable_what_a_dead_process_may_have_left_in_memory(path, empty, monkeypatch):
    name(empty, (1, 2))
    calls = []
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: calls.append((at, len(data))) or len(data))
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("sync"))
    HotExtents(path, LENGTH).close()
    assert calls == [(PAGE, 3 * SECTOR), "sync"]


def test_open_fails_where_what_was_found_cannot_be_made_stable(path, empty, monkeypatch):
    def fails(fd):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(Error, match="sync the activity log"):
        HotExtents(path, LENGTH)


def test_new_file_replaces_another_only_when_it_is_stable(path, empty, monkeypatch):
    path.write_bytes(b"not a log")

    def fails(fd):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(Error, match="open the activity log"):
        HotExtents(path, LENGTH)
    assert path.read_bytes() == b"not a log"
    assert [other.name for other in path.parent.iterdir()] == [path.name]
