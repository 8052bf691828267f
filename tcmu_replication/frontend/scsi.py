"""Carries out the tasks of a logical unit on a chain.

    runner = Runner(gate)                   # as many as there are devices, on the gate of the chain
    outcome = unit.command(cdb, data_out, in_length)
    if isinstance(outcome, Task):
        runner.run(outcome, data_out, data_in, done, caller)
    ...                                     # and after the whole batch:
    gate.unplug()

`done(answer, filled)` is called exactly once, often before `run` returns:
`answer` is the command's end, `filled` how many bytes of the Data-In area hold
data now (0 unless it was a READ that went well). Both areas must be left alone
until then. `done` must not raise.

COMPARE AND WRITE claims its blocks at the gate, so it is atomic against all
other writes to the chain, of other devices and of NBD clients too. Commands on
other blocks pass by, and reads never wait. No command needs more memory than
PIECE.

A command of several calls looks before each whether its caller still waits:
what was abandoned (answered BUSY, or aborted) changes nothing that it has not
begun to change, for its repetition and newer writes may be here already. What
was begun is in the chain, which keeps the order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Protocol

from tcmu_replication.block.buffers import part, size
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Buffers
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
_GOOD = sense.GOOD


class Caller(Protocol):
    """Whoever sent a command."""

    abandoned: bool
    """It has its answer already: how the command ends is of no interest."""


class Runner:
    """Runs the tasks of one logical unit on `node`, the top of its chain."""

    def __init__(self, node: Gate) -> None:
        self.node = node

    def run(self, task: Task, data_out: Buffers, data_in: Buffers, done: Done, caller: Caller) -> None:
        """Carry out `task`; `done` hears how it ended. The areas are at least as long as the task says."""
        op = task.op
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
                self._step(_STEPS[op](self.node, task, data_out, data_in), task, done, caller, None)
                return
        except Error as error:
            done(answer_to(error, op), 0)
            return
        pending.then(partial(_ended, task, done))

    def _step(self, steps: Steps, task: Task, done: Done, caller: Caller, error: Error | None) -> None:
        """Go on until a call does not end at once; `error` is what the last one ended with."""
        while True:
            if caller.abandoned:
                steps.close()
                answer = sense.BUSY
                break
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
                    pending.then(partial(self._resume, steps, task, done, caller))
                    return
                error = pending.error
        done(answer, task.length if task.op is _READ and answer is _GOOD else 0)

    def _resume(self, steps: Steps, task: Task, done: Done, caller: Caller, ended: Pending) -> None:
        self._step(steps, task, done, caller, ended.error)
        self.node.unplug()  # outside of any batch of the frontend's


def _ended(task: Task, done: Done, pending: Pending) -> None:
    """The end of a command of one call."""
    if pending.error is not None:
        done(answer_to(pending.error, task.op), 0)
    else:
        done(_GOOD, task.length if task.op is _READ else 0)


def _exactly(buffers: Buffers, length: int) -> Buffers:
    """The first `length` bytes of an area that may be longer."""
    return buffers if size(buffers) == length else part(buffers, 0, length)


def _read_durable(node: Gate, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    """READ with FUA: what is read is on stable storage."""
    yield node.flush()
    yield node.read(task.offset, _exactly(data_in, task.length))
    return _GOOD


def _unmap(node: Gate, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    outcomes = [attempt(node.discard, offset, length) for offset, length in task.ranges]
    yield gather((pending for _, pending in outcomes), next((e for e, _ in outcomes if e is not None), None))
    if task.fua:
        yield node.flush()
    return _GOOD


def _write_same(node: Gate, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    if not task.pattern:
        yield node.zero(task.offset, task.length, task.fua, task.unmap)
        return _GOOD
    piece = memoryview(task.pattern * (min(PIECE, task.length) // len(task.pattern)))
    for at in range(0, task.length, PIECE):
        yield node.write(task.offset + at, [piece[: task.length - at]], task.fua)
    return _GOOD


def _verify(node: Gate, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
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


def _compare_and_write(node: Gate, task: Task, data_out: Buffers, data_in: Buffers) -> Steps:
    claim = node.claim(task.offset, task.length)
    try:
        yield claim.granted
        found = memoryview(bytearray(task.length))
        yield claim.read([found])
        difference = first_difference(found, b"".join(part(data_out, 0, task.length)))
        if difference is not None:
            return sense.miscompare(difference)
        yield claim.write(part(data_out, task.length, task.length), task.fua)
    finally:
        claim.release()
    return _GOOD


_STEPS: dict[Op, Callable[[Gate, Task, Buffers, Buffers], Steps]] = {
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
