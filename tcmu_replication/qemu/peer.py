"""The `Peer` of `replication.peer_state` where the secondary is QEMU's: there is no control channel of ours.

QEMU cannot say which epoch it is in. With its QMP socket a checkpoint of the
pair is given there, while no write is in flight (QEMU would abort if one were);
without it the primary only holds and drains, and who controls QEMU sees to the
rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tcmu_replication.control.connection import Connection
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.peer_state import News, PeerState
from tcmu_replication.replication.stages import Stage

GENERATION = "qemu"
"""QEMU has nothing that would tell one pairing from the next."""


class QemuPeer:
    """A QEMU of a disk of `length` bytes, in the `epoch()` that we count for it; `timeout` in seconds."""

    def __init__(self, qmp: str | None, length: int, timeout: float, epoch: Callable[[], int]) -> None:
        self._qmp = qmp
        self._length = length
        self._timeout = timeout
        self._epoch = epoch

    async def hello(self, news: News, *, settled: bool = False) -> PeerState:
        """As far as can be known. Raises `Error`, INVALID_STATE if QEMU says that replication does not run."""
        if self._qmp is not None:
            status = await self._execute("query-xen-replication-status")
            if status.get("error"):
                raise Error(Kind.INVALID_STATE, f"QEMU's secondary: {status.get('desc', 'an error')}")
        return PeerState(Stage.RUNNING, max(1, self._epoch()), GENERATION, self._length, None)

    async def prepare(self, epoch: int) -> None:
        """Nothing can be prepared."""

    async def resync(self, name: str) -> bool:
        """It cannot be told: raises `Error(UNSUPPORTED)`."""
        raise Error(Kind.UNSUPPORTED, "QEMU cannot be told that a resync begins")

    async def resynced(self) -> None:
        """See `resync`."""
        raise Error(Kind.UNSUPPORTED, "QEMU cannot be told that a resync has ended")

    async def digests(self, offset: int, length: int, piece: int) -> list[str]:
        """It has no hashes to tell: raises `Error(UNSUPPORTED)`, and its disk is read over the link."""
        raise Error(Kind.UNSUPPORTED, "QEMU tells no digests of its disk")

    async def checkpoint(self, epoch: int, name: str) -> PeerState:
        """End `epoch`. Raises `Error`."""
        if self._qmp is not None:
            await self._execute("xen-colo-do-checkpoint")
        return PeerState(Stage.RUNNING, epoch + 1, GENERATION, self._length, None)

    async def _execute(self, command: str) -> dict[str, object]:
        """One connection for one command: QEMU talks to one client of a QMP socket at a time."""
        assert self._qmp is not None
        connection = await Connection.unix(Path(self._qmp), timeout=self._timeout)
        try:
            answer = await connection.execute(command, timeout=self._timeout)
        finally:
            connection.close()
        if not isinstance(answer, dict):
            raise Error(Kind.PEER_LIED, f"QEMU answered {command} with {answer!r:.80}")
        return answer
