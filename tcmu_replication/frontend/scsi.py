"""Carries out the tasks of a logical unit on a chain.

    runner = Runner(node)                   # one for each logical unit
    outcome = unit.command(cdb, data_out, in_length)
    if isinstance(outcome, Task):
        runner.run(outcome, data_out, data_in, done)
    ...                                     # and after the whole batch:
    node.unplug()

`done(answer, filled)` is called exactly once, often before `run` returns:
`answer` is the command's end, `filled` how many bytes of the Data-In area hold
data now (0 unless it was a READ that went well). Both areas must be left alone
until then. `done` must not raise.

COMPARE AND WRITE is atomic against all other writes through the same runner:
it starts when no write to its blocks is under way, and a write to its blocks
that comes before its end waits for it. Commands on other blocks pass by, and
reads never wait. No command needs more memory than PIECE.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple

from tcmu_replication.block.buffers import part, size
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.pending import Pending, attempt, gather
from tcmu_replication.errors import Error
from tcmu_replication.scsi import sense
from tcmu_replication.scsi.failure import answer_to
from tcmu_replication.scsi.task import Answer, Op, Task
from tcmu_replication.units import KiB, MiB

Done = Callable[[Answer, int], None]
Steps = Generator[Pending | None, None, Answer]
"""A command of several calls: yields what each call of the node returned, returns the command's end."""

PIECE = MiB
"""Bytes that a command without data of that length reads or writes at once; whole blocks of any size."""

_READ, _WRITE, _FLUSH = Op.READ, Op.WRITE, Op.FLUSH
_WRITES = frozenset((Op.WRITE, Op.WRITE_SAME, Op.UNMAP, Op.COMPARE_AND_WRITE))
_GOOD = sense.GOOD


class _Waiting(NamedTuple):
    """A command that must not start yet."""

    task: Task
    data_out: Buffers
    data_in: Buffers
    done: Done


