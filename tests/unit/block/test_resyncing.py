"""The filter while parts of the peer are dirty: what is forwarded, and when a block is clean."""

from __future__ import annotations

import pytest

from tcmu_replication.block.dirty import Dirty
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.resyncing import Resyncing
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import BLOCK
from tests.support.dirty_marks import DirtyMarks
from tests.support.slow_disk import LINK_LOST, SlowDisk

LENGTH = 16 * BLOCK
EIO = Error(Kind.IO, "the peer's disk is broken")


class Site:
    """A filter above a peer that waits for the test; `told` is what the engine hears."""

    def __init__(self) -> None:
        self.peer = SlowDisk(LENGTH, name="peer")
        self.peer.slow = True
        self.marks = DirtyMarks(LENGTH)
        self.dirty = Dirty(self.marks, LENGTH)
        self.told: list[tuple[int, int]] = []
        self.filter = Resyncing("replication", self.peer, self.missed, self.dirty)

    def missed(self, offset: int, length: int, error: Error) -> bool:
        self.told.append((offset, length))
        self.dirty.mark(offset, length)
        return True

    @property
    def waiting(self) -> list[tuple[int, int]]:
        return [(call.offset, call.length) for call in self.peer.waiting]


@pytest.fixture
def site() -> Site:
    return Site()


def data(length: int, byte: int = 1) -> list[memoryview]:
    return [memoryview(bytes([byte]) * length)]


def test_write_to_clean_blocks_is_forwarded_as_it_is(site: Site) -> None:
    site.dirty.mark(8 * BLOCK, BLOCK)
    pending = site.filter.write(100, data(BLOCK))
    assert site.waiting == [(100, BLOCK)]
    site.peer.end(0)
    assert pending is not None
    assert pending.done
    assert site.marks.dirty == {8}


@pytest.mark.parametrize("call", ["write", "zero"])
def test_whole_dirty_blocks_are_clean_when_the_peer_has_them_and_not_before(site: Site, call: str) -> None:
    site.dirty.mark(0, 4 * BLOCK)
    length = 2 * BLOCK
    pending = site.filter.write(BLOCK, data(length)) if call == "write" else site.filter.zero(BLOCK, length)
    assert pending is not None
    assert site.marks.dirty == {0, 1, 2, 3}
    site.peer.end(0)
    assert pending.done
    assert site.marks.dirty == {0, 3}


def test_block_is_clean_before_the_write_is_acknowledged(site: Site) -> None:
    site.dirty.mark(0, BLOCK)
    pending = site.filter.write(0, data(BLOCK))
    seen: list[set[int]] = []
    assert pending is not None
    pending.then(lambda _: seen.append(set(site.marks.dirty)))
    site.peer.end(0)
    assert seen == [set()]


def test_part_of_a_dirty_block_is_not_forwarded_and_stays_dirty(site: Site) -> None:
    site.dirty.mark(0, BLOCK)
    assert site.filter.write(512, data(512)) is None
    assert site.waiting == []
    assert site.marks.dirty == {0}


