"""Events that come at most once a second."""

from __future__ import annotations

import asyncio

import pytest

from tcmu_replication.control import throttle
from tcmu_replication.control.schema import Link
from tcmu_replication.control.throttle import Throttle
from tcmu_replication.qemu.block_schema import QuorumFailure
from tests.support.tools import PATIENCE_S


def failure(node: str, sector: int) -> QuorumFailure:
    return QuorumFailure(reference=node, sector_num=sector, sectors_count=1)


def test_first_at_once_then_the_last_of_each_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "PERIOD_S", 0.5)
    sent: list[tuple[str, int]] = []
    third = asyncio.Event()

    def emit(name: str, data: object) -> None:
        assert isinstance(data, QuorumFailure)
        sent.append((data.reference, data.sector_num))
        if len(sent) == 3:
            third.set()

    async def main() -> None:
        limited = Throttle()
        for sector in range(5):
            limited.pass_on("QUORUM_FAILURE", failure("a", sector), emit)
        limited.pass_on("QUORUM_FAILURE", failure("b", 9), emit)
        assert sent == [("a", 0), ("b", 9)]
        await asyncio.wait_for(third.wait(), PATIENCE_S)
        assert sent[2] == ("a", 4)
        limited.pass_on("QUORUM_FAILURE", failure("a", 5), emit)
        assert len(sent) == 3
        limited.close()

    asyncio.run(main())


def test_other_events_are_never_held_back() -> None:
    sent: list[str] = []

    async def main() -> None:
        limited = Throttle()
        for _ in range(3):
            limited.pass_on("REPLICATION_LINK", Link(), lambda name, data: sent.append(name))

    asyncio.run(main())
    assert sent == ["REPLICATION_LINK"] * 3
