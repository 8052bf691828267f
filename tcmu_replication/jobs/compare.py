"""The comparison of a whole disk with the peer's, by hash, while requests are forwarded.

Each span is hashed on both hosts at about the same time. Equal hashes prove it equal: a block that
differed and was then written is equal on both, since every write is forwarded. Different ones may
come from a write that was under way; so then requests are held and awaited, and the span is compared
again, block by block. What differs even now, differs.

Only hashes travel. What is known to be zero is not read. A peer that is lost for a while is waited for.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import Offload
from tcmu_replication.block.pending import settle
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.units import BLOCK, MiB

log = logging.getLogger(__name__)

SPAN = 4 * MiB
"""Hashed at once. More would keep the LUN held for longer where a span has to be compared again."""
AHEAD = 4
"""So many spans are under way."""
ASKED = 512
"""So many digests are asked for at once: a message of the control channel takes 64 KiB, and each has 67 characters."""
RETRY_S = 1.0
"""The pause before a peer that did not answer is asked again."""
DIGEST_SIZE = 32
"""Bytes of a BLAKE2b hash (RFC 7693): long enough that nobody can make two contents with one hash."""
ZERO = ""
"""The digest of what is all zero."""

_LOST = frozenset((Kind.PEER_LOST, Kind.TIMED_OUT))

Digests = Callable[[int, int, int], Awaitable[list[str]]]
"""(offset, length, piece) to the digest of each piece of the range. Raises `Error`."""


class Difference(NamedTuple):
    """A range of blocks that differ."""

    offset: int
    length: int


class Compare(Job):
    """Compares `mine` with what `theirs` tells; `differs` hears of each range as it is found.

    `quiet` holds new requests and waits for those under way. `threads` hash.
    `different` counts the bytes that differ, in whole blocks; `first` is where the first is.
    """

    def __init__(
        self,
        name: str,
        mine: Node,
        theirs: Digests,
        differs: Callable[[Difference], None],
        quiet: Callable[[], AbstractAsyncContextManager[None]],
        threads: Offload,
    ) -> None:
        super().__init__(name, "compare")
        self.length = mine.length
        self.different = 0
        self.first: int | None = None
        self._mine = mine
        self._theirs = theirs
        self._differs = differs
        self._quiet = quiet
        self._threads = threads

    async def run(self) -> None:
        """Compare everything. Raises `Error` if this host's disk cannot be read, or the peer refuses."""
        try:
            async for span in self._spans():
                await span
        except Error as error:
            self.failed_to = "read"
            self.end(JobStatus.FAILED, str(error))
            raise
        self.end(JobStatus.CONCLUDED)

    async def _spans(self) -> AsyncIterator[asyncio.Task[None]]:
        """The spans in their order, AHEAD of them under way."""
        under_way: list[asyncio.Task[None]] = []
        try:
            for offset in range(0, self.length, SPAN):
                if len(under_way) == AHEAD:
                    yield under_way.pop(0)
                under_way.append(asyncio.create_task(self._span(offset, min(SPAN, self.length - offset))))
            while under_way:
                yield under_way.pop(0)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _span(self, offset: int, length: int) -> None:
        while True:
            try:
                mine, theirs = await self._both(offset, length, length)
                if mine != theirs:
                    async with self._quiet():
                        self._blocks(offset, length, *await self._both(offset, length, BLOCK))
                break
            except Error as error:
                if error.kind not in _LOST:
                    raise
                log.info("%s: waits for the peer: %s", self.name, error)
            await asyncio.sleep(RETRY_S)
        self.offset += length

    async def _both(self, offset: int, length: int, piece: int) -> tuple[list[str], list[str]]:
        # Ours first: what is equal to it later is equal to what it has become, too.
        mine = await digests(self._mine, offset, length, piece, self._threads)
        theirs: list[str] = []
        for at in range(offset, offset + length, ASKED * piece):
            asked = min(ASKED * piece, offset + length - at)
            found = await self._theirs(at, asked, piece)
            if len(found) != -(-asked // piece):
                raise Error(
                    Kind.PEER_LIED,
                    f"the peer answered {len(found)} hashes of {asked} bytes, not {-(-asked // piece)}",
                )
            theirs += found
        return mine, theirs

    def _blocks(self, offset: int, length: int, mine: list[str], theirs: list[str]) -> None:
        for index, pair in enumerate(zip(mine, theirs, strict=True)):
            if pair[0] != pair[1]:
                at = offset + index * BLOCK
                found = Difference(at, min(BLOCK, offset + length - at))
                if self.first is None or at < self.first:
                    self.first = at
                self.different += BLOCK
                self._differs(found)


async def digests(disk: Node, offset: int, length: int, piece: int, threads: Offload) -> list[str]:
    """The digest of each piece of the range; the last may be shorter. Raises `Error`."""
    if all(extent.zero for extent in disk.extents(offset, length)):
        return [ZERO] * -(-length // piece)
    data = memoryview(bytearray(length))
    reading = disk.read(offset, [data])
    disk.unplug()
    await settle(reading)
    found: list[str] = await threads(lambda: _hash(data, piece), "hash").wait()
    return found


def _hash(data: memoryview, piece: int) -> list[str]:
    found = []
    for at in range(0, len(data), piece):
        part = data[at : at + piece]
        if part == _zeroes(len(part)):
            found.append(ZERO)
        else:
            found.append(hashlib.blake2b(part, digest_size=DIGEST_SIZE).hexdigest())
    return found


_NOTHING = memoryview(bytes(SPAN))


def _zeroes(length: int) -> memoryview:
    return _NOTHING[:length]
