"""The copy-before-write on a cold disk, against a model of plain bytes.

Requests overlap at random; the reads of old data end in any order, some with
an error; hidden's writes and syncs fail now and then. After every step the last
checkpoint can be read, and the disk holds what was acknowledged and nothing
else. The `Ledger` holds the order of steps against the overlay's contract.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.faults import Faults
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending, attempt
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import HeldOffload
from tests.unit.block.ledger import Ledger, blocks

BLOCK = 4096
LENGTH = 8 * BLOCK + 700


class Guarded(Memory):
    """A disk that is overwritten only where every block touched is in hidden, and stable if `durable`."""

    durable = False
    ledger: Ledger

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        self._check(offset, sum(map(len, buffers)))
        return super().write(offset, buffers, fua)

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        self._check(offset, length)
        return super().zero(offset, length, fua, unmap)

    def _check(self, offset: int, length: int) -> None:
        assert self.ledger.covers(offset, length), "overwritten before its old content was saved"
        assert not self.durable or blocks(offset, length) <= self.ledger.stable, "saved, but not for sure"


class Cold(Node):
    """Nothing of the disk is cached, unless `cached`: reads wait until the test ends them.

    A read gets its first bytes at once and the others when it ends, as from a real disk.
    """

    def __init__(self, disk: Memory) -> None:
        super().__init__("cold", disk.length, disk)
        self.cached = False
        self.reads: list[tuple[int, Buffers, Pending]] = []

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        if self.cached:
            return super().read(offset, buffers)
        self.child.read(offset, [buffers[0][: len(buffers[0]) // 2]])
        self.reads.append((offset, buffers, Pending()))
        return self.reads[-1][2]

    def end(self, number: int, error: Error | None = None) -> None:
        offset, (view,), pending = self.reads.pop(number)
        half = len(view) // 2
        if error is None:
            self.child.read(offset + half, [view[half:]])
        pending.complete(error)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Offset and length: mostly short, of any alignment."""
    offset = draw(st.integers(0, 8).map(lambda n: n * BLOCK) | st.integers(0, LENGTH - 1))
    length = draw(st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK, LENGTH]))
    return offset, min(length, LENGTH - offset)


class Request:
    """A request and how it ended: None for success."""

    def __init__(self, offset: int, data: bytes) -> None:
        self.offset = offset
        self.data = data
        self.ended: list[Error | None] = []


class ColdDisk(RuleBasedStateMachine):
    """Steps on the filter and on the model."""

    @initialize(durable=st.booleans())
    def start(self, durable: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="tcmu-replication-cold-"))
        self.offload = HeldOffload()
        self.disk = Guarded(LENGTH)
        self.disk.data[:] = bytes(n * 31 % 199 + 1 for n in range(LENGTH))
        self.disk.data[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
        self.disk.durable = durable
        self.cold = Cold(self.disk)
        self.epoch = 0
        self.stamp = 0
        self.errors = 0
        self.batches_fail = False
        self.base = self.top = bytes(self.disk.data)
        self.requests: list[Request] = []
        self.hidden = self.next_hidden()
        self.filter = CopyBeforeWrite(self.cold, self.hidden, durable)
        self.gate = Gate(self.filter)

    def next_hidden(self) -> Overlay:
        self.epoch += 1
        path = self.folder / f"{self.epoch}.hidden"
        hidden = Overlay.create("hidden", path, self.disk, offload=self.offload)
        self.data = hidden.data = Faults(hidden.data)
        self.ledger = self.disk.ledger = Ledger(hidden)
        return hidden

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            try:
                self.settle()
                self.hidden.release()
            finally:
                shutil.rmtree(self.folder)

    # Steps.

    @rule(
        at=ranges(),
        operation=st.sampled_from(["write", "write", "write", "fua", "zero", "discard"]),
        cached=st.sampled_from([False, False, True]),
    )
    def request(self, at: tuple[int, int], operation: str, cached: bool) -> None:
        self.stamp = self.stamp % 255 + 1
        data = bytes([self.stamp]) * at[1] if operation in ("write", "fua") else bytes(at[1])
        request = Request(at[0], data)
        self.requests.append(request)
        self.cold.cached = cached
        if operation in ("zero", "discard"):
            error, pending = attempt(getattr(self.gate, operation), *at)
        else:
            error, pending = attempt(self.gate.write, at[0], [memoryview(data)], operation == "fua")
        self.cold.cached = False
        if pending is None:
            request.ended.append(error)
        else:
            pending.then(lambda ended: request.ended.append(ended.error))
        self.check()

    @precondition(lambda self: self.cold.reads)
    @rule(number=st.integers(0, 99), good=st.sampled_from([True, True, True, False]))
    def read_ends(self, number: int, good: bool) -> None:
        self.errors += not good
        self.cold.end(number % len(self.cold.reads), None if good else Error(Kind.IO, "on cue"))
        self.check()

    @precondition(lambda self: self.offload.calls)
    @rule()
    def thread_ends(self) -> None:
        self.offload.run_next()
        self.check()

    @rule()
    def unplug(self) -> None:
        self.gate.unplug()
        self.check()

    @rule(skip=st.integers(0, 2))
    def hidden_is_full(self, skip: int) -> None:
        self.errors += 1
        self.data.fail("write", Kind.NO_SPACE, count=1, skip=skip, torn_after=100)

    @rule(of_marks=st.booleans())
    def sync_fails(self, of_marks: bool) -> None:
        self.batches_fail = True
        if of_marks:
            self.ledger.map_fails = Error(Kind.IO, "on cue")
        else:
            self.data.fail("flush", Kind.IO, count=1)

    @rule(number=st.integers(0, 99))
    def checkpoint(self, number: int) -> None:
        self.settle(number)
        old = self.hidden
        self.hidden = self.next_hidden()
        self.filter.retarget(self.hidden)
        old.destroy()
        self.top = self.base
        self.errors, self.batches_fail = 0, False
        self.check()

    # What the steps are made of.

    def settle(self, number: int = 0) -> None:
        """Let everything end."""
        self.gate.unplug()
        while self.cold.reads or self.offload.calls:
            if self.cold.reads:
                self.cold.end(number % len(self.cold.reads))
            else:
                self.offload.run_next()
        self.check()
        assert self.gate.drained() is None, "something waits for ever"
        assert all(request.ended for request in self.requests)
        assert not self.ledger.outstanding, "neither marked nor abandoned"
        failed = sum(request.ended != [None] for request in self.requests)
        assert self.batches_fail or failed <= self.errors, "an error fails who needed it, and nobody else"
        self.base = bytes(self.disk.data)
        self.requests.clear()
        self.errors = 0

    def check(self) -> None:
        """The checkpoint is whole; the disk holds the requests that have succeeded, in order, and no other."""
        assert bytes(self.hidden.fetch(0, LENGTH)) == self.top
        expected = bytearray(self.base)
        for request in self.requests:
            assert len(request.ended) <= 1
            if request.ended == [None]:
                expected[request.offset : request.offset + len(request.data)] = request.data
        assert self.disk.data == expected


TestColdDisk = ColdDisk.TestCase
TestColdDisk.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
