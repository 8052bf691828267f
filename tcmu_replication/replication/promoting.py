"""A failover to the checkpoint under way: the LUN is right at once, and a commit makes the disk so behind it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tcmu_replication.background import background
from tcmu_replication.block.offload import BACKGROUND, Offload
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs import commit as commits
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.jobs.job import JobStatus
from tcmu_replication.replication.following import resume_pair, suspend_pair
from tcmu_replication.replication.secondary import SecondaryRole
from tcmu_replication.replication.stages import Operation, Stage

if TYPE_CHECKING:
    from tcmu_replication.replication.replica import Replica

log = logging.getLogger(__name__)

GRACE_S = 0.005
"""Before a commit begins to use the machine: requests that waited for the failover go first."""


class Promoting(SecondaryRole):
    """The role of a secondary in stage `failover` or `failover-failed`."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._receiver = replica.receiver
        self._threads: Offload | None = None
        self._task: asyncio.Task[None] | None = None

    def take(self) -> None:
        """See `Role.take`."""
        assert self._receiver.pair is not None
        hidden, active = self._receiver.pair
        self._threads = Offload(threads=commits.THREADS, niceness=BACKGROUND)
        self._receiver.commit = Commit(
            f"commit-{self.name}", active, hidden, self.replica.disk, self.replica.top, self._threads
        )
        super().take()

    async def resume(self) -> None:
        """A commit that was under way, or failed, is tried again: the disk may have been mended meanwhile."""
        await resume_pair(self)

    async def enter(self) -> None:
        """See `Role.enter`."""
        assert self._receiver.commit is not None
        assert self._threads is not None
        self._task = background(self._run(self._receiver.commit, self._threads))

    async def leave(self) -> None:
        """See `Role.leave`."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self, *, suspend: bool) -> None:
        """See `Role.close`."""
        await self.leave()
        if suspend:
            await suspend_pair(self)

    async def ended(self) -> None:
        """See `Role.ended`: the commit."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def cancel_commit(self) -> None:
        """See `Replica.cancel_commit`."""
        commit = self._receiver.commit
        if self.record.stage is not Stage.FAILOVER or self._task is None or commit is None:
            await super().cancel_commit()
        await self.leave()
        if self.record.stage is Stage.FAILOVER and commit is not None:
            commit.end(JobStatus.CANCELLED, "cancelled")  # its task may not even have begun
            self._failed(Error(Kind.CANCELLED, "cancelled; the worker's next start goes on with it"))

    async def _run(self, commit: Commit, threads: Offload) -> None:
        """Carry the commit to its end and take the stage where that leads."""
        try:
            await asyncio.sleep(GRACE_S)
            await self._make_whole()
            await commit.run()
            async with self.replica.top.quiet():  # what is under way may still use the overlays
                # It was served all the time, and may have been written.
                self.record.move(Operation.COMMIT_DONE, error=None, written_alone=True)
                alone = self.replica.role_of(Stage.DONE)
                alone.take()
        except Error as error:
            commit.end(JobStatus.FAILED, str(error))
            self._failed(error)
            return
        finally:
            threads.close()
        await self.replica.become(alone)
        log.info("%s: commit done, %d bytes", self.name, commit.offset)
        self._receiver.drop_pair()
        self.replica.stage_changed()

    async def _make_whole(self) -> None:
        """Before a commit copies anything: what it copies from must be there after a loss of power too."""
        assert self._receiver.pair is not None
        if not self.record.manifest.whole:
            await self._receiver.make_durable(self._receiver.pair)
            self.record.save(whole=True)

    def _failed(self, error: Error) -> None:
        """The LUN stays right from the overlays and the disk together; the next open tries again."""
        self.record.note(f"commit to the disk failed: {error}")
        log.error("%s: commit to the disk failed: %s", self.name, error)
        self.record.moved(Operation.COMMIT_FAILED)
        self.replica.stage_changed()
