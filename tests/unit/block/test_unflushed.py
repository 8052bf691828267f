"""Marks that are not flushed: when they come, when they go, and what another boot makes of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tcmu_replication.block import boot, map_format, unflushed
from tcmu_replication.block.faults import Faults
from tcmu_replication.block.map_file import MapFile
from tcmu_replication.block.map_format import NEW, NOWHERE, OVER_ZERO, PAGE, PER_PAGE, ZERO_FLAG
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import HeldOffload

BLOCK = 4096
BLOCKS = 3 * PER_PAGE
OLD = 0x11


@pytest.fixture
def below() -> Memory:
    memory = Memory(BLOCKS * BLOCK)
    memory.data[: 16 * BLOCK] = bytes([OLD]) * (16 * BLOCK)
    return memory


@pytest.fixture
def overlay(below: Memory, tmp_path: Path) -> Overlay:
    return Overlay.create("active", tmp_path / "active", below)


@pytest.fixture
def held(below: Memory, tmp_path: Path) -> tuple[Overlay, HeldOffload]:
    """An overlay whose syncs end when the test says so."""
    offload = HeldOffload()
    return Overlay.create("active", tmp_path / "active", below, offload=offload), offload


def write(overlay: Overlay, first: int, count: int = 1, byte: int = 0x22) -> None:
    overlay.write(first * BLOCK, [memoryview(bytes([byte]) * count * BLOCK)])


def entries(overlay: Overlay, first: int = 0, count: int = 4) -> list[int]:
    return overlay.map.entries(first, first + count)


def flushed(overlay: Overlay) -> None:
    assert overlay.flush() is None


def reopened(overlay: Overlay, below: Memory) -> Overlay:
    overlay.release()
    return Overlay("active", overlay.path, below)


# When marks come.


def test_write_marks_an_absent_block_as_new_until_it_is_flushed(overlay: Overlay) -> None:
    write(overlay, 1, 2)
    assert entries(overlay) == [0, NEW + 1, NEW + 2, 0]
    write(overlay, 1, 2)
    overlay.write(BLOCK + 7, [memoryview(b"x")])
    assert entries(overlay) == [0, NEW + 1, NEW + 2, 0], "a rewrite changes nothing"
    flushed(overlay)
    assert entries(overlay) == [0, 1, 2, 0]
    write(overlay, 1, 2)
    assert entries(overlay) == [0, 1, 2, 0], "what was flushed is overwritten in its place"


def test_write_marks_a_zero_block_so_that_it_can_be_zero_again(overlay: Overlay) -> None:
    overlay.zero(0, 2 * BLOCK)
    write(overlay, 1)
    overlay.write(5, [memoryview(b"x")])
    assert entries(overlay) == [OVER_ZERO + 2, OVER_ZERO + 1, 0, 0]
    flushed(overlay)
    assert entries(overlay) == [2, 1, 0, 0]


def test_zero_of_a_new_block_keeps_its_slot_and_is_zero(overlay: Overlay) -> None:
    write(overlay, 0, 3)
    overlay.zero(BLOCK, BLOCK)
    assert entries(overlay) == [NEW + 1, ZERO_FLAG + 2, NEW + 3, 0]
    write(overlay, 1)
    assert entries(overlay) == [NEW + 1, OVER_ZERO + 2, NEW + 3, 0]
    flushed(overlay)
    assert entries(overlay) == [1, 2, 3, 0]


def test_write_across_all_kinds_marks_only_what_was_not_here(overlay: Overlay) -> None:
    write(overlay, 0)
    flushed(overlay)
    overlay.zero(2 * BLOCK, BLOCK)
    write(overlay, 3)
    write(overlay, 0, 6)
    assert entries(overlay, 0, 6) == [1, NEW + 3, OVER_ZERO + 4, NEW + 2, NEW + 5, NEW + 6]
    assert (overlay.stored_bytes, overlay.allocated_bytes) == (6 * BLOCK, 6 * BLOCK)
    flushed(overlay)
    assert entries(overlay, 0, 6) == [1, 3, 4, 2, 5, 6]


def test_pre_images_are_never_new(overlay: Overlay) -> None:
    data = memoryview(bytes([OLD]) * 2 * BLOCK)
    overlay.save(0, data)
    assert not overlay.store(2 * BLOCK, data)
    overlay.mark(2 * BLOCK, 2 * BLOCK, False)
    assert entries(overlay) == [1, 2, 3, 4]


def test_failed_write_marks_nothing(overlay: Overlay) -> None:
    overlay.zero(0, BLOCK)
    before = entries(overlay)
    overlay.data = faults = Faults(overlay.data)
    for count in (1, 3):
        faults.fail("write", Kind.NO_SPACE, count=1)
        with pytest.raises(Error):
            write(overlay, 0, count)
        assert entries(overlay) == before


# When they go.


def test_flush_covers_what_was_written_before_it_was_asked_for_and_no_more(
    held: tuple[Overlay, HeldOffload],
) -> None:
    overlay, offload = held
    write(overlay, 0)
    first = overlay.flush()
    write(overlay, 1)
    second = overlay.flush()  # shares a sync that begins when the first has ended
    write(overlay, 2)
    assert entries(overlay) == [NEW + 1, NEW + 2, NEW + 3, 0]
    offload.run_next()
    assert entries(overlay) == [1, NEW + 2, NEW + 3, 0]
    offload.run_all()
    assert first is not None
    assert second is not None
    assert (first.done, first.error, second.done, second.error) == (True, None, True, None)
    assert entries(overlay) == [1, 2, NEW + 3, 0]
    overlay.close()


CHANGES: dict[str, tuple[Callable[[Overlay], object], int]] = {
    "written again": (lambda o: write(o, 2), 3),
    "zeroed": (lambda o: o.zero(2 * BLOCK, BLOCK), ZERO_FLAG + 3),
    "zeroed and written": (lambda o: (o.zero(2 * BLOCK, BLOCK), write(o, 2)), OVER_ZERO + 3),
    "forgotten": (lambda o: o.forget(2 * BLOCK, BLOCK), 0),
    "forgotten and written": (lambda o: (o.forget(2 * BLOCK, BLOCK), write(o, 2)), NEW + 5),
}


@pytest.mark.parametrize("each", [True, False], ids=["one by one", "in one run"])
@pytest.mark.parametrize(("change", "entry"), CHANGES.values(), ids=CHANGES)
def test_flush_leaves_alone_what_has_changed_meanwhile(
    held: tuple[Overlay, HeldOffload], change: Callable[[Overlay], object], entry: int, each: bool
) -> None:
    overlay, offload = held
    for block in range(4) if each else ():
        write(overlay, block)
    if not each:
        write(overlay, 0, 4)
    overlay.flush()
    change(overlay)
    offload.run_next()
    assert entries(overlay) == [1, 2, entry, 4]
    overlay.flush()
    offload.run_all()
    assert entries(overlay)[2] == (entry if entry >= ZERO_FLAG else entry & NOWHERE)
    overlay.close()


def test_flush_whose_data_sync_fails_leaves_its_marks_to_the_next(overlay: Overlay) -> None:
    write(overlay, 0)
    overlay.data = faults = Faults(overlay.data)
    faults.fail("flush", count=1)
    with pytest.raises(Error):
        overlay.flush()
    assert entries(overlay) == [NEW + 1, 0, 0, 0]
    write(overlay, 1)
    flushed(overlay)
    assert entries(overlay) == [1, 2, 0, 0]


def test_flush_that_overtakes_one_that_fails_covers_that_ones_writes_too(overlay: Overlay) -> None:
    overlay.data = faults = Faults(overlay.data)
    slow = faults.delay("flush", count=1)
    write(overlay, 0)
    first = overlay.flush()
    assert first is not None
    write(overlay, 1)
    flushed(overlay)
    assert entries(overlay) == [1, 2, 0, 0]
    write(overlay, 2)
    slow.release()
    assert first.error is None
    assert entries(overlay) == [1, 2, NEW + 3, 0], "it was asked for before"


def test_flush_whose_map_sync_fails_fails(overlay: Overlay) -> None:
    write(overlay, 0)
    overlay.map.file.node = faults = Faults(overlay.map.file.node)  # type: ignore[assignment]
    faults.fail("flush", count=1)
    with pytest.raises(Error):
        overlay.flush()
    assert entries(overlay) == [1, 0, 0, 0], "its data is stable, whenever the mark gets there"
    flushed(overlay)


def test_fua_write_is_flushed_with_all_before_it(overlay: Overlay) -> None:
    write(overlay, 3)
    overlay.write(0, [memoryview(b"x" * BLOCK)], fua=True)
    assert entries(overlay) == [2, 0, 0, 1]


def test_flush_of_many_marks_lets_requests_pass(
    held: tuple[Overlay, HeldOffload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unflushed, "STEP", 2)
    overlay, offload = held
    for block in (4, 0, 2, 6):
        write(overlay, block)
    first = overlay.flush()
    offload.run_next()
    assert sum(entry >= NEW for entry in entries(overlay, 0, 7)) == 2
    write(overlay, 5)
    second = overlay.flush()
    overlay.zero(0, BLOCK)
    offload.run_all()
    assert first is not None
    assert second is not None
    assert (first.done, first.error, second.done, second.error) == (True, None, True, None)
    assert entries(overlay, 0, 7) == [ZERO_FLAG + 2, 0, 3, 0, 1, 5, 4]
    overlay.close()


def test_flush_of_very_many_marks_ends(
    held: tuple[Overlay, HeldOffload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unflushed, "STEP", 1)
    overlay, offload = held
    steps = sys.getrecursionlimit()
    for block in range(0, 2 * steps, 2):
        write(overlay, block)
    flushing = overlay.flush()
    offload.run_all()
    assert flushing is not None
    assert (flushing.done, flushing.error) == (True, None)
    assert entries(overlay, 2 * steps - 2, 1) == [steps]
    overlay.close()


def test_writes_that_nobody_flushes_are_flushed_by_one_of_many(
    held: tuple[Overlay, HeldOffload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unflushed, "MANY", 3)
    overlay, offload = held
    block = memoryview(b"x" * BLOCK)
    for _ in range(2):  # the same blocks, again and again
        overlay.zero(0, 2 * BLOCK)
        assert overlay.write(0, [block]) is None
        assert overlay.write(BLOCK, [block]) is None
        assert overlay.write(BLOCK, [block]) is None
        overlay.zero(8 * BLOCK + 512, 512)
        overlay.zero(0, BLOCK)
        flushing = overlay.write(0, [block])
        assert flushing is not None
        assert overlay.write(4 * BLOCK, [block]) is None, "others do not wait for it"
        assert entries(overlay, 0, 2) == [OVER_ZERO + 1, OVER_ZERO + 2]
        offload.run_all()
        assert (flushing.done, flushing.error) == (True, None)
        assert entries(overlay, 0, 2) == [1, 2]
        assert overlay.flush() is not None
        offload.run_all()
        overlay.forget(4 * BLOCK, 8 * BLOCK)
    overlay.close()


def test_zero_of_parts_starts_no_flush_that_nobody_waits_for(
    held: tuple[Overlay, HeldOffload], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unflushed, "MANY", 1)
    overlay, offload = held
    assert overlay.zero(512, 3 * BLOCK) is None
    assert not offload.calls
    assert overlay.write(0, [memoryview(b"x" * 512)]) is not None
    overlay.close()


def test_flush_of_a_run_over_pages_of_the_map(overlay: Overlay) -> None:
    write(overlay, PER_PAGE - 2, PER_PAGE + 4)
    overlay.zero(PER_PAGE * BLOCK, BLOCK)
    flushed(overlay)
    found = entries(overlay, PER_PAGE - 2, PER_PAGE + 4)
    assert found == [1, 2, ZERO_FLAG + 3, *range(4, PER_PAGE + 5)]


def test_close_while_the_data_is_synced_touches_the_map_no_more(held: tuple[Overlay, HeldOffload]) -> None:
    overlay, offload = held
    write(overlay, 0)
    overlay.flush()
    overlay.release()
    offload.run_next()
    assert Path(f"{overlay.path}.map").read_bytes()[PAGE : PAGE + 4] == (NEW + 1).to_bytes(4, "little")


# Another boot.


def another_boot(monkeypatch: pytest.MonkeyPatch, name: str = "another boot") -> None:
    monkeypatch.setattr(boot, "boot_id", lambda: name)


def test_open_in_another_boot_undoes_what_was_not_flushed(
    overlay: Overlay, below: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(overlay, 0)
    overlay.zero(BLOCK, 2 * BLOCK)
    write(overlay, 2)
    flushed(overlay)
    write(overlay, 0, 2, 0x33)
    write(overlay, 3, 2, 0x33)
    write(overlay, 2 * PER_PAGE, 1, 0x33)
    overlay.zero(PER_PAGE * BLOCK, BLOCK)
    write(overlay, PER_PAGE, 1, 0x33)
    another_boot(monkeypatch)
    overlay = reopened(overlay, below)
    assert entries(overlay, PER_PAGE) == [ZERO_FLAG + 7, 0, 0, 0], "alone in its page"
    overlay.forget(PER_PAGE * BLOCK, BLOCK)
    assert entries(overlay, 0, 5) == [1, ZERO_FLAG + 3, 2, 0, 0]
    assert entries(overlay, 2 * PER_PAGE) == [0, 0, 0, 0]
    assert (overlay.stored_bytes, overlay.allocated_bytes) == (2 * BLOCK, 3 * BLOCK)
    found = bytes(overlay.fetch(0, 5 * BLOCK))
    assert found == b"".join(bytes([byte]) * BLOCK for byte in (0x33, 0, 0x22, OLD, OLD))
    write(overlay, 3)
    assert entries(overlay, 3, 1) == [NEW + 8], "the slots behind the last that counts are free again"
    overlay.close()


def test_open_in_the_same_boot_keeps_what_was_not_flushed_and_flushes_it(
    overlay: Overlay, below: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay.zero(0, BLOCK)
    write(overlay, 0, 2)
    for _ in range(2):
        overlay = reopened(overlay, below)
        assert entries(overlay) == [OVER_ZERO + 1, NEW + 2, 0, 0]
    write(overlay, 2)
    flushed(overlay)
    another_boot(monkeypatch)
    overlay = reopened(overlay, below)
    assert entries(overlay) == [1, 2, 3, 0]
    overlay.close()


@pytest.mark.parametrize("died", [False, True])
def test_death_before_the_header_has_the_new_boot_is_made_good(
    overlay: Overlay, below: Memory, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    write(overlay, 0)
    path = Path(f"{overlay.path}.map")
    head = path.read_bytes()[:PAGE]
    another_boot(monkeypatch)
    overlay = reopened(overlay, below)
    write(overlay, 1)
    overlay.release()
    content = bytearray(path.read_bytes())
    assert content[:PAGE] == map_format.header(BLOCKS * BLOCK).ljust(PAGE, b"\0")
    if died:
        content[:PAGE] = head  # what was done since may be there or not
        content[PAGE : PAGE + 4] = (NEW + 1).to_bytes(4, "little")
    else:
        another_boot(monkeypatch, "a third")
    path.write_bytes(content)
    overlay = Overlay("active", overlay.path, below)
    assert entries(overlay) == [0, 0, 0, 0]
    overlay.close()


def test_death_while_marks_are_undone_leaves_the_header_as_it_was(
    overlay: Overlay, below: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(overlay, 0)
    write(overlay, PER_PAGE)
    another_boot(monkeypatch)
    undo = MapFile.rewrite

    def dies(self: MapFile, page: int, content: bytes) -> None:
        if page:
            raise Error(Kind.IO, "death")
        undo(self, page, content)

    with monkeypatch.context() as dying:
        dying.setattr(MapFile, "rewrite", dies)
        with pytest.raises(Error, match="death"):
            reopened(overlay, below)
    overlay = Overlay("active", overlay.path, below)
    assert entries(overlay, PER_PAGE) == [0, 0, 0, 0]
    overlay.close()


def test_open_in_another_boot_on_a_full_filesystem_fails_and_lets_go(
    overlay: Overlay, below: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(overlay, 0)
    overlay.release()
    before = Path(f"{overlay.path}.map").read_bytes()
    another_boot(monkeypatch)
    with monkeypatch.context() as full:
        full.setattr("os.pwritev", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(Error) as caught:
            Overlay("active", overlay.path, below)
        assert caught.value.kind is Kind.NO_SPACE
    assert Path(f"{overlay.path}.map").read_bytes() == before, "a store that finds no space kills the process"
    overlay = Overlay("active", overlay.path, below)
    assert entries(overlay) == [0, 0, 0, 0]
    overlay.close()


# What is read of them.


def test_reads_and_writes_over_flushed_and_new_blocks(overlay: Overlay) -> None:
    write(overlay, 0, 2, 1)
    flushed(overlay)
    write(overlay, 2, 2, 2)
    overlay.zero(5 * BLOCK, BLOCK)
    write(overlay, 5, 1, 3)
    expected = b"".join(bytes([byte]) * BLOCK for byte in (1, 1, 2, 2, OLD, 3))
    into = memoryview(bytearray(len(expected)))
    overlay.read(0, [into])
    assert bytes(into) == bytes(overlay.fetch(0, len(expected))) == expected
    overlay.write(100, [memoryview(b"x" * 5 * BLOCK)])
    expected = expected[:100] + b"x" * 5 * BLOCK + expected[100 + 5 * BLOCK :]
    overlay.read(0, [into])
    assert bytes(into) == expected
    assert [(o, n) for o, n, _ in overlay.allocated_runs()] == [(0, 6 * BLOCK)]
    assert [extent.zero for extent in overlay.extents(0, 7 * BLOCK)] == [False]
