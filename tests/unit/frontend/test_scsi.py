"""Tasks on a chain: what the node is asked, how it ends, and what waits for a COMPARE AND WRITE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind
from tcmu_replication.frontend import scsi
from tcmu_replication.frontend.scsi import PIECE, Runner
from tcmu_replication.scsi.sense import BUSY, GOOD, miscompare
from tcmu_replication.scsi.task import Answer, Op, Task
from tcmu_replication.units import KiB, MiB

from ..scsi.disk import sense_of

BLOCK = 512
A, B, C = (bytes([letter]) * BLOCK for letter in b"ABC")


class Recorder(Memory):
    """Memory that writes down its calls; fails or delays them when told so."""

    def __init__(self, length: int = 8 * MiB) -> None:
        super().__init__(length)
        self.calls: list[tuple] = []
        self.failing: dict[str, Kind] = {}
        self.late: list[tuple[Pending, str, Callable[[], None], Error | None]] | None = None
        self.unplugged = 0

    def _call(self, name: str, act: Callable[[], object], *about: object) -> Pending | None:
        self.calls.append((name, *about))
        kind = self.failing.get(name)
        error = None if kind is None else Error(kind)
        if self.late is not None:
            pending = Pending()
            self.late.append((pending, name, act, error))
            return pending
        if error is not None:
            raise error
        act()
        return None

    def end(self, index: int = 0) -> str:
        """End a call that is under way (the oldest), which takes effect now; gives its name."""
        assert self.late is not None
        pending, name, act, error = self.late.pop(index)
        if error is None:
            act()
        pending.complete(error)
        return name

    def read(self, offset: int, buffers: Sequence[memoryview]) -> Pending | None:
        return self._call("read", lambda: Memory.read(self, offset, buffers), offset, sum(map(len, buffers)))

    def write(self, offset: int, buffers: Sequence[memoryview], fua: bool = False) -> Pending | None:
        size = sum(map(len, buffers))
        return self._call("write", lambda: Memory.write(self, offset, buffers), offset, size, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        return self._call("zero", lambda: Memory.zero(self, offset, length), offset, length, fua, unmap)

    def discard(self, offset: int, length: int) -> Pending | None:
        return self._call("discard", lambda: Memory.zero(self, offset, length), offset, length)

    def flush(self) -> Pending | None:
        return self._call("flush", lambda: None)

    def unplug(self) -> None:
        self.unplugged += 1


class Patient:
    """A caller, who waits until the test says otherwise."""

    def __init__(self) -> None:
        self.abandoned = False


class Bench:
    """A runner on a recorder, and the ends of what it ran."""

    def __init__(self, late: bool = False) -> None:
        self.node = Recorder()
        if late:
            self.node.late = []
        self.gate = Gate(self.node)
        self.runner = Runner(self.gate)
        self.ends: dict[str, tuple[Answer, int]] = {}

    def run(
        self,
        task: Task,
        *data_out: bytes,
        name: str = "",
        data_in: bytearray | None = None,
        caller: Patient | None = None,
    ) -> None:
        views = [memoryview(part) for part in data_out]
        into = [] if data_in is None else [memoryview(data_in)]

        def done(answer: Answer, filled: int) -> None:
            assert name not in self.ends
            self.ends[name] = (answer, filled)

        self.runner.run(task, views, into, done, caller or Patient())

    def end(self, name: str = "") -> tuple[Answer, int]:
        return self.ends[name]

    def finish(self) -> None:
        """End everything that is under way, oldest first."""
        while self.node.late:
            self.node.end()


at_once_or_late = pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])


@at_once_or_late
def test_read_fills_its_part_of_the_area(late: bool) -> None:
    bench = Bench(late)
    bench.node.data[512:1024] = A
    area = bytearray(b"\xee" * 700)
    bench.run(Task(Op.READ, 512, 512), data_in=area)
    bench.finish()
    assert bench.end() == (GOOD, 512)
    assert area == A + b"\xee" * 188
    assert bench.node.calls == [("read", 512, 512)]


@at_once_or_late
def test_read_with_fua_flushes_first(late: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.READ, 0, 512, fua=True), data_in=bytearray(512))
    bench.finish()
    assert bench.end() == (GOOD, 512)
    assert bench.node.calls == [("flush",), ("read", 0, 512)]


@at_once_or_late
@pytest.mark.parametrize("fua", [False, True])
def test_write_takes_its_part_of_the_area(late: bool, fua: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.WRITE, 512, 1024, fua), A, B, C)
    bench.finish()
    assert bench.end() == (GOOD, 0)
    assert bench.node.data[:2560] == bytes(512) + A + B + bytes(1024)
    assert bench.node.calls == [("write", 512, 1024, fua)]


@at_once_or_late
def test_flush(late: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.FLUSH))
    bench.finish()
    assert bench.end() == (GOOD, 0)
    assert bench.node.calls == [("flush",)]


@at_once_or_late
def test_unmap_discards_every_range(late: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.UNMAP, fua=True, ranges=((0, 4096), (8192, 512))))
    bench.finish()
    assert bench.end() == (GOOD, 0)
    assert bench.node.calls == [("discard", 0, 4096), ("discard", 8192, 512), ("flush",)]


@at_once_or_late
def test_write_same_of_zeroes_is_left_to_the_node(late: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.WRITE_SAME, 512, 4 * MiB, fua=True, unmap=True))
    bench.finish()
    assert bench.end() == (GOOD, 0)
    assert bench.node.calls == [("zero", 512, 4 * MiB, True, True)]


@at_once_or_late
def test_write_same_of_a_pattern_goes_piece_by_piece(late: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.WRITE_SAME, 512, 2 * PIECE + 1024, pattern=A))
    bench.finish()
    assert bench.end() == (GOOD, 0)
    assert [call[1:3] for call in bench.node.calls] == [
        (512, PIECE),
        (512 + PIECE, PIECE),
        (512 + 2 * PIECE, 1024),
    ]
    filled = 512 + 2 * PIECE + 1024
    assert bench.node.data == bytes(512) + A * (2 * PIECE // 512 + 2) + bytes(len(bench.node.data) - filled)


@at_once_or_late
def test_verify_reads_piece_by_piece(late: bool) -> None:
    bench = Bench(late)
    bench.run(Task(Op.VERIFY, 512, PIECE + 512))
    bench.finish()
    assert bench.end() == (GOOD, 0)
    assert bench.node.calls == [("read", 512, PIECE), ("read", 512 + PIECE, 512)]


@at_once_or_late
def test_verify_finds_the_first_difference(late: bool) -> None:
    bench = Bench(late)
    data = bytearray(PIECE + 1024)
    bench.run(Task(Op.VERIFY, 0, len(data), compare=True), bytes(data), name="alike")
    data[PIECE + 700] = data[PIECE + 701] = 1
    bench.run(Task(Op.VERIFY, 0, len(data), compare=True), bytes(data), name="differs")
    bench.finish()
    assert bench.end("alike") == (GOOD, 0)
    assert bench.end("differs") == (miscompare(PIECE + 700), 0)


def test_verify_against_one_block() -> None:
    bench = Bench()
    bench.node.data[:2048] = A * 4
    bench.run(Task(Op.VERIFY, 0, 2048, compare=True, pattern=A), name="alike")
    bench.node.data[1024 + 7] = 0
    bench.run(Task(Op.VERIFY, 0, 2048, compare=True, pattern=A), name="differs")
    assert bench.end("alike") == (GOOD, 0)
    assert bench.end("differs") == (miscompare(7), 0)


@at_once_or_late
def test_compare_and_write(late: bool) -> None:
    bench = Bench(late)
    bench.node.data[512:1024] = A
    bench.run(Task(Op.COMPARE_AND_WRITE, 512, 512, fua=True), A, B, name="same")
    bench.finish()
    assert bench.end("same") == (GOOD, 0)
    assert bench.node.data[:1536] == bytes(512) + B + bytes(512)
    bench.run(Task(Op.COMPARE_AND_WRITE, 512, 512), B[:-1] + b"!", C, name="other")
    bench.finish()
    assert bench.end("other") == (miscompare(511), 0)
    assert bench.node.data[512:1024] == B
    assert [call[0] for call in bench.node.calls] == ["read", "write", "read"]


FAILURES = [
    (Task(Op.READ, 0, 512), "read", "03/11/00"),
    (Task(Op.READ, 0, 512, fua=True), "flush", "03/11/00"),
    (Task(Op.WRITE, 0, 512), "write", "03/0C/00"),
    (Task(Op.FLUSH), "flush", "03/0C/00"),
    (Task(Op.UNMAP, ranges=((0, 512), (512, 512))), "discard", "03/0C/00"),
    (Task(Op.WRITE_SAME, 0, 512), "zero", "03/0C/00"),
    (Task(Op.WRITE_SAME, 0, 512, pattern=A), "write", "03/0C/00"),
    (Task(Op.VERIFY, 0, 512), "read", "03/11/00"),
    (Task(Op.COMPARE_AND_WRITE, 0, 512), "read", "03/0C/00"),
    (Task(Op.COMPARE_AND_WRITE, 0, 512), "write", "03/0C/00"),
]


@at_once_or_late
@pytest.mark.parametrize(("task", "call", "sense"), FAILURES)
def test_a_failure_ends_the_command_with_its_sense(late: bool, task: Task, call: str, sense: str) -> None:
    bench = Bench(late)
    bench.node.failing[call] = Kind.IO
    bench.run(task, bytes(512), A, name="fails", data_in=bytearray(512))
    bench.finish()
    answer, filled = bench.end("fails")
    assert str(sense_of(answer)) == sense
    assert filled == 0
    bench.node.failing.clear()
    bench.run(Task(Op.COMPARE_AND_WRITE, 0, 512), bytes(512), A, name="next")
    bench.finish()
    assert bench.end("next") == (GOOD, 0), "nothing is left behind"


def test_a_pending_that_has_ended_already_is_taken() -> None:
    bench = Bench()
    ended = Pending()
    ended.complete(Error(Kind.NO_SPACE))
    bench.node.write = lambda *_: ended  # type: ignore[method-assign]
    bench.run(Task(Op.WRITE, 0, 512), A, name="write")
    bench.run(Task(Op.WRITE_SAME, 0, 512, pattern=A), name="same")
    assert str(sense_of(bench.end("write")[0])) == "07/27/07"
    assert str(sense_of(bench.end("same")[0])) == "07/27/07"


CAW = Task(Op.COMPARE_AND_WRITE, 512, 512)
OVERLAPPING = [
    Task(Op.WRITE, 0, 1024),
    Task(Op.WRITE_SAME, 1023, 512),
    Task(Op.UNMAP, ranges=((4096, 512), (512, 512))),
]
APART = [
    Task(Op.WRITE, 0, 512),
    Task(Op.WRITE_SAME, 1024, 512),
    Task(Op.UNMAP, ranges=((0, 512), (1024, 512))),
]


@pytest.mark.parametrize("task", OVERLAPPING)
def test_compare_and_write_waits_for_a_write_to_its_blocks(task: Task) -> None:
    bench = Bench(late=True)
    bench.run(task, bytes(1024), name="write")
    bench.run(CAW, bytes(512), A, name="compare")
    assert "read" not in [call[0] for call in bench.node.calls]
    bench.finish()
    assert bench.end("write") == bench.end("compare") == (GOOD, 0)
    assert bench.node.data[512:1024] == A
    assert bench.node.unplugged


@pytest.mark.parametrize("task", OVERLAPPING)
def test_a_write_to_its_blocks_waits_for_a_compare_and_write(task: Task) -> None:
    bench = Bench(late=True)
    bench.run(CAW, bytes(512), A, name="compare")
    bench.run(task, bytes(1024), name="write")
    assert not any(call[1] < 1024 and call[1] + call[2] > 512 for call in bench.node.calls[1:])
    assert bench.node.end() == "read"
    assert bench.node.end([name for _, name, *_ in bench.node.late or ()].index("write")) == "write"
    assert bench.end("compare") == (GOOD, 0)
    assert "write" not in bench.ends
    assert len(bench.node.calls) > 2, "and then it starts"
    bench.finish()
    assert bench.end("write") == (GOOD, 0)
    assert bench.node.data[1023] == 0


@pytest.mark.parametrize("task", APART)
def test_a_write_to_other_blocks_passes_by(task: Task) -> None:
    bench = Bench(late=True)
    bench.run(CAW, bytes(512), A, name="compare")
    bench.run(task, B, name="write")
    assert len(bench.node.calls) > 1
    bench.finish()
    assert bench.end("write") == bench.end("compare") == (GOOD, 0)


def test_reads_and_flushes_do_not_wait() -> None:
    bench = Bench(late=True)
    bench.run(CAW, bytes(512), A)
    bench.run(Task(Op.READ, 512, 512), name="read", data_in=bytearray(512))
    bench.run(Task(Op.FLUSH), name="flush")
    assert [call[0] for call in bench.node.calls] == ["read", "read", "flush"]


def test_of_two_that_compare_with_the_same_one_writes() -> None:
    bench = Bench(late=True)
    bench.run(CAW, bytes(512), A, name="first")
    bench.run(CAW, bytes(512), B, name="second")
    bench.finish()
    assert bench.end("first") == (GOOD, 0)
    assert bench.end("second") == (miscompare(0), 0)
    assert bench.node.data[512:1024] == A


def test_a_later_write_does_not_overtake_one_that_waits() -> None:
    bench = Bench(late=True)
    bench.run(Task(Op.WRITE, 512, 512), A, name="before")
    bench.run(CAW, A, B, name="compare")
    bench.run(Task(Op.WRITE, 512, 512), C, name="after")
    assert len(bench.node.calls) == 1
    bench.finish()
    assert all(end == (GOOD, 0) for end in bench.ends.values())
    assert list(bench.ends) == ["before", "compare", "after"]
    assert bench.node.data[512:1024] == C


def test_a_compare_and_write_that_failed_lets_the_others_go_on() -> None:
    bench = Bench(late=True)
    bench.node.failing["read"] = Kind.IO
    bench.run(CAW, bytes(512), A, name="compare")
    bench.run(Task(Op.WRITE, 512, 512), B, name="write")
    bench.finish()
    assert bench.end("compare")[0].status == 2
    assert bench.end("write") == (GOOD, 0)


def test_what_goes_on_by_itself_is_not_left_plugged() -> None:
    bench = Bench(late=True)
    bench.run(Task(Op.WRITE_SAME, 0, 2 * PIECE, pattern=A))
    assert bench.node.unplugged == 0
    bench.node.end()
    assert bench.node.unplugged == 1


LONG = Task(Op.WRITE_SAME, 0, 4 * PIECE, pattern=A)
IN_STEPS = [
    (LONG, b"", 1),
    (Task(Op.VERIFY, 0, 4 * PIECE), b"", 0),
    (CAW, bytes(512) + B, 0),
    (Task(Op.READ, 0, 512, fua=True), b"", 0),
    (Task(Op.UNMAP, fua=True, ranges=((0, 512), (1024, 512))), b"", 2),
]


@pytest.mark.parametrize(("task", "data_out", "changes"), IN_STEPS)
def test_an_abandoned_command_changes_nothing_that_it_has_not_begun(
    task: Task, data_out: bytes, changes: int
) -> None:
    """D10."""
    bench = Bench(late=True)
    caller = Patient()
    bench.run(task, data_out, data_in=bytearray(512), caller=caller)
    begun = len(bench.node.calls)
    caller.abandoned = True
    bench.finish()
    assert bench.end() == (BUSY, 0)
    assert len(bench.node.calls) == begun
    assert sum(call[0] in ("write", "discard") for call in bench.node.calls) == changes


def test_a_compare_and_write_that_was_abandoned_in_line_lets_the_next_pass() -> None:
    """D10."""
    bench = Bench(late=True)
    caller = Patient()
    bench.run(Task(Op.WRITE, 512, 512), A, name="before")
    bench.run(CAW, A, B, name="abandoned", caller=caller)
    bench.run(CAW, A, C, name="repeated")
    caller.abandoned = True
    bench.finish()
    assert bench.end("abandoned") == (BUSY, 0)
    assert bench.end("repeated") == (GOOD, 0)
    assert bench.node.data[512:1024] == C
    assert bench.gate.in_flight == 0


def test_the_repetition_of_a_compare_and_write_stays_behind_the_write_that_was_under_way() -> None:
    """D10: after BUSY the write that was made already is seen by the repetition, and cannot come after it."""
    bench = Bench(late=True)
    caller = Patient()
    bench.run(CAW, bytes(512), A, name="abandoned", caller=caller)
    bench.node.end()
    caller.abandoned = True
    bench.run(CAW, bytes(512), A, name="repeated")
    assert [call[0] for call in bench.node.calls] == ["read", "write"]
    bench.finish()
    assert bench.end("abandoned") == (BUSY, 0)
    assert bench.end("repeated") == (miscompare(0), 0)
    assert bench.node.data[512:1024] == A


_blocks = st.sampled_from([(0, 1), (0, 2), (1, 2)])
_values = st.sampled_from(b"\0A")
_events = st.one_of(
    st.tuples(st.just("compare"), _blocks, _values, _values),
    st.tuples(st.just("write"), _blocks, _values),
    st.tuples(st.just("same"), _blocks, _values),
    st.tuples(st.just("unmap"), _blocks),
    st.tuples(st.just("end"), st.integers(0, 2)),
    st.tuples(st.just("end"), st.integers(0, 2)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_events, min_size=8, max_size=60))
def test_commands_that_overlap_behave_as_if_one_by_one(events: list[tuple]) -> None:
    """The model takes each command whole when it ends; the recorder lets calls take effect when they end."""
    bench = Bench(late=True)
    model = bytearray(3 * BLOCK)
    started = ended = 0

    def start(task: Task, data_out: bytes, effect: bytes, expected: bytes | None = None) -> None:
        nonlocal started
        started += 1
        begin = task.ranges[0][0] if task.ranges else task.offset
        span = slice(begin, begin + len(effect))

        def done(answer: Answer, filled: int) -> None:
            nonlocal ended
            ended += 1
            if expected is not None and model[span] != expected:
                assert str(sense_of(answer)) == "0E/1D/00"
            else:
                assert answer == GOOD
                model[span] = effect

        bench.runner.run(task, [memoryview(data_out)], [], done, Patient())

    for kind, *about in events:
        if kind == "end":
            if bench.node.late:
                bench.node.end(about[0] % len(bench.node.late))
            continue
        (lba, count), *letters = about
        offset, length = lba * BLOCK, count * BLOCK
        blocks = [bytes([letter]) * length for letter in letters]
        if kind == "compare":
            start(Task(Op.COMPARE_AND_WRITE, offset, length), b"".join(blocks), blocks[1], blocks[0])
        elif kind == "write":
            start(Task(Op.WRITE, offset, length), blocks[0], blocks[0])
        elif kind == "same":
            start(Task(Op.WRITE_SAME, offset, length, pattern=blocks[0][:BLOCK]), b"", blocks[0])
        else:
            start(Task(Op.UNMAP, ranges=((offset, length),)), b"", bytes(length))
    bench.finish()
    assert ended == started
    assert bench.node.data[: len(model)] == model


@pytest.mark.parametrize("where", [0, 1, 4 * KiB - 1, 4 * KiB, 9000])
def test_first_difference(where: int) -> None:
    data = bytearray(9001)
    assert scsi.first_difference(memoryview(data), bytes(9001)) is None
    data[where] = 1
    assert scsi.first_difference(memoryview(data), bytes(9001)) == where
