"""The activity log: what passes and what waits, in which order, what leaves and when, and what bounds its cost."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_replication.block import activity_log
from tcmu_replication.block.activity_log import BURST_S, OVERDUE_S, SHARE, STREAM, TURN_S, ActivityLog
from tcmu_replication.block.hot_extents import EXTENT, PER_SECTOR, HotExtents, extents_of
from tcmu_replication.block.node import Node
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.units import TiB
from tests.unit.block.conftest import HeldOffload

EXTENTS = PER_SECTOR + 1000
LENGTH = EXTENTS * EXTENT - 4096
"""Two sectors of the file; the last extent is a part."""


class Below(Node):
    """What the log stands above: notes what it is asked for, and ends it at once or, with `later`, when told."""

    def __init__(self, length=LENGTH):
        super().__init__("below", length)
        self.made = []
        self.waiting = []
        self.later = False
        self.fails = None
        self.unplugged = 0
        self.before = lambda: None

    def _made(self, *what):
        self.before()
        self.made.append(what)
        if self.fails is not None:
            raise self.fails
        if not self.later:
            return None
        self.waiting.append(Pending())
        return self.waiting[-1]

    def read(self, offset, buffers):
        return self._made("read", offset)

    def write(self, offset, buffers, fua=False):
        return self._made("write", offset, bytes(buffers[0][:1]), fua)

    def zero(self, offset, length, fua=False, unmap=True):
        return self._made("zero", offset, length, fua, unmap)

    def discard(self, offset, length):
        return self._made("discard", offset, length)

    def flush(self):
        return self._made("flush")

    def unplug(self):
        self.unplugged += 1

    def writes(self):
        return [made[1:3] for made in self.made if made[0] == "write"]


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Chain:
    """A log above something, with what a test asks of it. A store into the file takes `slow_s`."""

    def __init__(self, path, target=0, length=LENGTH, slow_s=0.0, **options):
        self.path = path
        self.length = length
        self.clock = Clock()
        self.offload = HeldOffload()
        self.below = Below(length)
        self.slow_s = slow_s
        self.log = ActivityLog(
            self.below, path, offload=self.offload, target=target, clock=self.clock, **options
        )

    def stored(self):
        """All that is to be written to the file is."""
        while self.offload.calls:
            self.clock.now += self.slow_s
            self.offload.run_next()

    def write(self, extent, byte=1, offset=0, length=4096):
        return self.log.write(extent * EXTENT + offset, [memoryview(bytes([byte]) * length)])

    def heat(self, *extents):
        for extent in extents:
            self.write(extent)
        self.log.unplug()
        self.stored()

    def turn(self):
        """A flush that succeeds, a turn later."""
        self.clock.now += TURN_S
        later, self.below.later = self.below.later, False
        assert self.log.flush() is None
        self.below.later = later
        self.stored()

    def turns(self, count=3):
        for _ in range(count):
            self.turn()

    def in_file(self):
        """The extents that an open after a loss of power would find, if all was written back."""
        hot = HotExtents(self.path, self.length)
        hot.close()
        return [extent for first, last in hot.found for extent in range(first, last)]

    def hot(self):
        return [
            extent
            for offset, length in self.log.hot()
            for extent in range(offset // EXTENT, extents_of(offset + length))
        ]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "activity-log"


def made(path, **options):
    chain = Chain(path, **options)
    cleared = chain.log.clear()
    chain.stored()
    assert cleared.error is None
    return chain


@pytest.fixture
def chain(path):
    chain = made(path)
    yield chain
    chain.log.close()


# What passes, what waits


def test_write_to_a_cold_extent_waits_until_it_is_in_the_file(chain):
    in_file = []
    chain.below.before = lambda: in_file.append(chain.in_file())
    written = chain.write(5)
    chain.log.unplug()
    assert chain.below.made == []
    chain.stored()
    assert written.done
    assert written.error is None
    assert in_file == [[5]]
    assert chain.below.unplugged >= 2


def test_write_to_a_hot_extent_passes_at_once(chain):
    chain.heat(5)
    assert chain.write(5, 2) is None
    assert chain.below.writes()[-1] == (5 * EXTENT, b"\2")
    assert chain.log.updates == 2  # the clear, and the one before the first write


def test_all_that_wait_share_one_update_and_those_who_come_meanwhile_the_next(chain):
    updates = chain.log.updates
    first = [chain.write(extent) for extent in (1, 9, 700, PER_SECTOR + 3)]
    chain.log.unplug()
    second = [chain.write(extent) for extent in (20, 40, 60)]
    chain.log.unplug()
    assert len(chain.offload.calls) == 1
    chain.offload.run_next()
    assert all(write.done for write in first)
    assert not any(write.done for write in second)
    chain.offload.run_next()
    assert all(write.done for write in second)
    assert chain.log.updates == updates + 2
    assert chain.hot() == chain.in_file() == [1, 9, 20, 40, 60, 700, PER_SECTOR + 3]


def test_nothing_is_written_before_the_frontend_has_made_its_calls(chain):
    chain.write(1)
    chain.write(2)
    assert chain.offload.calls == []
    chain.log.unplug()
    assert len(chain.offload.calls) == 1


def test_zero_and_discard_wait_too_and_flags_are_passed_on(chain):
    zeroed = chain.log.zero(EXTENT, 3 * EXTENT, True, False)
    discarded = chain.log.discard(9 * EXTENT, 4096)
    written = chain.log.write(20 * EXTENT, [memoryview(b"x" * 512)], True)
    chain.log.unplug()
    assert chain.below.made == []
    chain.stored()
    assert zeroed.done
    assert discarded.done
    assert written.done
    assert chain.below.made == [
        ("zero", EXTENT, 3 * EXTENT, True, False),
        ("discard", 9 * EXTENT, 4096),
        ("write", 20 * EXTENT, b"x", True),
    ]
    assert chain.hot() == chain.in_file() == [1, 2, 3, 9, 20]


def test_reads_never_wait(chain):
    chain.write(5)
    assert chain.log.read(5 * EXTENT, []) is None
    assert chain.below.made == [("read", 5 * EXTENT)]


@pytest.mark.parametrize(
    ("offset", "length", "extents"),
    [
        (3 * EXTENT, EXTENT, [3]),
        (4 * EXTENT - 1, 1, [3]),
        (4 * EXTENT - 1, 2, [3, 4]),
        (3 * EXTENT, EXTENT + 1, [3, 4]),
        (2 * EXTENT + 512, 2 * EXTENT, [2, 3, 4]),
        (LENGTH - 512, 512, [EXTENTS - 1]),
        ((EXTENTS - 1) * EXTENT - 1, LENGTH - (EXTENTS - 1) * EXTENT + 1, [EXTENTS - 2, EXTENTS - 1]),
    ],
)
def test_write_names_each_extent_that_it_touches(chain, offset, length, extents):
    chain.log.zero(offset, length)
    chain.log.unplug()
    chain.stored()
    assert chain.hot() == chain.in_file() == extents
    assert chain.log.zero(offset, length) is None


@given(
    st.lists(st.tuples(st.integers(0, 40 * EXTENT), st.integers(1, 5 * EXTENT)), max_size=12),
    st.integers(1, EXTENT),
)
def test_no_write_passes_before_its_extents_are_in_the_file(tmp_path_factory, ranges, tail):
    length = 45 * EXTENT + tail
    chain = made(tmp_path_factory.mktemp("log") / "log", length=length)

    def before():
        _, offset, size, *_ = calls[len(chain.below.made)]
        assert set(range(offset // EXTENT, extents_of(offset + size))) <= set(chain.in_file())

    calls = [("zero", offset, size) for offset, size in ranges]
    chain.below.before = before
    for _, offset, size in calls:
        chain.log.zero(offset, size)
    chain.log.unplug()
    chain.stored()
    assert [call[:3] for call in chain.below.made] == calls
    assert chain.log.hot_bytes == sum(size for _, size in chain.log.hot())


def test_last_extent_counts_as_far_as_the_disk_reaches(chain):
    chain.heat(0, EXTENTS - 1)
    assert chain.log.hot() == [(0, EXTENT), ((EXTENTS - 1) * EXTENT, EXTENT - 4096)]
    assert chain.log.hot_bytes == 2 * EXTENT - 4096


# Order


def test_later_write_does_not_overtake_one_that_waits(chain):
    """A write to a hot and a cold extent waits; a later one to the hot part alone has to wait behind it."""
    chain.heat(1)
    chain.below.made.clear()
    chain.write(1, 1, EXTENT - 2048)
    chain.write(1, 2, EXTENT - 4096)
    chain.log.unplug()
    chain.write(1, 3, EXTENT - 4096)
    assert chain.below.made == []
    chain.stored()
    assert [byte for _, byte in chain.below.writes()] == [b"\1", b"\2", b"\3"]
    assert chain.write(1, 4) is None


def test_write_that_a_passing_one_causes_does_not_overtake_those_that_wait(chain):
    first = chain.write(1, 1)
    chain.write(1, 2)
    first.then(lambda _: chain.write(1, 3))
    chain.log.unplug()
    chain.stored()
    assert [byte for _, byte in chain.below.writes()] == [b"\1", b"\2", b"\3"]


def test_write_that_waits_for_the_next_update_is_not_overtaken_when_the_first_has_ended(chain):
    chain.write(1, 1)
    chain.log.unplug()
    chain.write(1, 2, EXTENT - 2048)
    chain.log.unplug()
    chain.offload.run_next()
    assert [byte for _, byte in chain.below.writes()] == [b"\1"]
    chain.write(1, 3, EXTENT - 4096)
    chain.stored()
    assert [byte for _, byte in chain.below.writes()] == [b"\1", b"\2", b"\3"]


def test_many_that_wait_behind_each_other_all_end(chain):
    writes = [chain.write(extent % 7, 1, EXTENT - 2048) for extent in range(500)]
    chain.log.unplug()
    writes += [chain.write(extent % 9, 1, EXTENT - 2048) for extent in range(500)]
    chain.stored()
    assert all(write.done and write.error is None for write in writes)
    assert len(chain.below.writes()) == 1000


# What leaves


def test_nothing_leaves_without_a_flush(chain):
    chain.heat(*range(0, 20, 2))
    chain.clock.now += 1000
    chain.heat(40)
    assert chain.hot() == [*range(0, 20, 2), 40]


def test_extents_leave_after_flushes_and_the_file_forgets_them(chain):
    chain.heat(1, 12)
    chain.turns()
    assert chain.hot() == chain.in_file() == []
    written = chain.write(1)
    chain.log.unplug()
    assert not written.done
    chain.stored()
    assert written.done


def test_what_leaves_costs_no_sync(chain, monkeypatch):
    chain.heat(1, 12)
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    chain.turns()
    assert chain.hot() == []
    assert synced == []


def test_extent_that_is_written_between_flushes_stays(chain):
    chain.heat(1, 12)
    for _ in range(20):
        assert chain.write(12) is None
        chain.turn()
    assert chain.hot() == [12]


def test_extents_of_a_write_across_their_border_stay(chain):
    chain.heat(3, 4)
    for _ in range(20):
        assert chain.write(3, 1, EXTENT - 2048) is None
        chain.turn()
    assert chain.hot() == [3, 4]


def test_least_recently_written_leave_down_to_the_target(path):
    chain = made(path, target=3 * EXTENT)
    chain.heat(1, 12)
    chain.heat(8, 9)
    chain.turn()
    assert chain.write(1) is None
    chain.turn()
    chain.turn()
    chain.turn()
    assert len(chain.hot()) == 3
    assert 1 in chain.hot()


def test_nothing_leaves_up_to_the_target(path):
    chain = made(path, target=4 * EXTENT)
    chain.heat(1, 3, 5, 7)
    chain.turns(10)
    assert chain.hot() == [1, 3, 5, 7]


def test_nothing_leaves_before_its_write_has_ended(chain):
    chain.heat(1, 12)
    chain.below.later = True
    chain.write(1)
    (write,) = chain.below.waiting
    chain.turns(10)
    assert 1 in chain.hot()
    write.complete()
    chain.turns()
    assert chain.hot() == []


def test_extents_leave_though_there_is_always_a_write_under_way(chain):
    chain.heat(1)
    chain.heat(5)
    chain.below.later = True
    for _ in range(4):
        chain.write(5)
        if len(chain.below.waiting) > 1:
            chain.below.waiting.pop(0).complete()
        chain.turn()
    assert chain.hot() == [5]


def test_write_that_ends_during_a_flush_is_not_covered_by_it(chain):
    chain.heat(1)
    chain.below.later = True
    chain.write(1)
    (write,) = chain.below.waiting
    chain.turns(2)
    chain.clock.now += TURN_S
    flush = chain.log.flush()
    write.complete()
    chain.below.waiting[-1].complete()
    assert flush.done
    assert chain.hot() == [1]


def test_flush_that_fails_lets_nothing_leave(chain):
    chain.heat(1, 12)
    chain.turns(1)
    for _ in range(5):
        chain.clock.now += TURN_S
        chain.below.fails = Error(Kind.IO, "flush fails")
        with pytest.raises(Error, match="flush fails"):
            chain.log.flush()
        chain.below.fails, chain.below.later = None, True
        flush = chain.log.flush()
        chain.below.waiting.pop().complete(Error(Kind.IO, "flush fails"))
        assert flush.error is not None
        chain.below.later = False
    chain.stored()
    assert chain.hot() == [1, 12]


@pytest.mark.parametrize("later", [False, True])
def test_after_a_write_that_failed_nothing_leaves_until_the_log_is_cleared(chain, later):
    chain.heat(1, 12)
    chain.below.later = later
    if later:
        chain.write(1)
        chain.below.waiting.pop().complete(Error(Kind.IO, "write fails"))
    else:
        chain.below.fails = Error(Kind.IO, "write fails")
        with pytest.raises(Error):
            chain.write(1)
        chain.below.fails = None
    chain.below.later = False
    chain.turns(10)
    assert chain.hot() == [1, 12]
    chain.log.clear()
    chain.stored()
    chain.heat(3)
    chain.turns()
    assert chain.hot() == chain.in_file() == []


def test_nothing_leaves_where_the_owner_says_so(path):
    may = []
    chain = made(path, may_leave=lambda: bool(may))
    chain.heat(1)
    chain.turns(5)
    assert chain.hot() == [1]
    may.append(True)
    chain.turns()
    assert chain.hot() == []


def test_extents_leave_at_most_once_in_a_turn(chain):
    chain.heat(1)
    chain.turns(1)
    for _ in range(1000):
        chain.clock.now += TURN_S / 2000
        chain.log.flush()
    assert chain.hot() == [1]


def test_so_many_runs_leave_at_a_time(chain, monkeypatch):
    monkeypatch.setattr(activity_log, "LEAVING", 4)
    chain.heat(*range(0, 40, 2))
    chain.turn()
    left = [20]
    while left[-1]:
        chain.turn()
        left.append(len(chain.hot()))
        assert left[-2] - left[-1] <= 4
    assert len(left) >= 6


def test_somebody_should_flush_where_nobody_does(path):
    chain = made(path, target=EXTENT)
    chain.heat(1)
    chain.clock.now += 2 * OVERDUE_S
    assert not chain.log.overdue
    chain.heat(2)
    assert chain.log.overdue
    chain.log.flush()
    assert not chain.log.overdue


# What it costs


def test_sequential_writer_waits_less_and_less_often(chain):
    updates = chain.log.updates
    for extent in range(20 * STREAM):
        for offset in range(0, EXTENT, EXTENT // 4):
            chain.write(extent, offset=offset)
            chain.log.unplug()
            chain.stored()
    assert chain.log.updates - updates <= 6 + 20
    assert len(chain.hot()) <= 21 * STREAM


def test_random_writes_leave_their_neighbours_alone_while_there_is_credit(chain):
    extents = [(n * 2003) % EXTENTS for n in range(200)]
    chain.heat(*extents)
    assert len(chain.hot()) <= 210


@pytest.mark.parametrize("length", [LENGTH, 16 * TiB], ids=["20-gib", "16-tib"])
def test_random_writes_over_a_disk_of_any_size_wait_for_few_updates(path, length):
    """DRBD's default log costs three times there: each miss waits for a transaction, and an extent to leave."""
    slow_s = 0.005
    chain = made(path, length=length, slow_s=slow_s)
    extents = extents_of(length)
    updates = chain.log.updates
    for n in range(3000):
        chain.heat(n * 7919 * 7919 % extents)
        chain.clock.now += 0.0001
    bound = BURST_S / slow_s + SHARE * (0.3 + 100 * slow_s) / slow_s + extents.bit_length() + 3
    assert chain.log.updates - updates <= bound


