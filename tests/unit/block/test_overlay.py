"""The overlay: what is here and what lies below, its files, and what happens when they are bad or full."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcmu_replication.block import map_format
from tcmu_replication.block.faults import Faults
from tcmu_replication.block.file import File
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Extent, Node
from tcmu_replication.block.overlay import Overlay, held_runs
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import MiB
from tests.unit.block.conftest import HeldOffload, make_image

BLOCK = 4096
LENGTH = 9 * BLOCK + 700
OLD = bytes(n * 37 % 251 + 1 for n in range(LENGTH))


@pytest.fixture
def below() -> Memory:
    memory = Memory(LENGTH)
    memory.data[:] = OLD
    return memory


@pytest.fixture
def overlay(below: Memory, tmp_path: Path) -> Overlay:
    return Overlay.create("active", tmp_path / "active", below)


def content(node: Node) -> bytes:
    """All of it, by read and by fetch, which must agree."""
    into = bytearray(node.length)
    assert node.read(0, [memoryview(into)[:5000], memoryview(into)[5000:]]) is None
    assert bytes(node.fetch(0, node.length)) == into
    return bytes(into)


def runs(overlay: Overlay, offset: int = 0) -> list[tuple[int, int, bool]]:
    return list(overlay.allocated_runs(offset))


def changed(*writes: tuple[int, bytes]) -> bytes:
    expected = bytearray(OLD)
    for offset, data in writes:
        expected[offset : offset + len(data)] = data
    return bytes(expected)


def test_overlay_empty_reads_what_lies_below(overlay: Overlay) -> None:
    assert content(overlay) == OLD
    assert runs(overlay) == []
    assert overlay.allocated_bytes == 0
    assert overlay.extents(100, 200) == [Extent(200, allocated=True, zero=False)]


@pytest.mark.parametrize(
    ("offset", "length", "blocks"),
    [
        (0, 1, 1),
        (4095, 1, 1),
        (4095, 2, 2),
        (4096, 4096, 1),
        (4000, 2 * 4096, 3),
        (LENGTH - 1, 1, 1),
        (LENGTH - 700, 700, 1),
        (LENGTH - 701, 701, 2),
        (0, LENGTH, 10),
    ],
)
def test_overlay_write_of_any_alignment(
    overlay: Overlay, below: Memory, offset: int, length: int, blocks: int
) -> None:
    new = bytes([7]) * length
    assert overlay.write(offset, [memoryview(new)[: length // 2], memoryview(new)[length // 2 :]]) is None
    assert content(overlay) == changed((offset, new))
    assert below.data == OLD, "nothing goes through"
    assert overlay.allocated_bytes == overlay.stored_bytes == blocks * BLOCK
    start = offset // BLOCK * BLOCK
    assert runs(overlay) == [(start, min(start + blocks * BLOCK, LENGTH) - start, False)]
    overlay.write(offset, [memoryview(new)])
    assert overlay.allocated_bytes == blocks * BLOCK, "not counted twice"


def test_overlay_reads_across_here_zero_and_below(overlay: Overlay) -> None:
    overlay.write(BLOCK, [memoryview(b"n" * BLOCK)])
    overlay.zero(2 * BLOCK, BLOCK)
    overlay.write(5 * BLOCK + 10, [memoryview(b"m")])
    expected = changed((BLOCK, b"n" * BLOCK + bytes(BLOCK)), (5 * BLOCK + 10, b"m"))
    assert content(overlay) == expected
    for offset, length in [(BLOCK - 1, 2), (10, 3 * BLOCK), (2 * BLOCK + 5, 9), (3 * BLOCK - 1, 3 * BLOCK)]:
        into = [memoryview(bytearray(length - 1)), memoryview(bytearray(1))]
        overlay.read(offset, into)
        assert b"".join(into) == expected[offset : offset + length]
    assert overlay.extents(100, LENGTH - 100) == [
        Extent(2 * BLOCK - 100, allocated=True, zero=False),
        Extent(BLOCK, allocated=False, zero=True),
        Extent(LENGTH - 3 * BLOCK, allocated=True, zero=False),
    ]


@pytest.mark.parametrize(
    ("offset", "length", "whole"),
    [
        (0, BLOCK, 1),
        (1, BLOCK, 0),
        (1, 2 * BLOCK, 1),
        (BLOCK - 1, 2, 0),
        (3, 5, 0),
        (9 * BLOCK, 700, 1),
        (9 * BLOCK - 1, 701, 1),
        (0, LENGTH, 10),
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["absent", "here"])
def test_overlay_zero_and_discard(
    overlay: Overlay, below: Memory, before: bool, offset: int, length: int, whole: int
) -> None:
    if before:
        overlay.write(0, [memoryview(OLD)])
    overlay.discard(offset, length)
    assert (overlay.allocated_bytes - overlay.stored_bytes) // BLOCK == whole
    overlay.zero(offset, length)
    assert content(overlay) == changed((offset, bytes(length)))
    assert (overlay.allocated_bytes - overlay.stored_bytes) // BLOCK == whole
    stored = overlay.stored_bytes
    overlay.zero(offset, length)
    assert overlay.stored_bytes == stored
    assert below.data == OLD


def test_overlay_partial_write_into_a_zeroed_block_finds_zeroes(overlay: Overlay) -> None:
    overlay.write(0, [memoryview(b"stale" * 1000)])
    overlay.data = Faults(overlay.data)
    overlay.data.fail("discard")  # the space cannot be given back: the old bytes stay in the file
    overlay.zero(0, BLOCK)
    assert content(overlay)[:BLOCK] == bytes(BLOCK)
    overlay.write(100, [memoryview(b"new")])
    assert content(overlay)[:BLOCK] == bytes(100) + b"new" + bytes(BLOCK - 103)


def test_overlay_survives_reopening(overlay: Overlay, below: Memory, tmp_path: Path) -> None:
    overlay.write(5, [memoryview(b"abc")])
    overlay.zero(3 * BLOCK, 2 * BLOCK)
    expected, before = content(overlay), (runs(overlay), overlay.allocated_bytes, overlay.stored_bytes)
    assert overlay.flush() is None
    overlay.close()
    overlay.close()
    assert overlay.ejected
    again = Overlay("active", tmp_path / "active", below)
    assert content(again) == expected
    assert (runs(again), again.allocated_bytes, again.stored_bytes) == before
    again.close()


def test_overlay_questions_about_allocation(overlay: Overlay) -> None:
    overlay.write(2 * BLOCK, [memoryview(bytes(BLOCK))])
    overlay.zero(3 * BLOCK, BLOCK)
    assert overlay.allocated(3 * BLOCK - 1, 1)
    assert overlay.allocated(0, LENGTH)
    assert not overlay.allocated(0, 2 * BLOCK)
    assert not overlay.allocated(4 * BLOCK, LENGTH - 4 * BLOCK)
    assert overlay.covers(2 * BLOCK, 2 * BLOCK)
    assert overlay.covers(3 * BLOCK - 1, 2)
    assert not overlay.covers(2 * BLOCK - 1, 2)
    assert not overlay.covers(2 * BLOCK, 2 * BLOCK + 1)
    assert runs(overlay, 3 * BLOCK + 5) == [(3 * BLOCK, BLOCK, True)]
    assert list(overlay.missing(BLOCK + 5, LENGTH - BLOCK - 5)) == [
        (BLOCK, BLOCK),
        (4 * BLOCK, LENGTH - 4 * BLOCK),
    ]
    overlay.forget(2 * BLOCK, BLOCK)
    assert runs(overlay) == [(3 * BLOCK, BLOCK, True)]
    assert (overlay.allocated_bytes, overlay.stored_bytes) == (BLOCK, 0)
    assert content(overlay) == changed((3 * BLOCK, bytes(BLOCK)))


def test_overlay_save_keeps_zeroes_as_a_mark_alone(overlay: Overlay, below: Memory) -> None:
    overlay.save(0, memoryview(bytes(BLOCK)))
    overlay.save(9 * BLOCK, memoryview(OLD)[9 * BLOCK :])
    below.data[:] = b"n" * LENGTH
    assert runs(overlay) == [(0, BLOCK, True), (9 * BLOCK, 700, False)]
    assert content(overlay) == bytes(BLOCK) + b"n" * (8 * BLOCK) + OLD[9 * BLOCK :]


def test_overlay_cost_follows_what_was_touched(tmp_path: Path, shm: Path) -> None:
    for folder, length in ((shm, 16 << 40), (tmp_path, 15 << 40)):
        disk = File(make_image(folder / "disk", length))
        overlay = Overlay.create("active", folder / "active", disk)
        far = length - 3 * BLOCK
        overlay.write(far + 1, [memoryview(b"x")])
        overlay.close()
        overlay = Overlay("active", folder / "active", disk)
        assert runs(overlay) == [(far, BLOCK, False)]
        assert overlay.allocated(0, length)
        assert not overlay.allocated(0, far)
        assert not overlay.covers(0, 1 << 40)
        assert bytes(overlay.fetch(far, 3)) == b"\0x\0"
        assert sum(os.stat(f"{overlay.path}.{kind}").st_blocks * 512 for kind in ("map", "data")) <= 64 << 10
        overlay.destroy()
        assert not list(folder.glob("active*"))
        disk.close()


# Slots of the data file.


def occupied(path: Path) -> int:
    return os.stat(path).st_blocks * 512


@pytest.fixture
def recycled(overlay: Overlay, below: Memory, tmp_path: Path) -> Overlay:
    """An empty overlay whose data file is full of an earlier one's content."""
    overlay.write(0, [memoryview(b"secret" * (LENGTH // 6))])
    overlay.close()
    (tmp_path / "active.map").unlink()
    return Overlay.create("next", tmp_path / "next", below, recycled=tmp_path / "active.data")


def test_overlay_recycled_shows_nothing_of_what_its_file_held(
    recycled: Overlay, below: Memory, tmp_path: Path
) -> None:
    assert not (tmp_path / "active.data").exists()
    assert content(recycled) == OLD
    recycled.write(BLOCK + 7, [memoryview(b"x")])
    recycled.zero(4 * BLOCK - 5, BLOCK + 10)
    recycled.write(8 * BLOCK + 1, [memoryview(b"end of it, up to the last block's part" * 50)])
    expected = changed(
        (BLOCK + 7, b"x"),
        (4 * BLOCK - 5, bytes(BLOCK + 10)),
        (8 * BLOCK + 1, b"end of it, up to the last block's part" * 50),
    )
    assert content(recycled) == expected
    recycled.close()
    assert content(Overlay("next", tmp_path / "next", below)) == expected


def test_overlay_recycled_allocates_nothing_until_its_space_is_used(
    recycled: Overlay, tmp_path: Path
) -> None:
    before = occupied(tmp_path / "next.data")
    for block in (5, 2, 8):
        recycled.write(block * BLOCK, [memoryview(b"n" * BLOCK)])
    assert occupied(tmp_path / "next.data") == before


def test_overlay_trim_gives_back_all_but_the_slots_in_use(recycled: Overlay, tmp_path: Path) -> None:
    recycled.write(2 * BLOCK, [memoryview(b"n" * 2 * BLOCK)])
    recycled.store(7 * BLOCK, memoryview(OLD)[7 * BLOCK : 8 * BLOCK])
    recycled.trim()
    assert occupied(tmp_path / "next.data") == 3 * BLOCK
    recycled.mark(7 * BLOCK, BLOCK, False)
    assert content(recycled) == changed((2 * BLOCK, b"n" * 2 * BLOCK))


def test_overlay_recycled_from_nothing_is_a_new_file(below: Memory, tmp_path: Path) -> None:
    overlay = Overlay.create("next", tmp_path / "next", below, recycled=tmp_path / "gone")
    assert content(overlay) == OLD


def test_overlay_recycled_never_replaces_a_file(below: Memory, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "next.data").write_bytes(b"precious")
    with pytest.raises(Error) as caught:
        Overlay.create("next", tmp_path / "next", below, recycled=tmp_path / "old")
    assert caught.value.kind is Kind.CONFLICT
    assert (tmp_path / "next.data").read_bytes() == b"precious"


def test_overlay_blocks_keep_their_slots_through_zeroes_and_rewrites(
    overlay: Overlay, tmp_path: Path
) -> None:
    for round_ in range(50):
        overlay.write(3 * BLOCK, [memoryview(bytes([round_ + 1]) * 2 * BLOCK)])
        overlay.zero(3 * BLOCK, BLOCK)
        overlay.discard(4 * BLOCK, BLOCK)
    overlay.write(3 * BLOCK, [memoryview(b"n" * BLOCK)])
    overlay.write(4 * BLOCK + 9, [memoryview(b"n")])
    assert occupied(tmp_path / "active.data") == 2 * BLOCK
    assert content(overlay) == changed((3 * BLOCK, b"n" * BLOCK + b"\0" * 9 + b"n" + bytes(BLOCK - 10)))
    overlay.trim()
    assert os.path.getsize(tmp_path / "active.data") == 10 * BLOCK


def test_overlay_reopened_takes_slots_behind_the_last_that_is_marked(
    overlay: Overlay, below: Memory, tmp_path: Path
) -> None:
    overlay.write(6 * BLOCK, [memoryview(b"a" * BLOCK)])
    overlay.write(BLOCK, [memoryview(b"b" * BLOCK)])
    overlay.zero(BLOCK, BLOCK)
    overlay.close()
    overlay = Overlay("active", tmp_path / "active", below)
    overlay.write(0, [memoryview(b"c" * BLOCK)])
    overlay.write(BLOCK, [memoryview(b"d")])
    expected = changed((0, b"c" * BLOCK + b"d" + bytes(BLOCK - 1)), (6 * BLOCK, b"a" * BLOCK))
    assert content(overlay) == expected


def test_overlay_stored_and_abandoned_leaves_no_trace_and_its_slots_are_used_again(
    overlay: Overlay, tmp_path: Path
) -> None:
    data = memoryview(OLD)
    for _ in range(30):
        overlay.store(0, data[:BLOCK])
        overlay.store(BLOCK, data[BLOCK : 2 * BLOCK])
        overlay.abandon(0, BLOCK)
        overlay.abandon(BLOCK, BLOCK)
        overlay.store(0, memoryview(bytes(BLOCK)))
        overlay.abandon(0, BLOCK)
    assert runs(overlay) == []
    overlay.write(8 * BLOCK, [memoryview(b"a" * BLOCK)])
    assert occupied(tmp_path / "active.data") == 2 * BLOCK
    assert content(overlay) == changed((8 * BLOCK, b"a" * BLOCK))


def test_overlay_slots_given_back_in_any_order_serve_stores_of_several_blocks(
    overlay: Overlay, tmp_path: Path
) -> None:
    data = memoryview(OLD)[: 2 * BLOCK]
    for _ in range(30):
        for offset in (0, 2 * BLOCK, 4 * BLOCK):
            overlay.store(offset, data)
        for offset in (2 * BLOCK, 0, 4 * BLOCK):
            overlay.abandon(offset, len(data))
    assert occupied(tmp_path / "active.data") == 6 * BLOCK


def test_overlay_limit_counts_what_is_stored_and_not_marked(below: Memory, tmp_path: Path) -> None:
    overlay = Overlay.create("hidden", tmp_path / "hidden", below, limit=2 * BLOCK)
    overlay.store(0, memoryview(OLD)[: 2 * BLOCK])
    with pytest.raises(Error, match="reached its limit"):
        overlay.store(4 * BLOCK, memoryview(OLD)[4 * BLOCK : 5 * BLOCK])
    overlay.abandon(0, 2 * BLOCK)
    overlay.store(4 * BLOCK, memoryview(OLD)[4 * BLOCK : 5 * BLOCK])


@pytest.mark.parametrize("call", ["write", "zero a part", "save", "store"])
def test_overlay_on_a_full_filesystem_asks_for_space_once(below: Memory, tmp_path: Path, call: str) -> None:
    asked = []

    def make_space() -> bool:
        asked.append(call)
        return len(asked) == 1

    overlay = Overlay.create("active", tmp_path / "active", below, make_space=make_space)
    overlay.data = faults = Faults(overlay.data)
    calls: dict[str, Callable[[], Any]] = {
        "write": lambda: overlay.write(BLOCK, [memoryview(b"n" * BLOCK)]),
        "zero a part": lambda: overlay.zero(BLOCK, 100),
        "save": lambda: overlay.save(BLOCK, memoryview(OLD)[BLOCK : 2 * BLOCK]),
        "store": lambda: overlay.store(BLOCK, memoryview(OLD)[BLOCK : 2 * BLOCK]),
    }
    faults.fail("write", Kind.NO_SPACE, count=1)
    calls[call]()
    assert len(asked) == 1
    faults.fail("write", Kind.NO_SPACE, count=1)
    with pytest.raises(Error):
        overlay.write(7 * BLOCK, [memoryview(b"n")])
    assert len(asked) == 2
    assert runs(overlay)[1:] == []


@pytest.mark.parametrize("call", ["zero", "discard"])
def test_overlay_zeroing_where_the_map_finds_no_space_asks_for_some(
    below: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def make_space() -> bool:
        monkeypatch.undo()
        return True

    def full(*_: object) -> None:
        raise Error(Kind.NO_SPACE, "the filesystem is full")

    overlay = Overlay.create("active", tmp_path / "active", below, make_space=make_space)
    monkeypatch.setattr(overlay.map.file.node, "write", full)
    getattr(overlay, call)(BLOCK, 2 * BLOCK)
    assert content(overlay) == changed((BLOCK, bytes(2 * BLOCK)))


@pytest.mark.parametrize("seed", range(10))
def test_overlay_random_work_in_scattered_slots_is_as_a_plain_disk(
    below: Memory, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    overlay = Overlay.create("active", tmp_path / "active", below)
    model = bytearray(OLD)
    for _ in range(120):
        offset = rng.randrange(LENGTH)
        length = min(rng.choice([1, 700, BLOCK, 3 * BLOCK, LENGTH]), LENGTH - offset)
        action = rng.choice(["write", "write", "write", "zero", "discard", "reopen", "trim"])
        if action == "write":
            data = rng.randbytes(length)
            overlay.write(offset, [memoryview(data)[: length // 2], memoryview(data)[length // 2 :]])
            model[offset : offset + length] = data
        elif action == "zero":
            overlay.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        elif action == "discard":
            overlay.discard(offset, length)
            first, last = -(-offset // BLOCK) * BLOCK, (offset + length) // BLOCK * BLOCK
            last = LENGTH if offset + length == LENGTH else last
            model[first:last] = bytes(max(0, last - first))
        elif action == "trim":
            overlay.trim()
        else:
            overlay.close()
            overlay = Overlay("active", tmp_path / "active", below)
        assert content(overlay) == model
    assert overlay.stored_bytes <= occupied(tmp_path / "active.data") + BLOCK


# Files that are not what they should be.


def corrupt(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "not finished": (lambda p: corrupt(p / "active.map", 0, bytes(64)), "not finished"),
    "empty map": (lambda p: os.truncate(p / "active.map", 0), "not finished"),
    "foreign": (lambda p: corrupt(p / "active.map", 0, b"QFI\xfb"), "something else"),
    "damaged header": (lambda p: corrupt(p / "active.map", 17, b"\xff"), "damaged header"),
    "cut map": (lambda p: os.truncate(p / "active.map", 8191), "8191 bytes instead of 8192"),
    "longer map": (lambda p: os.truncate(p / "active.map", 1 << 20), "instead of 8192"),
    "slot beyond the data": (lambda p: corrupt(p / "active.map", 4096 + 4 * 3, b"\x0c"), "in 12 slots"),
    "two blocks in a slot": (
        lambda p: corrupt(p / "active.map", 4096 + 4 * 3, b"\x02"),
        "3 blocks in 2 slots",
    ),
    "no slot": (
        lambda p: corrupt(p / "active.map", 4096 + 4 * 3, b"\xff\xff\xff\x3f"),
        "3 blocks in 2 slots",
    ),
    "not flushed and no slot": (
        lambda p: corrupt(p / "active.map", 4096 + 4 * 3, b"\0\0\0\x40"),
        "without a slot",
    ),
    "beyond the end": (lambda p: corrupt(p / "active.map", 4096 + 4 * 10, b"\x01"), "beyond the end"),
    "cut data": (lambda p: os.truncate(p / "active.data", BLOCK), "has 4096 bytes"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_overlay_refuses_bad_files_and_lets_go_of_them(
    overlay: Overlay, below: Memory, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    overlay.write(5 * BLOCK, [memoryview(b"n" * 2 * BLOCK)])
    overlay.close()
    damage(tmp_path)
    for _ in range(2):
        with pytest.raises(Error, match=message) as caught:
            Overlay("active", tmp_path / "active", below)
        assert caught.value.kind is Kind.BAD_CONFIG
        assert str(tmp_path / "active") in str(caught.value)


def test_overlay_refuses_another_version_and_another_length(
    overlay: Overlay, below: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay.close()
    with pytest.raises(Error, match=f"for a disk of {LENGTH} bytes, not of {LENGTH - 1}"):
        Overlay("active", tmp_path / "active", Memory(LENGTH - 1))
    monkeypatch.setattr(map_format, "VERSION", 4)
    with pytest.raises(Error, match="has version 3"):
        Overlay("active", tmp_path / "active", below)


def test_overlay_missing_or_in_use(overlay: Overlay, below: Memory, tmp_path: Path) -> None:
    for path, kind in (("active", Kind.CONFLICT), ("other", Kind.NOT_FOUND)):
        with pytest.raises(Error) as caught:
            Overlay("active", tmp_path / path, below)
        assert caught.value.kind is kind
    overlay.close()
    (tmp_path / "active.data").unlink()
    with pytest.raises(Error) as caught:
        Overlay("active", tmp_path / "active", below)
    assert caught.value.kind is Kind.NOT_FOUND


@pytest.mark.parametrize("suffix", ["data", "map"])
def test_overlay_create_touches_nothing_that_exists(below: Memory, tmp_path: Path, suffix: str) -> None:
    precious = tmp_path / f"active.{suffix}"
    precious.write_bytes(b"precious")
    with pytest.raises(Error) as caught:
        Overlay.create("active", tmp_path / "active", below)
    assert caught.value.kind is Kind.CONFLICT
    assert precious.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [precious]


@pytest.mark.parametrize("suffix", ["data", "map"])
def test_overlay_is_not_opened_through_a_link(
    overlay: Overlay, below: Memory, tmp_path: Path, suffix: str
) -> None:
    """S5."""
    overlay.release()
    (tmp_path / f"active.{suffix}").rename(tmp_path / "elsewhere")
    (tmp_path / f"active.{suffix}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Error, match=f"active.{suffix}, which is a symbolic link") as caught:
        Overlay("active", tmp_path / "active", below)
    assert caught.value.kind is Kind.BAD_CONFIG


def test_overlay_does_not_recycle_what_a_link_names(below: Memory, tmp_path: Path) -> None:
    """S5: the link goes, what it names is as it was."""
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "spare").symlink_to(tmp_path / "precious")
    with pytest.raises(Error, match="symbolic link"):
        Overlay.create("active", tmp_path / "active", below, recycled=tmp_path / "spare")
    assert list(tmp_path.iterdir()) == [tmp_path / "precious"]
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("call", ["ftruncate", "pwrite", "open"])
@pytest.mark.parametrize("which", [0, 1])
def test_overlay_create_that_fails_leaves_nothing_behind(
    below: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, which: int
) -> None:
    real = getattr(os, call)
    calls = []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == which + 1:
            raise OSError(errno.ENOSPC, "full")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(Error) as caught:
        Overlay.create("active", tmp_path / "active", below)
    assert caught.value.kind is Kind.NO_SPACE
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    Overlay.create("active", tmp_path / "active", below).destroy()


def test_overlay_destroy_leaves_what_lies_below_open(overlay: Overlay, tmp_path: Path) -> None:
    disk = File(make_image(tmp_path / "disk", BLOCK))
    upper = Overlay.create("upper", tmp_path / "upper", disk)
    upper.destroy()
    upper.destroy()
    assert bytes(disk.fetch(0, 1)) == b"\0"
    disk.close()


@pytest.mark.parametrize("end", ["destroy", "retire"])
def test_overlay_map_is_empty_before_it_is_unmapped_for_good(
    overlay: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    overlay.write(0, [memoryview(b"a" * BLOCK)])
    path, sizes = Path(f"{overlay.path}.map"), []
    monkeypatch.setattr(overlay.data, "close", lambda: sizes.append(path.stat().st_size))  # the next step
    overlay.destroy() if end == "destroy" else overlay.retire(tmp_path / "spare")
    assert sizes == [0]
    assert not path.exists()


def test_overlay_closed_keeps_its_map(overlay: Overlay) -> None:
    overlay.write(0, [memoryview(b"a" * BLOCK)])
    before = Path(f"{overlay.path}.map").read_bytes()
    overlay.release()
    assert Path(f"{overlay.path}.map").read_bytes() == before


# No space.


def test_overlay_limit_fails_the_write_and_keeps_the_content(below: Memory, tmp_path: Path) -> None:
    overlay = Overlay.create("active", tmp_path / "active", below, limit=2 * BLOCK)
    overlay.write(0, [memoryview(b"a" * BLOCK)])
    with pytest.raises(Error, match="reached its limit of 8 KiB") as caught:
        overlay.write(BLOCK, [memoryview(b"b" * 2 * BLOCK)])
    assert caught.value.kind is Kind.NO_SPACE
    assert content(overlay) == changed((0, b"a" * BLOCK))
    overlay.write(100, [memoryview(b"c" * BLOCK)])
    overlay.zero(0, LENGTH)
    assert content(overlay) == bytes(LENGTH)
    overlay.close()


@pytest.mark.parametrize("torn_after", [0, 100, BLOCK, BLOCK + 100])
def test_overlay_full_filesystem_under_the_data(overlay: Overlay, torn_after: int) -> None:
    overlay.zero(2 * BLOCK, BLOCK)
    overlay.data = faults = Faults(overlay.data)
    rule = faults.fail("write", Kind.NO_SPACE, count=1, torn_after=torn_after)
    with pytest.raises(Error) as caught:
        overlay.write(BLOCK - 1, [memoryview(b"n" * (3 * BLOCK + 2))])
    assert caught.value.kind is Kind.NO_SPACE
    assert rule.met == 1
    assert content(overlay) == changed((2 * BLOCK, bytes(BLOCK)))
    overlay.write(BLOCK - 1, [memoryview(b"n" * (3 * BLOCK + 2))])
    assert content(overlay) == changed((BLOCK - 1, b"n" * (3 * BLOCK + 2)))


def test_overlay_full_filesystem_under_the_map_is_an_error_and_no_death(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)
    for call in (
        lambda: overlay.write(0, [memoryview(b"n" * BLOCK)]),
        lambda: overlay.zero(0, BLOCK),
        lambda: overlay.save(0, memoryview(bytes(BLOCK))),
    ):
        with pytest.raises(Error) as caught:
            call()
        assert caught.value.kind is Kind.NO_SPACE
    monkeypatch.undo()
    assert content(overlay) == OLD
    overlay.zero(0, BLOCK)
    assert content(overlay) == changed((0, bytes(BLOCK)))


def test_overlay_on_a_filesystem_that_is_really_full(below: Memory, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine mounts no tmpfs ({mounted.stderr.strip()})")
    try:
        overlay = Overlay.create("active", folder / "active", below)
        overlay.write(0, [memoryview(b"n" * BLOCK)])
        filler = open(folder / "filler", "wb", buffering=0)  # noqa: SIM115
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(BLOCK))
        expected = changed((0, b"n" * BLOCK))
        for call in (
            lambda: overlay.write(BLOCK + 5, [memoryview(b"x")]),
            lambda: overlay.save(BLOCK, memoryview(OLD)[BLOCK : 3 * BLOCK]),
            lambda: Overlay.create("other", folder / "other", below),
        ):
            with pytest.raises(Error) as caught:
                call()
            assert caught.value.kind is Kind.NO_SPACE
            assert content(overlay) == expected
        assert sorted(path.name for path in folder.iterdir()) == ["active.data", "active.map", "filler"]
        filler.truncate(0)
        filler.close()
        overlay.write(BLOCK + 5, [memoryview(b"x")])
        assert content(overlay) == changed((0, b"n" * BLOCK), (BLOCK + 5, b"x"))
        overlay.destroy()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# Reads that take their time.


@pytest.mark.parametrize("torn_after", [0, 50, BLOCK + 50])
def test_overlay_read_below_overtaken_by_a_save_is_of_one_time(
    below: Memory, tmp_path: Path, torn_after: int
) -> None:
    slow = Faults(below)
    hidden = Overlay.create("hidden", tmp_path / "hidden", slow)
    active = Overlay.create("active", tmp_path / "active", hidden)
    active.write(3 * BLOCK, [memoryview(b"a")])
    rule = slow.delay("read", torn_after=torn_after)
    into = [memoryview(bytearray(1000)), memoryview(bytearray(LENGTH - 1000))]
    pending = active.read(0, into)
    assert pending is not None
    hidden.save(BLOCK, memoryview(OLD)[BLOCK : 3 * BLOCK])
    hidden.save(5 * BLOCK, memoryview(OLD)[5 * BLOCK : 6 * BLOCK])
    below.write(BLOCK, [memoryview(b"n" * 2 * BLOCK)])
    below.write(5 * BLOCK, [memoryview(b"n" * BLOCK)])
    assert not pending.done
    rule.release()
    assert pending.done
    assert pending.error is None
    assert b"".join(into) == changed((3 * BLOCK, b"a"))
    active.close()


def test_overlay_read_of_two_runs_fails_once_both_have_ended(overlay: Overlay, below: Memory) -> None:
    overlay.child = slow = Faults(below)
    overlay.write(0, [memoryview(b"a" * BLOCK)])
    rule = slow.delay("read")
    overlay.data = broken = Faults(overlay.data)
    broken.fail("read")
    pending = overlay.read(BLOCK - 1, [memoryview(bytearray(2))])
    assert pending is not None
    assert not pending.done, "the caller's buffer is still in use"
    rule.release()
    assert pending.error is not None


def test_overlay_flush_makes_the_data_durable_before_the_map(below: Memory, tmp_path: Path) -> None:
    offload = HeldOffload()
    overlay = Overlay.create("active", tmp_path / "active", below, offload=offload)
    for ask in (overlay.flush, lambda: overlay.write(0, [memoryview(b"x")], True)):
        pending = ask()
        assert pending is not None
        assert [doing for _, doing, _ in offload.calls] == [f"flush {tmp_path}/active.data"]
        offload.run_next()
        assert [doing for _, doing, _ in offload.calls] == [f"flush {tmp_path}/active.map"]
        assert not pending.done
        offload.run_next()
        assert pending.done
    overlay.close()


@pytest.mark.parametrize("seed", range(6))
def test_held_runs_of_two_overlays(tmp_path, seed):
    rng = random.Random(seed)
    length = 40 * MiB + 512
    disk = Memory(length)
    lower = Overlay.create("lower", tmp_path / "lower", disk)
    upper = Overlay.create("upper", tmp_path / "upper", lower)
    expected = {}
    for overlay in (lower, upper):
        for _ in range(60):
            block = rng.randrange(length // BLOCK + 1)
            offset = block * BLOCK
            size = min(rng.choice([1, 2, 40]) * BLOCK, length - offset)
            zero = rng.random() < 0.3
            overlay.zero(offset, size) if zero else overlay.write(offset, [memoryview(b"d" * size)])
            for at in range(offset, offset + size, BLOCK):
                # What upper holds counts.
                expected[at] = zero
    since = rng.randrange(length // BLOCK) * BLOCK
    found = {}
    before = since
    for start, size, zero in held_runs(upper, lower, since):
        assert start >= before
        before = start + size
        assert size > 0
        assert before <= length
        for at in range(start, before, BLOCK):
            found[at] = zero
    assert found == {at: zero for at, zero in expected.items() if at >= since}
