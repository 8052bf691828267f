"""The secondary's chain against a model of plain bytes.

    top := copy(sec)     at a checkpoint
    sec[range] := data   by a forwarded write; top unchanged
    top[range] := data   by an own write; sec unchanged

Under it: faults, torn writes, delayed reads raced by writes, the death of the
process between any two steps, durable batches or not, threads or not.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.faults import Faults, Rule
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import Pending, attempt
from tcmu_replication.errors import Error, Kind
from tests.unit.block.conftest import HeldOffload

BLOCK = 4096
LENGTH = 3 * BLOCK + 700


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Offset and length: whole blocks, edges of blocks, or anything."""
    edges = st.sampled_from(
        [n * BLOCK + d for n in range(4) for d in (-1, 0, 1) if n or d >= 0] + [LENGTH - 1]
    )
    start = draw(edges | st.integers(0, LENGTH - 1))
    end = draw(edges | st.integers(1, LENGTH) | st.just(LENGTH))
    start, end = min(start, end), max(start, end)
    return start, max(1, end - start)


class Fault(NamedTuple):
    """One call that is to fail in the next step."""

    place: str
    operation: str
    torn_after: int


FAULTS = (
    st.none()
    | st.none()
    | st.none()
    | st.none()
    | st.builds(
        Fault,
        st.sampled_from(["disk", "hidden", "active"]),
        st.sampled_from(["write", "write", "fetch", "zero", "discard", "flush"]),
        st.sampled_from([0, 0, 1, BLOCK, BLOCK + 5, 2 * BLOCK]),
    )
)
WRITES = st.sampled_from(["write", "write", "write", "fua", "zero", "discard"])


Write = tuple[tuple[int, int], str, Fault | None]


class Forwarded(NamedTuple):
    """A write from the primary since the disk was last looked at. `ended` gets None or the error."""

    offset: int
    data: bytes
    ended: list[Error | None]


class Read(NamedTuple):
    """A delayed read: what the top was at any time since it began."""

    offset: int
    into: bytearray
    pending: Pending
    tops: list[bytes]
    rule: Rule


