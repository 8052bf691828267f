"""The line for ranges: who waits for whom, and what it costs. (A7)"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcmu_replication.block.turns import Turn, Turns


class Line:
    """Turns, and the numbers of those that have begun, in the order in which they did."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.begun: list[int] = []
        self.all: list[Turn] = []

    def stand(self, start: int, end: int) -> None:
        number = len(self.all)
        turn = Turn(start, end, lambda: self.begun.append(number))
        self.all.append(turn)
        self.turns.stand(turn, self.turns.ahead(start, end))

    def leave(self, number: int) -> None:
        self.turns.leave(self.all[number])


def test_a_turn_begins_when_all_before_it_on_its_range_have_left() -> None:
    line = Line()
    for span in ((0, 4), (8, 12), (0, 12), (4, 8), (20, 24)):
        line.stand(*span)
    assert line.begun == [0, 1, 4], "(4, 8) waits for the wide one before it"
    line.leave(1)
    assert line.begun == [0, 1, 4]
    line.leave(0)
    assert line.begun == [0, 1, 4, 2]
    line.leave(2)
    assert line.begun == [0, 1, 4, 2, 3]
    line.leave(3)
    line.leave(4)
    assert not line.turns


def test_turns_that_leave_as_they_begin_do_not_nest() -> None:
    turns = Turns()
    begun: list[int] = []
    first = Turn(0, 1, lambda: None)
    turns.stand(first, ())
    for number in range(3 * sys.getrecursionlimit()):
        turn = Turn(0, 1, lambda: None)

        def begin(turn: Turn = turn, number: int = number) -> None:
            begun.append(number)
            turns.leave(turn)

        turn.begin = begin
        turns.stand(turn, turns.ahead(0, 1))
    turns.leave(first)
    assert begun == list(range(3 * sys.getrecursionlimit()))
    assert not turns


_spans = st.tuples(st.integers(0, 7), st.integers(1, 4)).map(lambda s: (s[0], s[0] + s[1]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(_spans, st.integers(0, 20)), max_size=60))
def test_turns_begin_as_in_a_list_that_is_searched_each_time(events: list[tuple[int, int] | int]) -> None:
    line = Line()
    model: dict[int, tuple[int, int]] = {}  # those that have not left
    begun: set[int] = set()

    def look() -> None:
        for number, (start, end) in model.items():
            before = [span for other, span in model.items() if other < number]
            if all(to <= start or end <= at for at, to in before):
                begun.add(number)

    for event in events:
        if isinstance(event, int):
            able = [number for number in model if number in begun]
            if not able:
                continue
            number = able[event % len(able)]
            del model[number]
            line.leave(number)
        else:
            model[len(line.all)] = event
            line.stand(*event)
        look()
        assert set(line.begun) == begun
        assert bool(line.turns) == bool(model)
    assert len(line.begun) == len(begun), "each once"


def _steps(call: Callable[[], None]) -> int:
    """Lines of turns.py that a call executes."""
    count = 0
    here = Path(sys.modules[Turns.__module__].__file__ or "").name

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if Path(frame.f_code.co_filename).name != here:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def _pile(count: int) -> None:
    """So many for one block, from the first that stands to the last that leaves."""
    line = Line()
    for _ in range(count):
        line.stand(0, 1)
    for number in range(count):
        line.leave(number)
    assert line.begun == list(range(count))


def _leave_apart(count: int) -> int:
    """What the end of one costs that nobody waits for, with so many others in line."""
    line = Line()
    line.stand(0, 1)
    for number in range(count):
        line.stand(number + 1, number + 2)
    return _steps(lambda: line.leave(0))


@pytest.mark.parametrize("count", [100, 400])
def test_a_line_for_one_block_costs_the_same_for_each(count: int) -> None:
    assert _steps(lambda: _pile(2 * count)) <= 2.1 * _steps(lambda: _pile(count))


def test_an_end_looks_at_those_alone_that_waited_for_it() -> None:
    assert _leave_apart(1000) == _leave_apart(10)
