"""The dirty map's three states: clean, dirty, swept; and what spoils a sweep."""

from __future__ import annotations

import pytest

from tcmu_replication.block.dirty import Dirty
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK
from tests.support.dirty_marks import DirtyMarks

LENGTH = 8 * BLOCK + 100


@pytest.fixture
def marks() -> DirtyMarks:
    return DirtyMarks(LENGTH)


@pytest.fixture
def dirty(marks: DirtyMarks) -> Dirty:
    return Dirty(marks, LENGTH)


def test_mark_touches_every_block_of_its_range(dirty: Dirty, marks: DirtyMarks) -> None:
    dirty.mark(BLOCK - 1, 2)
    dirty.mark(LENGTH - 1, 1)
    dirty.mark(4 * BLOCK, 0)
    assert marks.dirty == {0, 1, 8}
    assert dirty.bytes == 2 * BLOCK + 100


def test_sweep_that_arrived_makes_clean_and_is_counted(dirty: Dirty, marks: DirtyMarks) -> None:
    dirty.mark(0, LENGTH)
    dirty.arrived(dirty.sweep_blocks(2, 9))
    assert marks.dirty == {0, 1}
    assert dirty.cleaned == 6 * BLOCK + 100


def test_sweep_that_failed_leaves_all_dirty(dirty: Dirty, marks: DirtyMarks) -> None:
    dirty.mark(0, 2 * BLOCK)
    dirty.failed(dirty.sweep_blocks(0, 2))
    assert marks.dirty == {0, 1}
    assert dirty.cleaned == 0


def test_block_marked_while_it_was_swept_stays_dirty(dirty: Dirty, marks: DirtyMarks) -> None:
    dirty.mark(0, 4 * BLOCK)
    sweep = dirty.sweep_blocks(0, 4)
    dirty.mark(BLOCK + 5, BLOCK)
    dirty.arrived(sweep)
    assert marks.dirty == {1, 2}


def test_mark_that_fails_spoils_all_the_same(dirty: Dirty, marks: DirtyMarks, monkeypatch) -> None:
    def full(first: int, last: int) -> None:
        raise Error(Kind.NO_SPACE)

    dirty.mark(0, BLOCK)
    sweep = dirty.sweep_blocks(0, 1)
    monkeypatch.setattr(marks, "mark", full)
    with pytest.raises(Error):
        dirty.mark(0, BLOCK)
    dirty.arrived(sweep)
    assert marks.dirty == {0}


def test_everything_spoiled_makes_nothing_clean(dirty: Dirty, marks: DirtyMarks) -> None:
    dirty.mark(0, 3 * BLOCK)
    sweeps = [dirty.sweep_blocks(0, 2), dirty.sweep_blocks(1, 3)]
    dirty.spoil_all()
    for sweep in sweeps:
        dirty.arrived(sweep)
    assert marks.dirty == {0, 1, 2}


@pytest.mark.parametrize(
    ("write", "sent"),
    [
        pytest.param((0, BLOCK), (0, BLOCK), id="a whole dirty block"),
        pytest.param((512, 1024), None, id="within a dirty block"),
        pytest.param((0, 512), None, id="the beginning of a dirty block"),
        pytest.param((BLOCK - 512, BLOCK), None, id="the end of a dirty block"),
        pytest.param((512, 2 * BLOCK + 512), (BLOCK, 2 * BLOCK), id="two parts and a whole one"),
        pytest.param((3 * BLOCK + 1, 3 * BLOCK + 2), (3 * BLOCK + 1, 3 * BLOCK + 2), id="in a clean block"),
        pytest.param((2 * BLOCK + 1, 3 * BLOCK + 1), (3 * BLOCK, 3 * BLOCK + 1), id="dirty before clean"),
        pytest.param((3 * BLOCK + 1, 4 * BLOCK + 1), (3 * BLOCK + 1, 4 * BLOCK), id="clean before dirty"),
        pytest.param((8 * BLOCK, LENGTH), (8 * BLOCK, LENGTH), id="all of the short last block"),
        pytest.param((8 * BLOCK + 1, LENGTH), None, id="a part of the short last block"),
        pytest.param((8 * BLOCK, LENGTH - 1), None, id="its beginning"),
    ],
)
def test_parts_of_dirty_blocks_are_not_sent(dirty: Dirty, write, sent) -> None:
    dirty.mark(0, 3 * BLOCK)
    dirty.mark(4 * BLOCK, LENGTH - 4 * BLOCK)
    start, end = dirty.sent_part(*write)
    assert (start, end) == sent if sent else start == end


def test_part_of_a_swept_block_is_sent_unless_the_sweep_is_spoiled_there(dirty: Dirty) -> None:
    dirty.mark(0, 2 * BLOCK)
    sweep = dirty.sweep_blocks(0, 2)
    dirty.mark(BLOCK, 1)
    assert dirty.sent_part(1, 2) == (1, 2)
    assert dirty.sent_part(BLOCK + 1, BLOCK + 2)[0] == dirty.sent_part(BLOCK + 1, BLOCK + 2)[1]
    dirty.failed(sweep)
    start, end = dirty.sent_part(1, 2)
    assert start == end


@pytest.mark.parametrize(
    ("write", "swept"),
    [
        pytest.param((0, BLOCK), (0, 1), id="one block"),
        pytest.param((1, 3 * BLOCK - 1), (1, 2), id="only whole blocks"),
        pytest.param((1, BLOCK), None, id="no whole block"),
        pytest.param((4 * BLOCK, 6 * BLOCK), None, id="nothing dirty"),
        pytest.param((7 * BLOCK, LENGTH), (7, 9), id="to the short end of the disk"),
    ],
)
def test_write_sweeps_the_whole_blocks_that_it_covers(dirty: Dirty, write, swept) -> None:
    dirty.mark(0, 3 * BLOCK)
    dirty.mark(8 * BLOCK, 1)
    sweep = dirty.sweep(*write)
    assert swept == (None if sweep is None else (sweep.first, sweep.last))