def test_while_the_log_is_in_debt_nothing_leaves(path):
    chain = made(path, slow_s=1.0)
    chain.heat(1)
    chain.turns(20)
    assert 1 in chain.hot()
    chain.clock.now += 2 / SHARE
    chain.turns(3)
    assert chain.hot() == []


def test_updates_are_a_small_part_of_the_time_whatever_is_written(path):
    """Random writes and flushes for long: what leaves comes back, and the waiting stays below what is allowed."""
    slow_s = 0.02
    chain = made(path, length=TiB, slow_s=slow_s)
    extents = extents_of(TiB)
    began, updates = chain.clock.now, chain.log.updates
    for n in range(20000):
        chain.heat(n * 7919 * 7919 % extents)
        chain.clock.now += 0.01
        if n % 100 == 0:
            chain.log.flush()
            chain.stored()
    took = chain.clock.now - began
    burst = (2 * extents.bit_length() + BURST_S / slow_s) * slow_s
    assert (chain.log.updates - updates) * slow_s <= SHARE * took + burst
    assert chain.log.updates - updates > extents.bit_length()


# Failures of the log


def fail_sync(monkeypatch):
    def fails(fd):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fdatasync", fails)


def test_write_whose_extent_cannot_be_named_is_not_begun_and_fails(chain, monkeypatch):
    chain.heat(1)
    chain.below.made.clear()
    with monkeypatch.context() as patch:
        fail_sync(patch)
        across = chain.write(1, 2, EXTENT - 2048)
        other = chain.write(7)
        chain.log.unplug()
        behind = chain.write(9)
        chain.stored()
    for write in (across, other, behind):
        assert "sync the activity log" in str(write.error)
    assert chain.below.made == []
    assert chain.write(1) is None  # hot before, and durable


