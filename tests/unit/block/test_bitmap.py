"""The map of dirty blocks as a file: what it costs, what it refuses, and what a failure leaves."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tcmu_replication.block import bitmap
from tcmu_replication.block.bitmap import PAGE, PER_PAGE, Bitmap
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK, KiB, TiB

BLOCKS = 2 * PER_PAGE + 100
LENGTH = BLOCKS * BLOCK - 1000
"""The last block is a part."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dirty.map"


@pytest.fixture
def dirty(path: Path) -> Iterator[Bitmap]:
    made = Bitmap.create(path, LENGTH)
    yield made
    made.close()


def reopened(dirty: Bitmap, length: int = LENGTH) -> Bitmap:
    dirty.close()
    return Bitmap(dirty.path, length)


# What is counted and found.


def test_map_that_is_new_has_nothing_dirty(dirty: Bitmap) -> None:
    assert (dirty.count, dirty.bytes, list(dirty.runs())) == (0, 0, [])
    assert not dirty.test(0)
    assert not dirty.test(BLOCKS - 1)


def test_marks_and_clears_are_counted_once(dirty: Bitmap) -> None:
    for _ in range(2):
        dirty.mark(3, 4)
        dirty.mark(2, 5)
    assert (dirty.count, list(dirty.runs())) == (3, [(2, 5)])
    for _ in range(2):
        dirty.clear(3, 4)
    assert (dirty.count, list(dirty.runs())) == (2, [(2, 3), (4, 5)])
    dirty.clear(0, BLOCKS)
    assert (dirty.count, list(dirty.runs())) == (0, [])


def test_bytes_end_with_the_disk(dirty: Bitmap) -> None:
    dirty.mark(BLOCKS - 2, BLOCKS)
    assert dirty.bytes == 2 * BLOCK - 1000
    dirty.clear(BLOCKS - 1, BLOCKS)
    assert dirty.bytes == BLOCK


def test_run_over_several_pages_is_one_run(dirty: Bitmap) -> None:
    dirty.mark(7, BLOCKS)
    assert list(dirty.runs()) == [(7, BLOCKS)]
    assert list(dirty.runs(PER_PAGE - 1, PER_PAGE + 1)) == [(PER_PAGE - 1, PER_PAGE + 1)]


def test_runs_are_no_longer_than_asked_for(dirty: Bitmap) -> None:
    dirty.mark(PER_PAGE - 10, PER_PAGE + 15)
    assert list(dirty.runs(longest=10)) == [
        (PER_PAGE - 10, PER_PAGE),
        (PER_PAGE, PER_PAGE + 10),
        (PER_PAGE + 10, PER_PAGE + 15),
    ]


def test_runs_see_what_is_marked_and_cleared_ahead_of_them(dirty: Bitmap) -> None:
    dirty.mark(10, 20)
    dirty.mark(30, 40)
    runs = dirty.runs()
    assert next(runs) == (10, 20)
    dirty.mark(5, 6)
    dirty.clear(30, 35)
    dirty.mark(PER_PAGE, PER_PAGE + 1)
    assert list(runs) == [(35, 40), (PER_PAGE, PER_PAGE + 1)]


def test_runs_end_when_the_map_is_closed(dirty: Bitmap) -> None:
    dirty.mark(10, 20)
    dirty.mark(30, 40)
    runs = dirty.runs()
    next(runs)
    dirty.close()
    assert list(runs) == []


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (2, 1), (0, BLOCKS + 1), (BLOCKS, BLOCKS + 1)])
def test_range_that_is_not_on_the_disk_is_refused(dirty: Bitmap, first: int, last: int) -> None:
    for call in (dirty.mark, dirty.clear):
        with pytest.raises(Error) as refused:
            call(first, last)
        assert refused.value.kind is Kind.OUT_OF_RANGE
    assert dirty.count == 0
    dirty.mark(BLOCKS, BLOCKS)
    assert reopened(dirty).count == 0


# What it costs.


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each read."""
    found: list[int] = []
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        found.append(length)
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    return found


def resident(path: str) -> int:
    """Bytes of mappings of this file that this process has looked at (proc(5), smaps)."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()
        if not word[0].endswith(":"):
            ours = line.endswith(path)
        elif ours and word[0] == "Rss:":
            total += int(word[1]) * KiB
    return total