def test_write_over_parts_of_two_dirty_blocks_sends_what_lies_between(site: Site) -> None:
    site.dirty.mark(0, 3 * BLOCK)
    content = bytes(range(256)) * (2 * BLOCK // 256)
    pending = site.filter.write(BLOCK // 2, [memoryview(content[:100]), memoryview(content[100:])], fua=False)
    assert site.waiting == [(BLOCK, BLOCK)]
    site.peer.end(0)
    assert pending is not None
    assert bytes(site.peer.data[BLOCK : 2 * BLOCK]) == content[BLOCK // 2 :][:BLOCK]
    assert site.marks.dirty == {0, 2}


def test_part_of_a_block_that_is_being_sent_follows_it(site: Site) -> None:
    site.dirty.mark(0, BLOCK)
    sweep = site.dirty.sweep_blocks(0, 1)
    site.filter.resend([(0, BLOCK, memoryview(b"r" * BLOCK))])
    site.filter.write(0, data(512, ord("w")))
    assert site.waiting == [(0, BLOCK), (0, 512)]
    site.peer.end(0)
    site.dirty.arrived(sweep)
    site.peer.end(0)
    assert site.peer.data[:BLOCK] == b"w" * 512 + b"r" * (BLOCK - 512)
    assert site.marks.dirty == set()


def test_part_behind_a_block_that_failed_does_not_make_it_clean(site: Site) -> None:
    site.dirty.mark(0, 2 * BLOCK)
    sweep = site.dirty.sweep_blocks(0, 1)
    site.filter.resend([(0, BLOCK, memoryview(b"r" * BLOCK))])
    site.filter.write(512, data(2 * BLOCK - 512))  # the rest of it, and all of the next
    site.peer.end(0, EIO)
    site.dirty.failed(sweep)
    site.peer.end(0)
    assert site.marks.dirty == {0}


@pytest.mark.parametrize("error", [EIO, Error(Kind.NO_SPACE, "full"), LINK_LOST])
def test_write_that_fails_leaves_its_blocks_dirty_before_it_is_acknowledged(site: Site, error: Error) -> None:
    site.dirty.mark(0, BLOCK)
    pending = site.filter.write(0, data(2 * BLOCK))
    assert pending is not None
    seen: list[set[int]] = []
    pending.then(lambda _: seen.append(set(site.marks.dirty)))
    site.peer.end(0, error, torn=BLOCK + 5)
    assert pending.error is None
    assert seen == [{0, 1}]
    assert site.told == [(0, 2 * BLOCK)]
    assert site.filter.gap is error


def test_write_that_is_refused_at_once_leaves_its_blocks_dirty(site: Site) -> None:
    site.dirty.mark(0, BLOCK)
    site.peer.lost = LINK_LOST
    assert site.filter.write(0, data(2 * BLOCK)) is None
    assert site.marks.dirty == {0, 1}
    assert site.filter.gap is LINK_LOST


def test_write_behind_one_that_cleans_and_fails_leaves_the_block_dirty(site: Site) -> None:
    """The first arrives after the second was refused: what it sends is older than what was acknowledged."""
    site.dirty.mark(0, BLOCK)
    first = site.filter.write(0, data(BLOCK, 1))
    site.peer.refuses = Error(Kind.UNALIGNED, "whole blocks only")
    assert site.filter.write(0, data(512, 2)) is None
    site.peer.end(0)
    assert first is not None
    assert first.done
    assert site.marks.dirty == {0}


def test_gap_that_opens_spoils_what_is_under_way(site: Site) -> None:
    site.dirty.mark(0, 2 * BLOCK)
    site.filter.write(0, data(BLOCK))
    site.filter.gap = Error(Kind.CONFLICT, "the peer lost power")
    site.peer.end(0)
    assert site.marks.dirty == {0, 1}


def test_in_a_gap_nothing_is_forwarded_and_everything_marked(site: Site) -> None:
    site.filter.gap = LINK_LOST
    assert site.filter.write(0, data(BLOCK)) is None
    assert site.filter.zero(4 * BLOCK, 2 * BLOCK) is None
    with pytest.raises(Error):
        site.filter.resend([(0, BLOCK, None)])
    with pytest.raises(Error):
        site.filter.flush_resent()
    assert site.waiting == []
    assert site.marks.dirty == {0, 4, 5}


def test_write_is_forwarded_as_soon_as_the_gap_is_closed(site: Site) -> None:
    site.filter.gap = LINK_LOST
    site.filter.write(0, data(BLOCK))
    site.filter.gap = None
    site.filter.write(0, data(BLOCK))
    assert site.waiting == [(0, BLOCK)]
    site.peer.end(0)
    assert site.marks.dirty == set()


def test_parts_that_are_sent_again_end_together_with_the_first_error(site: Site) -> None:
    pending = site.filter.resend([(0, BLOCK, None), (2 * BLOCK, 5, memoryview(b"55555"))])
    assert [(call.name, call.offset, call.length) for call in site.peer.waiting] == [
        ("zero", 0, BLOCK),
        ("write", 2 * BLOCK, 5),
    ]
    assert pending is not None
    site.peer.end(0, EIO)
    assert not pending.done
    site.peer.end(0)
    assert pending.error is EIO


def test_flush_of_what_was_resent_tells_of_its_failure(site: Site) -> None:
    pending = site.filter.flush_resent()
    assert pending is not None
    site.peer.end(0, EIO)
    assert pending.error is EIO
    assert site.filter.gap is EIO


def test_flush_that_the_link_lost_opens_no_gap_but_is_told(site: Site) -> None:
    pending = site.filter.flush_resent()
    assert pending is not None
    site.peer.end(0, LINK_LOST)
    assert pending.error is LINK_LOST
    assert site.filter.gap is None


def test_map_that_cannot_be_written_leaves_the_block_dirty(site: Site, monkeypatch) -> None:
    def full(first: int, last: int) -> None:
        raise Error(Kind.NO_SPACE)

    site.dirty.mark(0, BLOCK)
    monkeypatch.setattr(site.marks, "clear", full)
    pending = site.filter.write(0, data(BLOCK))
    site.peer.end(0)
    assert pending is not None
    assert pending.error is None
    assert site.marks.dirty == {0}


def test_watcher_hears_of_a_writes_beginning_and_end(site: Site) -> None:
    heard: list[str] = []

    def watcher():
        heard.append("begins")
        return lambda _: heard.append("ends")

    site.filter.watcher = watcher
    site.filter.write(0, data(BLOCK))
    assert heard == ["begins"]
    site.peer.end(0)
    assert heard == ["begins", "ends"]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "later"])
def test_write_that_the_local_disk_fails_makes_nothing_clean(site: Site, late: bool) -> None:
    """The peer would have what this disk has not."""
    disk = SlowDisk(LENGTH, name="disk")
    disk.slow = late
    mirror = Mirror("mirror", disk, report=lambda f: f.final and site.dirty.mark(f.offset, f.length))
    mirror.attach(site.filter, site.peer)
    site.dirty.mark(0, BLOCK)
    if late:
        pending = mirror.write(0, data(BLOCK))
        disk.end(0, EIO)
        site.peer.end(0)
        assert pending is not None
        assert pending.error is EIO
    else:
        disk.refuses = EIO
        with pytest.raises(Error):
            mirror.write(0, data(BLOCK))
        assert site.waiting == []
    assert site.marks.dirty == {0}
