"""What only files do: locks, space, threads, and the kernel's odd answers."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block import space
from tcmu_replication.block.file import File
from tcmu_replication.block.node import Extent
from tcmu_replication.block.offload import Offload
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import HeldOffload, make_image

MiB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    return make_image(tmp_path / "image", MiB)


def uncached(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
    """preadv as of a file of which only the first 1000 bytes are in the page cache."""
    if flags == 0:
        return preadv(fd, buffers, offset)
    if offset >= 1000:
        raise BlockingIOError(errno.EAGAIN, "not cached")
    return preadv(fd, [buffers[0][: 1000 - offset]], offset)


preadv = os.preadv


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda folder: folder / "missing", Kind.NOT_FOUND),
        (lambda folder: folder, Kind.BAD_CONFIG),
        (lambda folder: Path("/dev/null"), Kind.BAD_CONFIG),
    ],
    ids=["missing", "folder", "character device"],
)
def test_file_open_refuses(tmp_path: Path, make: Callable[[Path], Path], kind: Kind) -> None:
    with pytest.raises(Error) as caught:
        File(str(make(tmp_path)))
    assert caught.value.kind is kind
    assert str(make(tmp_path)) in str(caught.value)


def test_file_of_our_own_making_is_not_opened_through_a_link(path: str, tmp_path: Path) -> None:
    """S5."""
    link = tmp_path / "link"
    link.symlink_to(path)
    File(str(link)).close()
    with pytest.raises(
        Error, match=f"found {link}, which is a symbolic link; .*write in {tmp_path}"
    ) as caught:
        File(str(link), follow=False)
    assert caught.value.kind is Kind.BAD_CONFIG


def test_file_open_for_writing_excludes_everyone_until_closed(path: str) -> None:
    first = File(path)
    for read_only in (False, True):
        with pytest.raises(Error, match=r"in use.*fuser") as caught:
            File(path, read_only=read_only)
        assert caught.value.kind is Kind.CONFLICT
    first.close()
    readers = [File(path, read_only=True), File(path, read_only=True)]
    with pytest.raises(Error, match="in use"):
        File(path)
    for reader in readers:
        reader.close()


def test_file_device_in_use_names_who_to_look_for(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> int:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(Error, match=r"findmnt.*LVM.*fuser") as caught:
        File(path)
    assert caught.value.kind is Kind.CONFLICT


def test_file_read_only_refused_by_the_kernel_is_an_error(path: str) -> None:
    file = File(path, read_only=True)
    with pytest.raises(Error) as caught:
        file.write(0, [memoryview(b"x")])
    assert (caught.value.offset, caught.value.length) == (0, 1)
    file.close()


def test_file_short_counts_are_continued(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, [buffers[0][:100]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flags=0: preadv(fd, [buffers[0][:77]], at))
    monkeypatch.setattr(os, "pread", lambda fd, length, at: b"")
    file = File(path)
    data = bytes(n & 0xFF for n in range(1000))
    file.write(3, [memoryview(data[:350]), memoryview(data[350:])])
    into = [memoryview(bytearray(600)), memoryview(bytearray(400))]
    file.read(3, into)
    assert b"".join(into) == data
    assert bytes(file.fetch(3, 1000)) == data
    file.close()


def test_file_that_became_shorter_fails_reads_instead_of_inventing_zeroes(path: str) -> None:
    file = File(path)
    os.truncate(path, 4096)
    for read in (lambda: file.read(4000, [memoryview(bytearray(200))]), lambda: file.fetch(4000, 200)):
        with pytest.raises(Error, match="shorter") as caught:
            read()
        assert caught.value.kind is Kind.IO
    file.close()


def test_file_zero_and_discard_give_space_back(path: str) -> None:
    file = File(path)
    file.write(0, [memoryview(b"x" * MiB)])
    file.flush()
    before = os.stat(path).st_blocks
    file.discard(0, MiB // 2)
    file.zero(MiB // 2, MiB // 4)
    assert os.stat(path).st_blocks <= before // 4
    assert os.stat(path).st_size == MiB
    file.close()


def test_file_extents_of_data_and_holes(path: str) -> None:
    file = File(path)
    file.write(256 * 1024, [memoryview(b"x" * 65536)])
    assert file.extents(0, MiB) == [
        Extent(256 * 1024, allocated=False, zero=True),
        Extent(65536, allocated=True, zero=False),
        Extent(MiB - 256 * 1024 - 65536, allocated=False, zero=True),
    ]
    assert file.extents(256 * 1024 + 10, 20) == [Extent(20, allocated=True, zero=False)]
    file.close()


def test_file_without_fallocate_writes_zeroes_and_ignores_discards(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(space, "fallocate", lambda fd, mode, *_: asked.append(mode))
    file = File(path)
    file.write(0, [memoryview(b"x" * MiB)])
    for unmap in (True, False, True):
        file.zero(100, 1000, unmap=unmap)
    file.discard(0, MiB)
    assert bytes(file.fetch(0, MiB)) == b"x" * 100 + bytes(1000) + b"x" * (MiB - 1100)
    assert asked == [space.PUNCH_HOLE, space.ZERO_RANGE], "each is tried once and remembered"
    file.close()


def test_file_says_whether_it_gives_space_back_and_stays_as_it_is(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = File(path)
    file.write(0, [memoryview(b"x" * MiB)])
    assert file.unmaps
    assert bytes(file.fetch(0, MiB)) == b"x" * MiB
    assert os.stat(path).st_size == MiB
    file.close()
    monkeypatch.setattr(space, "fallocate", lambda *_: False)
    file = File(path)
    assert not file.unmaps
    file.close()


def test_file_as_device_keeps_fallocate_and_discard_in_whole_blocks(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(space, "discard_device", lambda fd, *at: asked.append(at))
    file = File(path)
    file._is_device, file._grain = True, 512
    file.write(0, [memoryview(b"x" * 4096)])
    punched: list[tuple[int, int]] = []
    fallocate = space.fallocate
    monkeypatch.setattr(
        space, "fallocate", lambda fd, mode, *at: (punched.append(at), fallocate(fd, mode, *at))[1]
    )
    file.zero(500, 1036)
    file.zero(100, 20)
    assert punched == [(512, 1024)]
    assert bytes(file.fetch(0, 2048)) == b"x" * 100 + bytes(20) + b"x" * 380 + bytes(1036) + b"x" * 512
    file.discard(3, 100)
    file.discard(3, 2045)
    file.discard(0, 512)
    assert asked == [(512, 1536)], "nothing without a whole block, nothing after it was found unsupported"
    assert file.extents(0, 100) == [Extent(100, allocated=True, zero=False)]
    file.close()


def test_file_failed_flush_is_never_forgotten(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = File(path)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(Error):
            file.flush()
    with pytest.raises(Error, match="flush"):
        file.flush()
    file.close()
    again = File(path)
    assert again.flush() is None
    again.close()


def test_file_uncached_reads_end_in_a_thread(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", uncached)
    offload = HeldOffload()
    file = File(path, offload=offload)
    file.write(0, [memoryview(b"abcd" * 1000)])
    into = [memoryview(bytearray(500)), memoryview(bytearray(1500))]
    partly = file.read(900, into)
    wholly = file.read(1000, [memoryview(other := bytearray(8))])
    assert partly is not None
    assert wholly is not None
    assert file.read(992, [memoryview(cached := bytearray(8))]) is None
    assert cached == b"abcdabcd"
    offload.run_next()
    offload.run_next()
    assert partly.done
    assert wholly.done
    assert b"".join(into) == b"abcd" * 500
    assert other == b"abcdabcd"
    file.close()


def test_file_on_tmpfs_reads_at_once(shm: Path) -> None:
    file = File(make_image(shm / "image", MiB), offload=HeldOffload())
    into = bytearray(b"x" * 10)
    for _ in range(2):
        assert file.read(5, [memoryview(into)]) is None
    assert into == bytes(10)
    file.close()


def test_file_flushes_asked_while_one_runs_share_the_next(path: str) -> None:
    offload = HeldOffload()
    file = File(path, offload=offload)
    first = file.flush()
    second, third = file.flush(), file.write(0, [memoryview(b"x")], True)
    assert first is not None
    assert second is third is not None, "one fdatasync for both"
    assert len(offload.calls) == 1
    offload.run_next()
    assert first.done
    assert not second.done, "the first began before them"
    offload.run_next()
    assert second.done
    assert not offload.calls
    file.close()


def test_file_closed_while_a_thread_uses_it_stays_open_until_then(path: str) -> None:
    offload = HeldOffload()
    file = File(path, offload=offload)
    pending = file.flush()
    file.close()
    with pytest.raises(Error, match="in use"):
        File(path)
    offload.run_next()
    assert pending is not None
    assert pending.error is None
    File(path).close()


def test_offload_completes_on_the_loops_thread_and_translates(loop: asyncio.AbstractEventLoop) -> None:
    offload = Offload(loop)
    seen: list[bool] = []

    def full() -> None:
        raise OSError(errno.ENOSPC, "full")

    async def run() -> None:
        pending = offload(threading.get_ident, "ask")
        pending.then(lambda _: seen.append(threading.get_ident() == main))
        assert await pending.wait() != main
        with pytest.raises(Error, match="fill /x: full") as caught:
            await offload(full, "fill /x").wait()
        assert caught.value.kind is Kind.NO_SPACE

    main = threading.get_ident()
    loop.run_until_complete(run())
    assert seen == [True]
    offload.close()
    offload.close()
    with pytest.raises(Error) as caught:
        offload(full, "fill /x")
    assert caught.value.kind is Kind.CANCELLED


def test_file_with_real_threads(path: str, loop: asyncio.AbstractEventLoop) -> None:
    async def run() -> None:
        offload = Offload()
        file = File(path, offload=offload)
        flushes = [file.write(n, [memoryview(b"x")], True) for n in range(20)]
        for pending in flushes:
            assert pending is not None
            await pending.wait()
        file.close()
        offload.close()

    loop.run_until_complete(run())
    assert Path(path).read_bytes()[:21] == b"x" * 20 + b"\0"
