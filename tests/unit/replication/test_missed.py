"""The map of missed writes as a file."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.block import boot, map_format
from tcmu_replication.block.allocation_map import AllocationMap
from tcmu_replication.block.map_format import HERE, PER_PAGE
from tcmu_replication.block.memory import Memory
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


def test_bytes_that_the_peer_misses_end_with_the_disk(tmp_path: Path) -> None:
    missed = Missed(tmp_path / "out-of-sync.map", 2 * BLOCK + 512)
    missed.open()
    missed.mark(BLOCK, BLOCK + 512)
    assert missed.bytes == BLOCK + 512
    missed.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"torn", bytes(8192), b"tcmurbit", b"tcmurmap"],
    ids=["empty", "torn", "zeroes", "new", "old"],
)
def test_map_without_a_whole_header_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    missed = Missed(tmp_path / "out-of-sync.map", 4 * MiB)
    missed.path.write_bytes(content)
    with pytest.raises(Error, match="is no map of this") as refused:
        missed.open()
    assert refused.value.kind is Kind.BAD_CONFIG
    assert missed.path.read_bytes() == content
    assert os.listdir(tmp_path) == ["out-of-sync.map"]


# A map as earlier versions made it.

OLD_LENGTH = 4 * PER_PAGE * BLOCK - 512
OLD_MARKS = [(0, 1), (5, 9), (PER_PAGE - 1, PER_PAGE + 1), (3 * PER_PAGE, 4 * PER_PAGE)]
OLD_BYTES = (1 + 4 + 2 + PER_PAGE) * BLOCK - 512


@pytest.fixture
def old(tmp_path: Path) -> Missed:
    """With such a map in its place."""
    path = tmp_path / "out-of-sync.map"
    path.write_bytes(
        map_format.header(OLD_LENGTH).ljust(map_format.file_size(OLD_LENGTH), b"\0"),
    )
    before = AllocationMap(str(path), OLD_LENGTH)
    for first, last in OLD_MARKS:
        before.mark(first, last, HERE)
    before.close()
    return Missed(path, OLD_LENGTH)


@pytest.mark.parametrize("booted", [False, True], ids=["same-boot", "another-boot"])
def test_map_of_an_earlier_version_is_converted_once(
    old: Missed, monkeypatch: pytest.MonkeyPatch, booted: bool
) -> None:
    if booted:
        monkeypatch.setattr(boot, "boot_id", lambda: "another boot")
    for _ in range(2):
        old.open()
        assert (old.bytes, old.complete) == (OLD_BYTES, True)
        assert old.path.read_bytes().startswith(b"tcmurbit")
        assert stat.S_IMODE(old.path.stat().st_mode) == 0o600
        assert os.listdir(old.path.parent) == ["out-of-sync.map"]
        old.close()


def test_map_of_an_earlier_version_and_another_disk_is_refused(old: Missed) -> None:
    content = old.path.read_bytes()
    with pytest.raises(Error, match=f"is for a disk of {OLD_LENGTH} bytes, not of {4 * MiB}"):
        Missed(old.path, 4 * MiB).open()
    assert old.path.read_bytes() == content


class Death(BaseException):
    """Ends everything at once, as far as the files can tell."""


def dies(*_: object) -> None:
    raise Death


def fails(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "pwritev", "fdatasync", "replace", "fsync"])
@pytest.mark.parametrize("ends", [dies, fails], ids=["death", "no-space"])
def test_conversion_that_does_not_end_is_made_again(
    old: Missed, monkeypatch: pytest.MonkeyPatch, call: str, ends: Callable[..., None]
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, call, ends)
        with pytest.raises((Death, Error)):
            old.open()
    again = Missed(old.path, OLD_LENGTH)
    again.open()
    assert again.bytes == OLD_BYTES
    assert os.listdir(old.path.parent) == ["out-of-sync.map"]
    again.close()


def test_conversion_is_stable_before_it_takes_the_place_of_the_map(
    old: Missed, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    for name in ("fdatasync", "fsync"):
        monkeypatch.setattr(
            os, name, lambda fd, name=name: done.append((name, os.readlink(f"/proc/self/fd/{fd}")))
        )
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append(("replace", str(paths[1]))), real(*paths)))
    old.open()
    assert done[:3] == [
        ("fdatasync", f"{old.path}.new"),
        ("replace", str(old.path)),
        ("fsync", str(old.path.parent)),
    ]
    old.close()


def test_map_that_begins_anew_removes_a_conversion_that_did_not_end(old: Missed) -> None:
    old.path.with_name("out-of-sync.map.new").write_bytes(b"half")
    old.open(anew=True)
    assert old.bytes == 0
    assert os.listdir(old.path.parent) == ["out-of-sync.map"]
    old.close()


# Sending again.


def test_what_is_marked_is_sent_again_in_pieces_up_to_the_end_of_the_disk(tmp_path: Path) -> None:
    length = MiB + 512
    disk, peer = Memory(length), Memory(length)
    disk.data[:] = bytes(n % 251 for n in range(length))
    missed = Missed(tmp_path / "out-of-sync.map", length)
    missed.open()
    missed.mark(300 * 1024, length - 300 * 1024)
    asyncio.run(missed.resend(disk, peer, lambda: False))
    assert bytes(peer.data) == bytes(300 * 1024) + disk.data[300 * 1024 :]
    assert missed.bytes == 0
    missed.close()


def test_mark_that_cannot_be_taken_away_stays_and_the_others_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, peer = Memory(4 * MiB), Memory(4 * MiB)
    missed = Missed(tmp_path / "out-of-sync.map", 4 * MiB)
    missed.open()
    for offset in (0, MiB, 2 * MiB):
        missed.mark(offset, BLOCK)
    real = os.pwritev
    calls = iter([real, fails])
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwritev", lambda *call: next(calls, real)(*call))
        with pytest.raises(Error) as met:
            asyncio.run(missed.resend(disk, peer, lambda: False))
    assert met.value.kind is Kind.NO_SPACE
    assert missed.bytes == BLOCK
    asyncio.run(missed.resend(disk, peer, lambda: False))
    assert missed.bytes == 0
    missed.close()
