"""How fast a resync goes, with a clock of the test."""

from __future__ import annotations

import pytest

from tcmu_replication.block.pending import Pending
from tcmu_replication.jobs.pace import BEGIN, FLOOR, HEAR_S, IDLE_S, LONGEST, SHORTEST, Adaptive, Fixed
from tcmu_replication.units import BLOCK, KiB, MiB


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Host:
    """A resync with an adaptive pace, and a foreground that writes one block after the other.

    A write takes `alone_s` without anything of the resync, and `beside_s` with it; a piece takes `piece_s`.
    """

    def __init__(self, *, alone_s: float = 0.001, beside_s: float = 0.001, piece_s: float = 0.0005) -> None:
        self.clock = Clock()
        self.alone_s, self.beside_s, self.piece_s = alone_s, beside_s, piece_s
        self.busy_until = 0.0
        self.sent = 0
        self.pace = Adaptive(lambda: self.clock.now < self.busy_until, self.clock)

    def go_on(self, seconds: float, *, writes: bool = True) -> float:
        """Live for so long; how many bytes a second the resync sends."""
        end, before = self.clock.now + seconds, self.sent
        ended = None
        write_ends = 0.0
        while self.clock.now < end:
            if ended is not None and self.clock.now >= write_ends:
                ended(Pending())
                ended = None
            if writes and ended is None:
                beside = self.clock.now < self.busy_until
                ended = self.pace.watcher()
                write_ends = self.clock.now + (self.beside_s if beside else self.alone_s)
            if self.clock.now >= self.busy_until and not self.pace.delay():
                self.sent += self.pace.size
                self.pace.sent(self.pace.size)
                self.busy_until = self.clock.now + self.piece_s
            self.clock.now += 0.0001
        if ended is not None:
            ended(Pending())
        return (self.sent - before) / seconds


def test_fixed_rate_is_kept() -> None:
    clock = Clock()
    pace = Fixed(1 * MiB, clock)
    sent = 0
    while clock.now < 1010.0:
        if pace.delay():
            clock.now += pace.delay()
            continue
        pace.sent(pace.size)
        sent += pace.size
    assert sent == pytest.approx(10 * MiB, abs=64 * KiB)


def test_fixed_rate_does_not_catch_up_after_a_pause() -> None:
    clock = Clock()
    pace = Fixed(1 * MiB, clock)
    clock.now += 3600
    pace.sent(MiB)
    assert pace.delay() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rate", "size"), [(1, SHORTEST), (64 * MiB, 256 * KiB), (1 << 40, LONGEST), (100_000_000, 95 * BLOCK)]
)
def test_pieces_shrink_with_the_rate_and_are_whole_blocks(rate: int, size: int) -> None:
    assert Fixed(rate, Clock()).size == size


def test_nobody_writes_and_nothing_is_limited() -> None:
    pace = Adaptive(lambda: True, Clock())
    pace.sent(1 << 40)
    assert pace.delay() == 0
    assert pace.size == LONGEST


def test_foreground_that_does_not_suffer_is_no_limit_in_the_end() -> None:
    host = Host(beside_s=0.001)
    host.go_on(5)
    assert host.go_on(1) > 10 * BEGIN


def test_foreground_that_suffers_brings_the_rate_down_to_the_floor_and_not_below() -> None:
    host = Host(beside_s=0.1, piece_s=0.01)
    host.go_on(5)
    assert host.go_on(10) == pytest.approx(FLOOR, rel=0.3)


def test_first_write_meets_short_pieces() -> None:
    host = Host()
    assert host.pace.delay() == 0
    assert host.pace.size == LONGEST
    host.pace.watcher()
    host.pace.delay()
    assert host.pace.size == SHORTEST


def test_resync_is_silent_until_it_has_heard_how_long_a_write_takes_without_it() -> None:
    host = Host()
    ends = [host.pace.watcher() for _ in range(8)]
    assert host.pace.delay() > 0
    host.clock.now += 0.002
    assert host.pace.delay() > 0
    for end in ends:
        end(Pending())
    host.clock.now += HEAR_S
    assert host.pace.delay() == 0


def test_nothing_is_sent_while_a_write_waits_for_longer_than_usual_but_not_for_ever() -> None:
    host = Host(alone_s=0.001)
    host.go_on(1)
    host.pace.watcher()  # and it does not end
    host.pace.sent(SHORTEST)
    host.clock.now += 0.0155  # what 64 KiB have at the floor is 0.0156
    assert host.pace.delay() > 0
    host.clock.now += 0.001
    assert host.pace.delay() == 0


def test_limit_ends_when_nobody_writes_any_more() -> None:
    host = Host(beside_s=0.1, piece_s=0.01)
    host.go_on(5)
    host.clock.now += IDLE_S
    assert host.pace.delay() == 0
    assert host.pace.size == LONGEST
    assert host.pace.rate is None
