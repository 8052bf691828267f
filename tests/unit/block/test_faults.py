"""Faults on cue: the right call, as often as asked, with the effect that was asked for."""

from __future__ import annotations

import pytest

from tcmu_replication.block.faults import Faults
from tcmu_replication.block.memory import Memory
from tcmu_replication.errors import Error, Kind


@pytest.fixture
def faults() -> Faults:
    return Faults(Memory(100))


def test_faults_without_rules_passes_everything(faults: Faults) -> None:
    faults.write(0, [memoryview(b"abc")])
    faults.zero(1, 1)
    faults.discard(2, 1)
    faults.flush()
    into = bytearray(3)
    faults.read(0, [memoryview(into)])
    assert into == b"a\0\0" == bytes(faults.fetch(0, 3))


def test_faults_fail_meets_operation_range_skip_and_count(faults: Faults) -> None:
    rule = faults.fail("write", Kind.NO_SPACE, offset=10, length=10, skip=1, count=2)
    outcomes = []
    for offset in (9, 20, 19, 10, 12, 11, 11):
        try:
            faults.write(offset, [memoryview(b"x")])
            outcomes.append("")
        except Error as error:
            outcomes.append(f"{error.kind.name} {error.offset}")
    assert outcomes == ["", "", "", "NO_SPACE 10", "NO_SPACE 12", "", ""]
    assert rule.met == 2
    faults.zero(10, 10)


@pytest.mark.parametrize("operation", ["read", "fetch", "zero", "discard", "flush"])
def test_faults_fail_every_operation(faults: Faults, operation: str) -> None:
    rule = faults.fail(operation)
    arguments = {"read": (0, [memoryview(bytearray(1))]), "flush": ()}.get(operation, (0, 1))
    with pytest.raises(Error, match="on cue"):
        getattr(faults, operation)(*arguments)
    rule.cancel()
    getattr(faults, operation)(*arguments)


def test_faults_torn_write_has_its_beginning(faults: Faults) -> None:
    faults.fail("write", torn_after=3)
    with pytest.raises(Error):
        faults.write(5, [memoryview(b"ab"), memoryview(b"cd")])
    assert bytes(faults.fetch(4, 6)) == b"\0abc\0\0"


def test_faults_delayed_read_sees_what_is_there_at_release(faults: Faults) -> None:
    rule = faults.delay("read", torn_after=1)
    into = bytearray(b"..")
    pending = faults.read(0, [memoryview(into)])
    assert pending is not None
    faults.write(0, [memoryview(b"ab")])
    assert into == b"\0."
    rule.release()
    assert pending.done
    assert into == b"\0b"
    rule.release()


def test_faults_delayed_call_passes_its_failure_on(faults: Faults) -> None:
    inner = Faults(faults)
    rule = inner.delay("write")
    faults.fail("write", Kind.TIMED_OUT)
    pending = inner.write(0, [memoryview(b"x")])
    assert pending is not None
    rule.release()
    assert pending.error is not None
    assert pending.error.kind is Kind.TIMED_OUT