class Chain(RuleBasedStateMachine):
    """Steps on the chain and on the model."""

    @initialize(durable=st.booleans(), threads=st.booleans())
    def start(self, durable: bool, threads: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="tcmu-replication-chain-"))
        self.durable = durable
        self.offload = HeldOffload() if threads else None
        self.memory = Memory(LENGTH)
        self.memory.data[:] = bytes(n * 31 % 199 + 1 for n in range(LENGTH))
        self.memory.data[BLOCK : 2 * BLOCK] = bytes(BLOCK)
        self.epoch = 0
        self.stamp = 0
        self.sec = bytes(self.memory.data)
        self.top = self.sec
        self.forwarded: list[Forwarded] = []
        self.reads: list[Read] = []
        self.open(Overlay.create)

    def open(self, make: Callable[..., Overlay]) -> None:
        self.disk = Faults(self.memory)
        self.hidden = make("hidden", self.folder / f"{self.epoch}.hidden", self.disk, offload=self.offload)
        self.active = make("active", self.folder / f"{self.epoch}.active", self.hidden, offload=self.offload)
        self.hidden.data = Faults(self.hidden.data)
        self.active.data = Faults(self.active.data)
        self.filter = CopyBeforeWrite(self.disk, self.hidden, self.durable)
        self.primary, self.lun = Gate(self.filter), Gate(self.active)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            try:
                self.settle()
                self.active.close()
            finally:
                shutil.rmtree(self.folder)

    # Steps.

    @rule(writes=st.lists(st.tuples(ranges(), WRITES, FAULTS), min_size=1, max_size=4))
    def own_writes(self, writes: list[Write]) -> None:
        for write in writes:
            self.own_write(*write)

    @rule(writes=st.lists(st.tuples(ranges(), WRITES, FAULTS), min_size=1, max_size=6))
    def forwarded_writes(self, writes: list[Write]) -> None:
        for write in writes:
            self.forwarded_write(*write)

    @rule(
        at=ranges(),
        torn_after=st.sampled_from([0, 1, BLOCK, BLOCK + 5]),
        own=st.lists(st.tuples(ranges(), WRITES, FAULTS), max_size=1),
        forwarded=st.lists(st.tuples(ranges(), WRITES, FAULTS), min_size=1, max_size=3),
    )
    def raced_read(
        self, at: tuple[int, int], torn_after: int, own: list[Write], forwarded: list[Write]
    ) -> None:
        """A read that the disk answers late, and partly sooner than the rest; writes come in between."""
        self.begin_read(at, torn_after)
        self.forwarded_writes(forwarded)
        self.own_writes(own)
        self.primary.unplug()
        self.run_threads()
        while self.reads:
            self.end_read(self.reads.pop(0))

    @rule(fault=FAULTS)
    def unplug(self, fault: Fault | None) -> None:
        armed = self.arm(fault)
        self.primary.unplug()
        armed.cancel()
        self.check_top()

    @precondition(lambda self: self.offload is not None and self.offload.calls)
    @rule(fault=FAULTS)
    def thread_ends(self, fault: Fault | None) -> None:
        assert self.offload is not None
        armed = self.arm(fault)
        self.offload.run_next()
        armed.cancel()
        self.check_top()

    @rule(side=st.sampled_from(["lun", "primary"]))
    def flush(self, side: str) -> None:
        gate: Gate = getattr(self, side)
        gate.flush()
        self.check_top()

    @rule()
    def checkpoint(self) -> None:
        self.settle()
        old = self.hidden, self.active
        self.epoch += 1
        self.hidden = Overlay.create(
            "hidden", self.folder / f"{self.epoch}.hidden", self.disk, offload=self.offload
        )
        self.active = Overlay.create(
            "active", self.folder / f"{self.epoch}.active", self.hidden, offload=self.offload
        )
        self.hidden.data = Faults(self.hidden.data)
        self.active.data = Faults(self.active.data)
        holds = [gate.hold() for gate in (self.primary, self.lun)]
        assert self.primary.drained() is self.lun.drained() is None
        self.filter.retarget(self.hidden)
        self.lun.swap(self.active)
        for hold in reversed(holds):
            hold.release()
        for overlay in old:
            overlay.destroy()
        self.top = self.sec
        self.check_top()

    @rule()
    def look_at_the_disk(self) -> None:
        self.settle()

    @rule()
    def process_dies(self) -> None:
        """Whatever waits in memory is gone; what the kernel was given is not."""
        self.reads.clear()
        if self.offload is not None:
            self.offload = HeldOffload()
        # Not closed as a living process would: a File in use by a thread would stay locked.
        for overlay in (self.active, self.hidden):
            for file in (overlay.map.file.node, overlay.data.child):
                file._in_threads = 0  # type: ignore[union-attr]
            overlay.release()
        self.open(Overlay)
        self.check_disk()
        self.check_top()

    # What the steps are made of.

    def own_write(self, at: tuple[int, int], operation: str, fault: Fault | None) -> None:
        data = self.payload(at[1], operation)
        ended = self.change(self.lun, at, operation, data, fault)
        before, after = self.top, bytes(self.active.fetch(0, LENGTH))
        expected = overwritten(before, at[0], data)
        if ended in ([], [None]) and operation != "discard":
            assert after == expected
        else:
            assert_each_byte(after, [before, expected])
        self.top = after
        for read in self.reads:
            read.tops.append(after)

    def forwarded_write(self, at: tuple[int, int], operation: str, fault: Fault | None) -> None:
        data = self.payload(at[1], operation)
        ended = self.change(self.primary, at, operation, data, fault)
        self.forwarded.append(Forwarded(at[0], data, ended))
        self.check_top()

    def begin_read(self, at: tuple[int, int], torn_after: int) -> None:
        rule = self.disk.delay("read", torn_after=torn_after)
        into = bytearray(at[1])
        cut = at[1] // 3
        pending = self.lun.read(at[0], [memoryview(into)[:cut], memoryview(into)[cut:]])
        rule.cancel()
        if pending is None:
            assert into == self.top[at[0] : at[0] + at[1]]
        else:
            self.reads.append(Read(at[0], into, pending, [self.top], rule))

    def payload(self, length: int, operation: str) -> bytes:
        self.stamp = self.stamp % 255 + 1
        return bytes([self.stamp]) * length if operation in ("write", "fua") else bytes(length)

    def change(
        self, gate: Gate, at: tuple[int, int], operation: str, data: bytes, fault: Fault | None
    ) -> list[Error | None]:
        """Make the call; a list that gets its end."""
        cut = at[1] // 3
        views = [memoryview(data)[:cut], memoryview(data)[cut:]]
        call: Callable[..., Pending | None]
        args: tuple[Any, ...]
        call, args = {
            "write": (gate.write, (at[0], views)),
            "fua": (gate.write, (at[0], views, True)),
            "zero": (gate.zero, at),
            "discard": (gate.discard, at),
        }[operation]
        armed = self.arm(fault)
        error, pending = attempt(call, *args)
        armed.cancel()
        ended: list[Error | None] = []
        if pending is None:
            ended.append(error)
        else:
            pending.then(lambda p: ended.append(p.error))
        return ended

    def arm(self, fault: Fault | None) -> Rule:
        if fault is None:
            return self.disk.fail("write", count=0)
        places = {"disk": self.disk, "hidden": self.hidden.data, "active": self.active.data}
        place = places[fault.place]
        assert isinstance(place, Faults)
        return place.fail(fault.operation, Kind.NO_SPACE, count=1, torn_after=fault.torn_after)

    def run_threads(self) -> None:
        while self.offload is not None and self.offload.calls:
            self.offload.run_next()

    def settle(self) -> None:
        """Let everything end, and look at the disk."""
        self.primary.unplug()
        self.run_threads()
        while self.reads:
            self.end_read(self.reads.pop(0))
        assert self.primary.drained() is None
        assert self.lun.drained() is None
        assert all(len(write.ended) == 1 for write in self.forwarded)
        self.check_disk()
        self.check_top()

    def end_read(self, read: Read) -> None:
        read.rule.release()
        self.run_threads()
        assert read.pending.done
        assert read.pending.error is None
        offset, end = read.offset, read.offset + len(read.into)
        while offset < end:
            after = min(end, offset - offset % BLOCK + BLOCK)
            piece = read.into[offset - read.offset : after - read.offset]
            assert piece in [top[offset:after] for top in read.tops], "a mix of no point in time"
            offset = after

    def check_top(self) -> None:
        assert bytes(self.active.fetch(0, LENGTH)) == self.top

    def check_disk(self) -> None:
        """Every write that succeeded is there, in order; others are there, or not, byte by byte."""
        actual = bytes(self.memory.data)
        expected = self.sec
        for write in self.forwarded:
            expected = overwritten(expected, write.offset, write.data)
        if all(write.ended == [None] for write in self.forwarded):
            assert actual == expected
        else:
            alone = [overwritten(self.sec, write.offset, write.data) for write in self.forwarded]
            assert_each_byte(actual, [self.sec, *alone])
        self.sec = actual
        self.forwarded.clear()


def overwritten(base: bytes, offset: int, data: bytes) -> bytes:
    return base[:offset] + data + base[offset + len(data) :]


def assert_each_byte(actual: bytes, candidates: list[bytes]) -> None:
    for offset, values in enumerate(zip(actual, *candidates, strict=True)):
        assert values[0] in values[1:], f"byte {offset} was never written"


TestChain = Chain.TestCase
TestChain.settings = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