def test_map_of_16_tib_costs_what_was_touched(path: Path, read_bytes: list[int]) -> None:
    length = 16 * TiB
    blocks = [0, length // BLOCK // 2, length // BLOCK - 1]
    dirty = Bitmap.create(path, length)
    for block in blocks:
        dirty.mark(block, block + 1)
    assert path.stat().st_size > 512 * 1024 * KiB
    read_bytes.clear()
    dirty = reopened(dirty, length)
    assert (dirty.count, dirty.bytes) == (3, 3 * BLOCK)
    assert list(dirty.runs()) == [(block, block + 1) for block in blocks]
    assert [dirty.test(block) for block in blocks] == [True] * 3
    dirty.clear(0, length // BLOCK)
    assert dirty.count == 0
    assert sum(read_bytes) <= 64 * KiB
    assert resident(dirty.path) <= 1024 * KiB
    assert path.stat().st_blocks * 512 <= 64 * KiB
    dirty.close()


def test_mark_of_what_is_dirty_writes_nothing(dirty: Bitmap, monkeypatch: pytest.MonkeyPatch) -> None:
    dirty.mark(0, 100)
    monkeypatch.setattr(os, "pwritev", lambda *_: pytest.fail("a write"))
    dirty.mark(7, 8)
    dirty.mark(0, 100)
    dirty.clear(100, BLOCKS)


# What fails.


def failing(code: int) -> Callable[[int, Sequence[memoryview], int], int]:
    def pwritev(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(code, os.strerror(code))

    return pwritev


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, Kind.NO_SPACE), (errno.EIO, Kind.IO)])
def test_mark_that_finds_no_space_changes_nothing(
    dirty: Bitmap, monkeypatch: pytest.MonkeyPatch, code: int, kind: Kind
) -> None:
    dirty.mark(0, 2)
    with monkeypatch.context() as full:
        full.setattr(os, "pwritev", failing(code))
        for first in (2, PER_PAGE):
            for count in (1, 9):
                with pytest.raises(Error) as refused:
                    dirty.mark(first, first + count)
                assert refused.value.kind is kind
        with pytest.raises(Error):
            dirty.clear(0, 1)
    assert (dirty.count, list(dirty.runs())) == (2, [(0, 2)])
    again = reopened(dirty)
    assert (again.count, list(again.runs())) == (2, [(0, 2)])
    again.close()


