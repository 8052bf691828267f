"""The log of writes under way (D3): what a process that is dead had begun."""

import pytest

from tcmu_replication.block import boot
from tcmu_replication.block.in_flight import FILE_SIZE, PAGE, SLOTS, InFlight
from tcmu_replication.errors import Error
from tcmu_replication.units import MiB

LENGTH = 64 * MiB


@pytest.fixture
def path(tmp_path):
    return tmp_path / "in-flight"


@pytest.fixture
def log(path):
    log = InFlight(path, LENGTH)
    log.clear()
    return log


def found(path):
    other = InFlight(path, LENGTH)
    other.close()
    return other.found


def test_new_log_knows_nothing_and_then_that_nothing_is_under_way(path):
    log = InFlight(path, LENGTH)
    assert log.found is None
    assert path.stat().st_size == FILE_SIZE
    assert path.stat().st_blocks * 512 >= FILE_SIZE
    log.clear()
    assert found(path) == []


def test_writes_under_way_are_found_and_ended_ones_are_not(path, log):
    first = log.begin(0, 4096)
    log.begin(8192, 512)
    log.end(first)
    assert found(path) == [(8192, 512)]
    log.begin(MiB, 16 * MiB)
    assert found(path) == [(8192, 512), (MiB, 16 * MiB)]


def test_ranges_that_touch_are_one(path, log):
    for offset, length in [(4096, 4096), (0, 4096), (2048, 512), (12288, 100), (12300, 10)]:
        log.begin(offset, length)
    assert found(path) == [(0, 8192), (12288, 100)]


def test_more_writes_than_places_are_unknown_until_they_have_ended(path, log):
    slots = [log.begin(n * 512, 512) for n in range(SLOTS + 3)]
    assert found(path) is None
    for slot in slots[-3:]:
        log.end(slot)
    assert found(path) == [(0, SLOTS * 512)]
    for slot in slots[:-3]:
        log.end(slot)
    assert found(path) == []


def test_places_are_used_again(path, log):
    for n in range(3 * SLOTS):
        log.end(log.begin(n * 512, 512))
    assert found(path) == []


def test_what_could_not_be_noted_makes_all_of_it_unknown(path, log):
    log.begin(0, 512)
    log.set_unknown()
    assert found(path) is None
    log.clear()
    assert found(path) == []


def test_another_boot_finds_nothing(path, log, monkeypatch):
    log.begin(0, 512)
    monkeypatch.setattr(boot, "boot_id", lambda: "f" * boot.LENGTH)
    assert found(path) is None


def test_range_beyond_the_disk_is_not_believed(path, log):
    log.begin(LENGTH - 512, 1024)
    assert found(path) is None


@pytest.mark.parametrize("size", [0, 1, PAGE, FILE_SIZE - 1, FILE_SIZE + 1])
def test_file_of_another_size_is_made_anew(path, log, size):
    log.begin(0, 512)
    with open(path, "r+b") as file:
        file.truncate(size)
    assert found(path) is None
    assert path.stat().st_size == FILE_SIZE


def test_damaged_header_is_not_believed(path, log):
    for at in range(52):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)
        assert found(path) is None
        data[at] ^= 0x10
        path.write_bytes(data)
    assert found(path) == []


def test_link_is_not_followed(tmp_path):
    (tmp_path / "in-flight").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Error):
        InFlight(tmp_path / "in-flight", LENGTH)
    assert not (tmp_path / "elsewhere").exists()
