"""The switch: learning, flooding and each fault."""

from __future__ import annotations

import pytest

from tests.lab.switch import Switch

A, B, C = (bytes([2, 0, 0, 0, 0, n]) for n in (1, 2, 3))
ALL = b"\xff" * 6


def frame(destination: bytes, source: bytes) -> bytes:
    return destination + source + b"\x08\x00payload"


@pytest.fixture
def switch() -> Switch:
    return Switch(["a", "b", "c"])


def targets(switch: Switch, port: str, data: bytes) -> list[str]:
    return [target for _, target in switch.forward(port, data, 0.0)]


def test_unknown_destination_goes_to_all_but_the_sender(switch: Switch) -> None:
    assert targets(switch, "a", frame(B, A)) == ["b", "c"]


def test_learnt_destination_goes_to_its_port_only(switch: Switch) -> None:
    targets(switch, "b", frame(ALL, B))
    assert targets(switch, "a", frame(B, A)) == ["b"]


def test_broadcast_goes_to_all_even_when_all_are_known(switch: Switch) -> None:
    for port, address in (("a", A), ("b", B), ("c", C)):
        targets(switch, port, frame(ALL, address))
    assert targets(switch, "b", frame(ALL, B)) == ["a", "c"]


def test_address_that_moved_is_found_at_its_new_port(switch: Switch) -> None:
    targets(switch, "a", frame(ALL, A))
    targets(switch, "b", frame(ALL, A))
    assert targets(switch, "c", frame(A, C)) == ["b"]


def test_frame_to_an_address_of_its_own_port_goes_nowhere(switch: Switch) -> None:
    targets(switch, "a", frame(ALL, B))
    assert targets(switch, "a", frame(B, A)) == []


@pytest.mark.parametrize("length", [0, 1, 11])
def test_frame_without_whole_addresses_goes_nowhere(switch: Switch, length: int) -> None:
    assert targets(switch, "a", frame(B, A)[:length]) == []


def test_cut_stops_both_directions_of_that_pair_only(switch: Switch) -> None:
    switch.faults.cut.add(frozenset("ab"))
    assert targets(switch, "a", frame(ALL, A)) == ["c"]
    assert targets(switch, "b", frame(ALL, B)) == ["c"]
    assert targets(switch, "c", frame(ALL, C)) == ["a", "b"]
    assert switch.dropped == 2


def test_delay_is_added_to_the_time_of_arrival(switch: Switch) -> None:
    switch.faults.delay_s = 0.25
    assert list(switch.forward("a", frame(ALL, A), 10.0)) == [(10.25, "b"), (10.25, "c")]


def test_drop_of_everything_and_of_nothing(switch: Switch) -> None:
    switch.faults.drop = 1.0
    assert targets(switch, "a", frame(ALL, A)) == []
    switch.faults.drop = 0.0
    assert targets(switch, "a", frame(ALL, A)) == ["b", "c"]


def test_drop_loses_about_its_part_and_the_same_frames_for_the_same_seed(switch: Switch) -> None:
    targets(switch, "b", frame(ALL, B))
    switch.faults.drop = 0.25

    def passed() -> list[bool]:
        switch.seed(7)
        return [bool(targets(switch, "a", frame(B, A))) for _ in range(1000)]

    first = passed()
    assert 650 < sum(first) < 850
    assert passed() == first