def test_after_a_sync_that_failed_no_other_is_trusted(chain, monkeypatch):
    chain.heat(1)
    lost = []
    chain.log.on_log_lost = lost.append
    with monkeypatch.context() as patch:
        fail_sync(patch)
        chain.write(2)
        chain.log.unplug()
        chain.stored()
    again = [chain.write(2), chain.write(3)]
    chain.log.unplug()
    chain.stored()
    assert all("sync the activity log" in str(write.error) for write in again)
    assert len(lost) == 1
    assert chain.write(1) is None
    chain.turns(5)
    assert chain.hot() == [1]
    cleared = chain.log.clear()
    chain.stored()
    assert cleared.error is not None


def test_where_all_is_noted_elsewhere_nothing_waits_for_a_log_that_is_lost(chain, monkeypatch):
    chain.log.on_log_lost = lambda error: chain.log.assume_all()
    fail_sync(monkeypatch)
    write = chain.write(2)
    chain.log.unplug()
    behind = chain.write(2, 2), chain.write(3)
    chain.stored()
    assert write.done
    assert write.error is None
    assert all(other.done and other.error is None for other in behind)
    assert [byte for _, byte in chain.below.writes()] == [b"\1", b"\2", b"\1"]
    assert chain.write(4000) is None
    assert chain.log.hot() == [(0, LENGTH)]
    assert chain.log.hot_bytes == LENGTH
    chain.turns(5)
    assert chain.log.hot_bytes == LENGTH


