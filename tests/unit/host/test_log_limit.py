"""No storm of lines fills the log, and how many there were is told (A5)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from tcmu_replication.host import log_limit
from tcmu_replication.host.log_limit import LINES, SECONDS, LogLimit
from tests.support.tools import PATIENCE_S


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[str, str]] = []
        self.told = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelname, record.getMessage()))
        if "more like it" in record.getMessage():
            self.told.set()


class Room:
    """A logger with a limit, and a clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0
        self.lines = Lines()
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.limit = LogLimit(
            self.lines, now=lambda: self.time, later=lambda after, call: self.calls.append((after, call))
        )
        self.lines.addFilter(self.limit)
        self.log = logging.Logger("room")
        self.log.addHandler(self.lines)

    def storm(self, count: int) -> None:
        for number in range(count):
            self.log.warning("request %d failed", number)


@pytest.fixture
def room() -> Room:
    return Room()


def test_lines_below_the_limit_pass(room: Room) -> None:
    room.storm(LINES)
    assert room.lines.said == [("WARNING", f"request {number} failed") for number in range(LINES)]
    assert room.calls == []


def test_storm_leaves_a_bounded_number_of_lines_and_the_count_when_it_is_over(room: Room) -> None:
    room.storm(10)
    room.time += 5
    room.storm(10_000)
    assert len(room.lines.said) == LINES
    ((after, tell),) = room.calls
    assert after == SECONDS - 5
    tell()
    held = 10_010 - LINES
    assert room.lines.said[LINES:] == [
        ("WARNING", f"and {held:,} more like it, the last: request 9999 failed")
    ]


def test_storm_that_goes_on_is_told_of_once_a_while(room: Room) -> None:
    for _ in range(3):
        room.storm(10_000)
        room.time += SECONDS
        room.calls.pop()[1]()
    assert len(room.lines.said) == 3 * (LINES + 1)
    assert room.calls == []


def test_lines_of_another_kind_pass_meanwhile(room: Room) -> None:
    room.storm(10_000)
    room.log.error("the disk is gone")
    assert room.lines.said[-1] == ("ERROR", "the disk is gone")


def test_slow_trickle_is_never_held_back(room: Room) -> None:
    for _ in range(10):
        room.storm(LINES)
        room.time += SECONDS
    assert len(room.lines.said) == 10 * LINES


def test_end_of_the_program_tells_what_is_untold_once(room: Room) -> None:
    room.storm(LINES + 3)
    room.limit.close()
    room.calls.pop()[1]()
    assert room.lines.said[LINES:] == [
        ("WARNING", f"and 3 more like it, the last: request {LINES + 2} failed")
    ]


def test_own_timer_tells_without_anybody_asking(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_limit, "SECONDS", 0.01)
    lines = Lines()
    lines.addFilter(LogLimit(lines, now=lambda: 0.0))
    log = logging.Logger("own")
    log.addHandler(lines)
    for _ in range(LINES + 1):
        log.warning("again")
    assert lines.told.wait(PATIENCE_S)
    assert lines.said[-1] == ("WARNING", "and 1 more like it, the last: again")
