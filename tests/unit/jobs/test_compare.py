"""The comparison of two disks by hash: what the peer is asked, and what its answers may not be."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import msgspec
import pytest

from tcmu_replication.block.memory import Memory
from tcmu_replication.block.offload import Offload
from tcmu_replication.control import framing, schema
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.compare import Compare, Difference, digests
from tcmu_replication.units import BLOCK, MiB

LENGTH = 5 * MiB


@asynccontextmanager
async def quiet():
    yield


def compare(mine: Memory, theirs: Memory, change=lambda found: found) -> tuple[list[Difference], list[int]]:
    """The differences, and the bytes of each answer as it goes over the control channel."""
    found: list[Difference] = []
    sizes: list[int] = []

    async def story() -> None:
        threads = Offload(threads=1)
        try:

            async def told(offset: int, length: int, piece: int) -> list[str]:
                answer = await digests(theirs, offset, length, piece, threads)
                sizes.append(
                    len(
                        framing.encode(
                            {"return": msgspec.to_builtins(schema.PeerDigests(digests=answer)), "id": 1}
                        )
                    )
                )
                return change(answer)

            await Compare("compare", mine, told, found.append, quiet, threads).run()
        finally:
            threads.close()

    asyncio.run(story())
    return found, sizes


def test_disks_that_differ_everywhere_need_no_answer_longer_than_a_message() -> None:
    """1024 digests are: the comparison then asked again and again, for ever."""
    mine, theirs = Memory(LENGTH), Memory(LENGTH)
    theirs.data[:] = random.Random(1).randbytes(LENGTH)
    found, sizes = compare(mine, theirs)
    assert sum(difference.length for difference in found) == LENGTH
    assert len(found) == LENGTH // BLOCK
    assert max(sizes) < framing.MAX_LENGTH


def test_one_block_that_differs_is_found() -> None:
    mine, theirs = Memory(LENGTH), Memory(LENGTH)
    theirs.data[3 * MiB + 5] = 1
    found, _ = compare(mine, theirs)
    assert found == [Difference(3 * MiB, BLOCK)]


@pytest.mark.parametrize("change", [lambda found: found[1:], lambda found: [*found, ""], lambda found: []])
def test_answer_with_another_number_of_digests_is_a_lie(change) -> None:
    with pytest.raises(Error) as refused:
        compare(Memory(LENGTH), Memory(LENGTH), change)
    assert refused.value.kind is Kind.PEER_LIED