def test_full_file_system_fails_the_write_and_a_later_one_succeeds(chain, monkeypatch):
    """Only where nothing is written in place: elsewhere the file has its space."""

    def full(fd, data, at):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        write = chain.write(2)
        chain.log.unplug()
        chain.stored()
        assert write.error.kind is Kind.NO_SPACE
        assert chain.below.made == []
    chain.heat(2, 13)
    assert chain.hot() == chain.in_file() == [2, 13]


def test_write_behind_one_that_could_not_be_named_does_not_pass_unnamed(chain, monkeypatch):
    def full(fd, data, at):
        raise OSError(28, os.strerror(28))

    first = chain.write(7)
    chain.log.unplug()
    behind = chain.write(7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        chain.offload.run_next()
    chain.stored()
    assert first.error.kind is Kind.NO_SPACE
    assert behind.error is not None or chain.in_file() == [7]
    assert len(chain.below.made) == (behind.error is None)


def test_what_cannot_be_forgotten_for_want_of_space_is_named_until_later(chain, monkeypatch):
    def full(fd, data, at):
        raise OSError(28, os.strerror(28))

    chain.heat(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        chain.turns()
    assert chain.in_file() == [1]
    chain.heat(12)
    assert chain.hot() == chain.in_file() == [12]


def test_offload_that_was_closed_fails_what_waits(chain):
    class Closed(HeldOffload):
        def __call__(self, call, doing):
            raise Error(Kind.CANCELLED, "closed")

    closed = ActivityLog(chain.below, chain.path, offload=Closed(), target=0)
    closed.go_on()
    write = closed.write(EXTENT, [memoryview(b"x")])
    closed.unplug()
    assert write.error.kind is Kind.CANCELLED


# Its life


def test_new_log_names_everything_and_nothing_leaves_until_it_is_cleared(path):
    chain = Chain(path)
    assert chain.log.found is None
    assert chain.log.hot() == [(0, LENGTH)]
    assert chain.write(77) is None
    chain.turns(5)
    assert chain.log.hot_bytes == LENGTH
    chain.log.clear()
    chain.stored()
    assert chain.hot() == chain.in_file() == []


def test_log_after_a_death_names_what_was_hot_and_keeps_it(path):
    chain = made(path)
    chain.heat(5, 16, EXTENTS - 1)
    again = Chain(path)
    assert again.log.found == [
        (5 * EXTENT, EXTENT),
        (16 * EXTENT, EXTENT),
        ((EXTENTS - 1) * EXTENT, EXTENT - 4096),
    ]
    assert again.write(5) is None
    again.turns(5)
    assert again.hot() == [5, 16, EXTENTS - 1]
    again.log.clear()
    again.stored()
    assert again.hot() == again.in_file() == []


def test_log_after_the_death_of_a_process_alone_lets_it_leave_as_usual(path):
    chain = made(path)
    chain.heat(5, 16)
    again = Chain(path)
    again.log.go_on()
    again.turns()
    assert again.hot() == again.in_file() == []


def test_log_that_was_cleared_at_the_end_opens_empty_and_lets_leave(path):
    chain = made(path)
    chain.heat(5, 16)
    chain.log.clear()
    chain.stored()
    chain.log.close()
    again = Chain(path)
    assert again.log.found == []
    assert again.log.hot_bytes == 0
    again.heat(1)
    again.turns()
    assert again.hot() == []


def test_clear_during_the_writing_of_what_leaves_ends_empty(chain):
    chain.heat(1, 12)
    chain.turns(1)
    chain.clock.now += TURN_S
    chain.log.flush()
    assert len(chain.offload.calls) == 1
    cleared = chain.log.clear()
    assert not cleared.done
    chain.stored()
    assert cleared.done
    assert chain.in_file() == []


def test_close_during_a_store_waits_for_it(chain):
    write = chain.write(1)
    chain.log.unplug()
    chain.log.close()
    chain.stored()
    assert write.done
    chain.log.close()
    assert chain.in_file() == [1]


def test_writes_that_have_ended_are_not_remembered_without_end(chain):
    """Nobody flushes for long, and thousands of writes end, one of which failed: that is not forgotten with them."""
    chain.heat(1)
    chain.below.later = True
    for number in range(1000):
        chain.write(1)
        error = Error(Kind.IO, "write fails") if number == 10 else None
        chain.below.waiting.pop().complete(error)
    chain.below.later = False
    chain.turns(10)
    assert chain.hot() == [1]
