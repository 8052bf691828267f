"""The comparison of both disks behind a start: who carries it out, and what its end means."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from tcmu_replication.block.offload import BACKGROUND, Offload
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.compare import Compare, Difference, digests
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.units import format_size

if TYPE_CHECKING:
    from tcmu_replication.replication.forwarding import Forwarding

log = logging.getLogger(__name__)


class Comparing:
    """The comparison of one forwarding primary: begun once, and again where the link was taken away."""

    def __init__(self, role: Forwarding) -> None:
        self._role = role
        self._sender = role.replica.sender
        self._job: Compare | None = None

    @property
    def job(self) -> Compare | None:
        """While it runs."""
        return self._job if self._job is not None and self._job.status is JobStatus.RUNNING else None

    def begin(self) -> None:
        """Compare behind a start, unless that is under way."""
        if self.job is None:
            self._role.spawn(self._behind_a_start(*self._make()))

    async def run(self) -> None:
        """Compare, and mark what differs. Raises `Error`."""
        job, threads = self._make()
        try:
            await self._carry_out(job, threads)
        except Error as error:
            raise Error(error.kind, f"the comparison of both disks failed: {error}") from error

    def _make(self) -> tuple[Compare, Offload]:
        replica = self._role.replica
        threads = Offload(threads=2, niceness=BACKGROUND)

        async def theirs(offset: int, length: int, piece: int) -> list[str]:
            remote = self._sender.remote
            try:
                return await self._sender.peer.digests(offset, length, piece)
            except Error as error:
                if error.kind is not Kind.UNSUPPORTED or remote is None:
                    raise
                return await digests(remote, offset, length, piece, threads)

        job = self._job = Compare(
            f"compare-{replica.name}", replica.disk, theirs, self._differs, replica.quiet, threads
        )
        return job, threads

    def _differs(self, found: Difference) -> None:
        self._sender.missed.mark(found.offset, found.length)

    async def _carry_out(self, job: Compare, threads: Offload) -> None:
        try:
            await job.run()
        except asyncio.CancelledError:
            job.end(JobStatus.CANCELLED, "cancelled")
            raise
        finally:
            threads.close()

    async def _behind_a_start(self, job: Compare, threads: Offload) -> None:
        try:
            await self._carry_out(job, threads)
        except Error as error:
            reason = f"the comparison of both disks failed: {error}"
            self._role.open_gap(Error(Kind.MISCOMPARE, reason))
            return
        if self._role.forwards:
            await self._ended(job)

    async def _ended(self, job: Compare) -> None:
        role = self._role
        if job.different:
            role.open_gap(
                Error(
                    Kind.MISCOMPARE,
                    f"the disks differ: {format_size(job.different)} of {format_size(job.length)}, first at byte "
                    f"{job.first}",
                )
            )
        elif role.record.write_down(verified=True, disk_error=None):
            log.info("%s: both disks are equal", role.name)
            with contextlib.suppress(Error):  # else the next beat tells it
                await self._sender.peer.hello(role.news())
        role.replica.stage_changed()