def test_count_is_right_after_a_mark_of_which_a_part_was_written(
    dirty: Bitmap, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirty.mark(1000, 1001)
    real = os.pwritev
    answers = iter([lambda fd, buffers, offset: real(fd, [buffers[0][:2]], offset), failing(errno.ENOSPC)])
    with monkeypatch.context() as full:
        full.setattr(os, "pwritev", lambda *call: next(answers)(*call))
        with pytest.raises(Error):
            dirty.mark(0, 64)
    assert dirty.count == sum(last - first for first, last in dirty.runs()) == 17
    again = reopened(dirty)
    assert again.count == 17
    again.close()


def test_flush_that_failed_fails_for_good(dirty: Bitmap, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    dirty.flush()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fdatasync)
        with pytest.raises(Error):
            dirty.flush()
    with pytest.raises(Error) as lost:
        dirty.flush()
    assert lost.value.kind is Kind.IO


def test_map_on_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine mounts no tmpfs ({mounted.stderr.strip()})")
    try:
        dirty = Bitmap.create(folder / "dirty.map", LENGTH)
        dirty.mark(0, 1)
        with open(folder / "filler", "wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(BLOCK))
            for count in (1, 20):
                with pytest.raises(Error) as refused:
                    dirty.mark(PER_PAGE, PER_PAGE + count)
                assert refused.value.kind is Kind.NO_SPACE
            assert not dirty.test(PER_PAGE)
            dirty.mark(1, 3)
            assert list(dirty.runs()) == [(0, 3)]
            dirty = reopened(dirty)
            assert list(dirty.runs()) == [(0, 3)]
            filler.truncate(0)
        dirty.mark(PER_PAGE, PER_PAGE + 1)
        assert dirty.count == 4
        dirty.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# What is refused.


def test_map_is_readable_by_its_owner_alone_and_not_made_twice(path: Path) -> None:
    before = os.umask(0)
    try:
        Bitmap.create(path, LENGTH).close()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(Error) as refused:
        Bitmap.create(path, LENGTH)
    assert refused.value.kind is Kind.CONFLICT


def test_map_that_is_open_is_in_use(dirty: Bitmap) -> None:
    with pytest.raises(Error) as refused:
        Bitmap(dirty.path, LENGTH)
    assert refused.value.kind is Kind.CONFLICT


def test_map_that_is_not_there_is_not_found(path: Path) -> None:
    with pytest.raises(Error) as refused:
        Bitmap(path, LENGTH)
    assert refused.value.kind is Kind.NOT_FOUND


def headed(magic: bytes = bitmap.MAGIC, number: int = 1, block: int = BLOCK, disk: int = LENGTH) -> bytes:
    head = struct.pack("<8sIIQ", magic, number, block, disk)
    return head + struct.pack("<I", zlib.crc32(head))


WHOLE = bitmap.file_size(LENGTH)
SECOND = PAGE + BLOCKS // 8


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param(b"", "was not finished when it was created", id="empty"),
        pytest.param(bytes(WHOLE), "was not finished when it was created", id="no-header"),
        pytest.param(headed()[:20], "was not finished when it was created", id="header-torn"),
        pytest.param(headed(b"tcmurmap").ljust(WHOLE, b"\0"), "begins with b'tcmurmap'", id="something-else"),
        pytest.param(headed()[:-1].ljust(WHOLE, b"\0"), "has a damaged header", id="checksum"),
        pytest.param(headed(number=2).ljust(WHOLE, b"\0"), "has format 2 and blocks of 4096 ", id="format"),
        pytest.param(headed(block=512).ljust(WHOLE, b"\0"), "has format 1 and blocks of 512 ", id="blocks"),
        pytest.param(
            headed(disk=LENGTH - 1).ljust(WHOLE, b"\0"),
            f"disk of {LENGTH - 1} bytes, not of {LENGTH}",
            id="disk",
        ),
        pytest.param(
            headed().ljust(WHOLE - 1, b"\0"), f"has {WHOLE - 1} bytes instead of {WHOLE}", id="short"
        ),
        pytest.param(
            headed().ljust(WHOLE + 1, b"\0"), f"has {WHOLE + 1} bytes instead of {WHOLE}", id="long"
        ),
        pytest.param(
            headed().ljust(SECOND, b"\0") + b"\x10".ljust(WHOLE - SECOND, b"\0"),
            "marks blocks beyond the end of the disk",
            id="beyond-the-end",
        ),
    ],
)
def test_file_that_is_no_map_of_this_disk_is_refused_and_left_alone(
    path: Path, content: bytes, found: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(Error) as refused:
        Bitmap(path, LENGTH)
    assert refused.value.kind is Kind.BAD_CONFIG
    assert found in refused.value.detail
    assert path.read_bytes() == content
    path.write_bytes(headed().ljust(WHOLE, b"\0"))
    Bitmap(path, LENGTH).close()  # it was let go


def test_file_is_as_the_table_says(dirty: Bitmap, path: Path) -> None:
    dirty.mark(0, 1)
    dirty.mark(9, 12)
    dirty.mark(BLOCKS - 1, BLOCKS)
    content = path.read_bytes()
    assert (
        content[:28]
        == b"tcmurbit" + b"\1\0\0\0" + b"\0\x10\0\0" + LENGTH.to_bytes(8, "little") + headed()[24:]
    )
    assert content[28:PAGE] == bytes(PAGE - 28)
    assert content[PAGE : PAGE + 3] == b"\1\x0e\0"
    assert content[SECOND:] == b"\x08".ljust(WHOLE - SECOND, b"\0")


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing"])
def test_link_in_place_of_a_map_is_not_followed(tmp_path: Path, path: Path, there: bool) -> None:
    if there:
        Bitmap.create(tmp_path / "other", LENGTH).close()
    path.symlink_to(tmp_path / "other")
    with pytest.raises(Error, match="which is a symbolic link") as refused:
        Bitmap(path, LENGTH)
    assert refused.value.kind is Kind.BAD_CONFIG
