"""The door: what it refuses, what it counts, and the hold of a checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tcmu_replication.block.gate import SPAN, Gate
from tcmu_replication.block.memory import Memory
from tcmu_replication.block.node import Buffers, Node
from tcmu_replication.block.pending import Pending
from tcmu_replication.errors import Error, Kind

LENGTH = 8192


class Slow(Node):
    """Answers every write and flush when the test says so."""

    def __init__(self) -> None:
        super().__init__("slow", LENGTH)
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[Pending] = []
        self.unplugged = 0

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending:
        return self._later("write", offset, bytes(buffers[0]), fua)

    def read(self, offset: int, buffers: Buffers) -> None:
        return None

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending:
        return self._later("zero", offset, length)

    def discard(self, offset: int, length: int) -> Pending:
        return self._later("discard", offset, length)

    def flush(self) -> Pending:
        return self._later("flush")

    def unplug(self) -> None:
        self.unplugged += 1

    def _later(self, *call: Any) -> Pending:
        self.calls.append(call)
        self.answers.append(Pending())
        return self.answers[-1]


def data(text: bytes) -> list[memoryview]:
    return [memoryview(text)]


OUTSIDE = [(-1, 1), (LENGTH, 1), (LENGTH - 1, 2), (1 << 70, 1), (0, LENGTH + 1)]
CALLS: dict[str, Callable[[Gate, int, int], Any]] = {
    "read": lambda gate, offset, length: gate.read(offset, [memoryview(bytearray(length))]),
    "fetch": lambda gate, offset, length: gate.fetch(offset, length),
    "write": lambda gate, offset, length: gate.write(offset, [memoryview(bytes(length))]),
    "zero": lambda gate, offset, length: gate.zero(offset, length),
    "discard": lambda gate, offset, length: gate.discard(offset, length),
    "extents": lambda gate, offset, length: gate.extents(offset, length),
}


@pytest.mark.parametrize(("offset", "length"), OUTSIDE)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gate_refuses_what_is_outside_and_counts_nothing(
    call: Callable[[Gate, int, int], Any], offset: int, length: int
) -> None:
    gate = Gate(Memory(LENGTH))
    with pytest.raises(Error) as caught:
        call(gate, offset, length)
    assert caught.value.kind is Kind.OUT_OF_RANGE
    assert (gate.reads, gate.writes, gate.bytes_read, gate.bytes_written) == (0, 0, 0, 0)


@pytest.mark.parametrize("call", [CALLS["zero"], CALLS["discard"], CALLS["extents"], CALLS["fetch"]])
def test_gate_refuses_negative_lengths(call: Callable[[Gate, int, int], Any]) -> None:
    with pytest.raises(Error) as caught:
        call(Gate(Memory(LENGTH)), 10, -1)
    assert caught.value.kind is Kind.OUT_OF_RANGE


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("offset", [0, 100, LENGTH])
def test_gate_nothing_of_nothing_is_done_at_once(call: Callable[[Gate, int, int], Any], offset: int) -> None:
    gate = Gate(Slow())
    gate.hold()
    assert call(gate, offset, 0) in (None, [], b"")


@pytest.mark.parametrize("call", [CALLS["write"], CALLS["zero"], CALLS["discard"]])
def test_gate_read_only(call: Callable[[Gate, int, int], Any]) -> None:
    gate = Gate(Memory(LENGTH, read_only=True))
    with pytest.raises(Error) as caught:
        call(gate, 0, 1)
    assert caught.value.kind is Kind.READ_ONLY
    assert gate.read(0, [memoryview(bytearray(1))]) is None


def test_gate_counts_what_passes() -> None:
    gate = Gate(Memory(LENGTH))
    gate.write(LENGTH - 3, data(b"ab"))
    gate.zero(0, 100)
    gate.read(LENGTH - 3, [memoryview(bytearray(1)), memoryview(bytearray(2))])
    assert (gate.reads, gate.writes, gate.bytes_read, gate.bytes_written) == (1, 2, 3, 102)
    assert gate.in_flight == 0
    assert gate.drained() is None


def test_gate_drained_when_the_last_in_flight_has_ended() -> None:
    slow = Slow()
    gate = Gate(slow)
    gate.write(0, data(b"a"))
    gate.flush()
    gate.hold()
    assert slow.unplugged == 1, "what was gathered must start, or it never drains"
    drained = gate.drained()
    assert drained is not None
    assert gate.drained() is drained
    slow.answers[1].complete()
    assert not drained.done
    slow.answers[0].complete(Error(Kind.IO))
    assert drained.done
    assert drained.error is None
    assert gate.drained() is None


def test_gate_held_requests_run_in_order_at_release() -> None:
    slow = Slow()
    gate = Gate(slow)
    hold = gate.hold()
    waited = [gate.write(0, data(b"a")), gate.flush(), gate.write(1, data(b"b"), True)]
    assert slow.calls == []
    assert gate.held
    assert gate.waiting == 3
    hold.release()
    assert slow.calls == [("write", 0, b"a", False), ("flush",), ("write", 1, b"b", True)]
    assert not gate.held
    assert gate.in_flight == 3
    slow.answers[2].complete(Error(Kind.NO_SPACE))
    slow.answers[0].complete()
    assert [pending is not None and pending.done for pending in waited] == [True, False, True]
    assert waited[2] is not None
    assert waited[2].error is not None
    assert waited[2].error.kind is Kind.NO_SPACE


def test_gate_held_requests_that_end_at_once() -> None:
    gate = Gate(Memory(LENGTH))
    hold = gate.hold()
    into = bytearray(2)
    calls = [
        gate.write(0, data(b"ab")),
        gate.zero(1, 1),
        gate.discard(4096, 1),
        gate.read(0, [memoryview(into)]),
    ]
    assert into == b"\0\0"
    hold.release()
    assert all(pending is not None and pending.done and pending.error is None for pending in calls)
    assert into == b"a\0"


def test_gate_request_made_during_release_comes_after_those_that_waited() -> None:
    gate = Gate(memory := Memory(LENGTH))
    hold = gate.hold()
    first = gate.write(0, data(b"1"))
    assert first is not None
    first.then(lambda _: gate.write(0, data(b"3")) and None)
    gate.write(0, data(b"2"))
    hold.release()
    assert memory.data[:1] == b"3"
    assert not gate.held


def test_gate_held_again_during_release_keeps_the_rest_waiting() -> None:
    gate = Gate(memory := Memory(LENGTH))
    hold = gate.hold()
    again = []
    first = gate.write(0, data(b"1"))
    gate.write(0, data(b"2"))
    assert first is not None
    first.then(lambda _: again.append(gate.hold()))
    hold.release()
    assert gate.held
    assert gate.waiting == 1
    assert memory.data[:1] == b"1"
    again[0].release()
    assert memory.data[:1] == b"2"


def test_gate_is_held_until_the_last_of_several_holds_is_released() -> None:
    gate = Gate(memory := Memory(LENGTH))
    one, other = gate.hold(), gate.hold()
    gate.write(0, data(b"1"))
    one.release()
    one.release()
    assert gate.held
    assert memory.data[:1] == b"\0"
    other.release()
    assert not gate.held
    assert memory.data[:1] == b"1"


def test_gate_hold_whose_time_is_up_is_released_and_says_so() -> None:
    async def story() -> None:
        gate = Gate(Memory(LENGTH))
        hold = gate.hold(0.001)
        waited = gate.write(0, data(b"1"))
        assert waited is not None
        await waited.wait()
        assert hold.expired
        with pytest.raises(Error, match="the checkpoint took too long") as late:
            hold.check("the checkpoint")
        assert late.value.kind is Kind.TIMED_OUT
        hold.release()
        again = gate.hold(3600)
        again.release()
        assert not again.expired
        assert not gate.held

    asyncio.run(story())


def test_gate_bad_requests_are_refused_at_once_even_while_held() -> None:
    gate = Gate(Memory(LENGTH))
    gate.hold()
    with pytest.raises(Error):
        gate.write(LENGTH, data(b"x"))


def test_gate_swaps_what_lies_below_only_when_quiet() -> None:
    slow = Slow()
    gate = Gate(slow)
    other = Memory(LENGTH, read_only=True)
    with pytest.raises(Error) as caught:
        gate.swap(other)
    assert caught.value.kind is Kind.INVALID_STATE
    gate.write(0, data(b"a"))
    hold = gate.hold()
    with pytest.raises(Error) as caught:
        gate.swap(other)
    assert caught.value.kind is Kind.INVALID_STATE
    slow.answers[0].complete()
    with pytest.raises(Error) as caught:
        gate.swap(Memory(LENGTH - 1))
    assert caught.value.kind is Kind.BAD_CONFIG
    assert gate.swap(other) is slow
    hold.release()
    assert gate.read_only
    assert gate.child is other


def test_gate_write_to_a_claimed_range_waits_and_others_pass() -> None:
    """A8: whichever frontend brings it."""
    slow = Slow()
    gate = Gate(slow)
    claim = gate.claim(512, 512)
    assert claim.granted is None
    waits = [gate.write(0, data(b"x" * 513)), gate.zero(1023, 1), gate.discard(600, 8)]
    assert slow.calls == []
    assert gate.in_flight == 4
    gate.write(1024, data(b"z"))
    assert slow.calls == [("write", 1024, b"z", False)]
    assert gate.read(512, [memoryview(bytearray(1))]) is None
    claim.write(data(b"c" * 512))
    slow.answers[1].complete()
    before = slow.unplugged
    claim.release()
    assert slow.unplugged > before
    assert [call[:2] for call in slow.calls[2:]] == [("write", 0), ("zero", 1023), ("discard", 600)]
    for answer in slow.answers:
        if not answer.done:
            answer.complete()
    assert all(waited is not None and waited.done for waited in waits)
    assert gate.in_flight == 0
    gate.write(512, data(b"n"))
    assert slow.calls[-1] == ("write", 512, b"n", False), "nothing is left of the claim"


def test_gate_claim_waits_for_the_writes_under_way_on_its_range() -> None:
    slow = Slow()
    gate = Gate(slow)
    gate.write(0, data(b"x" * 100))
    gate.write(50, data(b"y" * 100))
    gate.write(512, data(b"z"))
    claim = gate.claim(0, 512)
    assert claim.granted is not None
    gate.write(0, data(b"later"))
    slow.answers[1].complete(Error(Kind.IO))
    assert not claim.granted.done
    slow.answers[0].complete()
    assert claim.granted.done
    assert claim.granted.error is None
    assert len(slow.calls) == 3
    claim.release()
    assert slow.calls[3] == ("write", 0, b"later", False)


def test_gate_claim_is_in_flight_and_passes_a_hold() -> None:
    slow = Slow()
    gate = Gate(slow)
    claim = gate.claim(0, 512)
    waited = gate.write(0, data(b"w" * 512))
    hold = gate.hold()
    drained = gate.drained()
    assert drained is not None
    late = gate.write(0, data(b"l" * 512))
    claim.write(data(b"c" * 512))
    slow.answers[0].complete()
    claim.release()
    slow.answers[1].complete()
    assert waited is not None
    assert waited.done
    assert drained.done
    assert [call[2][:1] for call in slow.calls] == [b"c", b"w"]
    hold.release()
    assert slow.calls[2][2] == b"l" * 512
    slow.answers[2].complete()
    assert late is not None
    assert late.done


def test_gate_claim_of_a_held_gate_stands_in_line_with_what_waits() -> None:
    slow = Slow()
    gate = Gate(slow)
    hold = gate.hold()
    gate.write(0, data(b"a" * 512))
    claim = gate.claim(0, 512)
    gate.write(0, data(b"b" * 512))
    assert gate.in_flight == 0
    hold.release()
    assert claim.granted is not None
    assert not claim.granted.done
    slow.answers[0].complete()
    assert claim.granted.done
    assert len(slow.calls) == 1
    claim.release()
    assert slow.calls[1][2] == b"b" * 512


@pytest.mark.parametrize(("offset", "length"), [*OUTSIDE, (0, -1)])
def test_gate_refuses_claims_outside(offset: int, length: int) -> None:
    with pytest.raises(Error) as caught:
        Gate(Memory(LENGTH)).claim(offset, length)
    assert caught.value.kind is Kind.OUT_OF_RANGE


def test_gate_refuses_claims_of_a_read_only_disk() -> None:
    with pytest.raises(Error) as caught:
        Gate(Memory(LENGTH, read_only=True)).claim(0, 1)
    assert caught.value.kind is Kind.READ_ONLY


LONG: dict[str, Callable[[Gate], Pending | None]] = {
    "zero": lambda gate: gate.zero(512, 2 * SPAN + 1024),
    "discard": lambda gate: gate.discard(512, 2 * SPAN + 1024),
}


@pytest.mark.parametrize("operation", LONG)
def test_long_zero_and_discard_go_in_spans_and_later_writes_to_the_range_wait(operation: str) -> None:
    """A2: the kernel may have to write all of it, on the loop."""
    slow = Slow()
    slow.length = 4 * SPAN
    gate = Gate(slow)
    whole = LONG[operation](gate)
    beside, over = gate.write(0, data(b"beside")), gate.write(2 * SPAN, data(b"newer"))
    assert slow.calls == [(operation, 512, SPAN), ("write", 0, b"beside", False)]
    slow.answers[1].complete()
    slow.answers[0].complete()
    assert slow.calls[2:] == [(operation, 512 + SPAN, SPAN)]
    slow.answers[2].complete()
    assert slow.calls[3:] == [(operation, 512 + 2 * SPAN, 1024)]
    assert gate.drained() is not None
    assert whole is not None
    assert not whole.done
    slow.answers[3].complete()
    assert whole.done
    assert slow.calls[4:] == [("write", 2 * SPAN, b"newer", False)]
    slow.answers[4].complete()
    for pending in (beside, over):
        assert pending is not None
        assert pending.done
    assert gate.in_flight == 0


@pytest.mark.parametrize("operation", LONG)
def test_long_zero_and_discard_end_with_the_span_that_fails(operation: str) -> None:
    slow = Slow()
    slow.length = 4 * SPAN
    gate = Gate(slow)
    whole = LONG[operation](gate)
    slow.answers[0].complete(Error(Kind.NO_SPACE, "full"))
    assert whole is not None
    assert whole.error is not None
    assert whole.error.kind is Kind.NO_SPACE
    assert len(slow.calls) == 1
    assert gate.in_flight == 0


def test_long_zero_waits_for_the_release_of_a_hold() -> None:
    slow = Slow()
    slow.length = 4 * SPAN
    gate = Gate(slow)
    hold = gate.hold()
    gate.zero(0, 2 * SPAN)
    assert not slow.calls
    hold.release()
    assert slow.calls == [("zero", 0, SPAN)]


def test_long_zero_of_a_disk_that_ends_calls_at_once_lets_others_have_their_turn() -> None:
    async def story() -> None:
        disk = Memory(2 * SPAN)
        disk.data[:] = b"x" * len(disk.data)
        gate = Gate(disk)
        pending = gate.zero(0, 2 * SPAN)
        assert pending is not None
        assert not pending.done
        assert disk.data.count(0) == SPAN
        await pending.wait()
        assert disk.data.count(0) == 2 * SPAN

    asyncio.run(story())