class Runner:
    """Runs the tasks of one logical unit on `node`, the top of its chain."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._writes: dict[object, Task] = {}  # under way, each by something that is only its own
        self._compares: dict[object, Task] = {}  # those of them that compare first
        self._waiting: list[_Waiting] = []

    def run(self, task: Task, data_out: Buffers, data_in: Buffers, done: Done) -> None:
        """Carry out `task`; `done` hears how it ended. The areas are at least as long as the task says."""
        op = task.op
        if (self._waiting or self._compares or op is Op.COMPARE_AND_WRITE) and self._must_wait(task):
            self._waiting.append(_Waiting(task, data_out, data_in, done))
            return
        try:
            if op is _READ and not task.fua:
                length = task.length
                pending = self.node.read(task.offset, _exactly(data_in, length))
                if pending is None:
                    done(_GOOD, length)
                    return
            elif op is _WRITE:
                pending = self.node.write(task.offset, _exactly(data_out, task.length), task.fua)
                if pending is None:
                    done(_GOOD, 0)
                    return
            elif op is _FLUSH:
                pending = self.node.flush()
                if pending is None:
                    done(_GOOD, 0)
                    return
            else:
                self._start_steps(task, data_out, data_in, done)
                return
        except Error as error:
            done(answer_to(error, op), 0)
            return
        self._end_later(pending, task, done)

    def _end_later(self, pending: Pending, task: Task, done: Done) -> None:
        """For a command of one call that is under way."""

        def ended(pending: Pending) -> None:
            if task.op is _WRITE:
                del self._writes[ended]
            if pending.error is not None:
                done(answer_to(pending.error, task.op), 0)
            else:
                done(_GOOD, task.length if task.op is _READ else 0)
            if self._waiting:
                self._wake()

        if task.op is _WRITE:
            self._writes[ended] = task
        pending.then(ended)

    def _start_steps(self, task: Task, data_out: Buffers, data_in: Buffers, done: Done) -> None:
        """For a command of several calls."""
        steps = _STEPS[task.op](self.node, task, data_out, data_in)
        if task.op in _WRITES:
            self._writes[steps] = task
        if task.op is Op.COMPARE_AND_WRITE:
            self._compares[steps] = task
        self._step(steps, task, done, None)

    def _step(self, steps: Steps, task: Task, done: Done, error: Error | None) -> None:
        """Go on until a call does not end at once; `error` is what the last one ended with."""
        while True:
            try:
                pending = next(steps) if error is None else steps.throw(error)
            except StopIteration as stop:
                answer = stop.value
                break
            except Error as failure:
                answer = answer_to(failure, task.op)
                break
            error = None
            if pending is not None:
                if not pending.done:
                    pending.then(lambda ended: self._resume(steps, task, done, ended.error))
                    return
                error = pending.error
        self._writes.pop(steps, None)
        self._compares.pop(steps, None)
        done(answer, task.length if task.op is _READ and answer is _GOOD else 0)
        if self._waiting:
            self._wake()

    def _resume(self, steps: Steps, task: Task, done: Done, error: Error | None) -> None:
        self._step(steps, task, done, error)
        self.node.unplug()  # outside of any batch of the frontend's

    def _must_wait(self, task: Task) -> bool:
        if task.op not in _WRITES:
            return False
        under_way = self._writes if task.op is Op.COMPARE_AND_WRITE else self._compares
        return _overlaps(task, under_way.values()) or _overlaps(task, (w.task for w in self._waiting))

    def _wake(self) -> None:
        """Start what had to wait and need not any more, in the order in which it came."""
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            self.run(*entry)
        self.node.unplug()


def _exactly(buffers: Buffers, length: int) -> Buffers:
    """The first `length` bytes of an area that may be longer."""
    return buffers if size(buffers) == length else part(buffers, 0, length)


def _ranges(task: Task) -> Iterable[tuple[int, int]]:
    return task.ranges if task.op is Op.UNMAP else ((task.offset, task.length),)


def _overlaps(task: Task, others: Iterable[Task]) -> bool:
    """Whether any of `others` touches a byte that `task` touches."""
    mine = _ranges(task)
    return any(
        offset < at + extent and at < offset + length
        for other in others
        for at, extent in _ranges(other)
        for offset, length in mine
    )


def _read_durable(node: Node, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    """READ with FUA: what is read is on stable storage."""
    yield node.flush()
    yield node.read(task.offset, _exactly(data_in, task.length))
    return _GOOD


def _unmap(node: Node, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    outcomes = [attempt(node.discard, offset, length) for offset, length in task.ranges]
    yield gather((pending for _, pending in outcomes), next((e for e, _ in outcomes if e is not None), None))
    if task.fua:
        yield node.flush()
    return _GOOD


def _write_same(node: Node, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    if not task.pattern:
        yield node.zero(task.offset, task.length, task.fua, task.unmap)
        return _GOOD
    piece = memoryview(task.pattern * (min(PIECE, task.length) // len(task.pattern)))
    for at in range(0, task.length, PIECE):
        yield node.write(task.offset + at, [piece[: task.length - at]], task.fua)
    return _GOOD


def _verify(node: Node, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    piece = memoryview(bytearray(min(PIECE, task.length)))
    repeated = task.pattern * (len(piece) // len(task.pattern)) if task.pattern else b""
    for at in range(0, task.length, PIECE):
        found = piece[: task.length - at]
        yield node.read(task.offset + at, [found])
        if not task.compare:
            continue
        expected = repeated[: len(found)] if task.pattern else b"".join(part(data_out, at, len(found)))
        difference = first_difference(found, expected)
        if difference is not None:
            return sense.miscompare(difference % len(task.pattern) if task.pattern else at + difference)
    return _GOOD


def _compare_and_write(node: Node, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    found = memoryview(bytearray(task.length))
    yield node.read(task.offset, [found])
    difference = first_difference(found, b"".join(part(data_out, 0, task.length)))
    if difference is not None:
        return sense.miscompare(difference)
    yield node.write(task.offset, part(data_out, task.length, task.length), task.fua)
    return _GOOD


_STEPS: dict[Op, Callable[[Node, Task, Buffers, Buffers], Steps]] = {
    Op.READ: _read_durable,
    Op.UNMAP: _unmap,
    Op.WRITE_SAME: _write_same,
    Op.VERIFY: _verify,
    Op.COMPARE_AND_WRITE: _compare_and_write,
}


def first_difference(found: memoryview, expected: bytes) -> int | None:
    """Where two runs of bytes of the same length first differ, or None."""
    assert len(found) == len(expected)
    for at in range(0, len(expected), 4 * KiB):
        a, b = bytes(found[at : at + 4 * KiB]), expected[at : at + 4 * KiB]
        if a != b:
            return at + next(i for i in range(len(a)) if a[i] != b[i])
    return None
