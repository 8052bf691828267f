"""QEMU's view of a secondary's jobs: the commit, visible while it runs, and its events.

The commit is `commit-NAME`. The backup (what saves pre-images) is QEMU's internal
job: nobody lists it, but as `backup-NAME` it can be ended, which is what QEMU
calls its unexpected end: an error, and no forwarded write any more.
"""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from tcmu_replication.control.command import Nothing
from tcmu_replication.control.framing import NOT_ACTIVE, ClassError
from tcmu_replication.control.server import Emit, Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Kind
from tcmu_replication.jobs.job import Job, JobStatus
from tcmu_replication.qemu import schema
from tcmu_replication.qemu.view import Replica
from tcmu_replication.replication.stages import BACKUP_GONE, Mode

_LAST_WORDS: dict[JobStatus, tuple[schema.JobState, ...]] = {
    JobStatus.CONCLUDED: ("waiting", "pending"),
    JobStatus.FAILED: ("aborting",),
    JobStatus.CANCELLED: ("aborting",),
}
"""QEMU's statuses of a job that ends; then come "concluded" and "null", since jobs dismiss themselves."""


class Jobs:
    """The commands of jobs, and their events through `emit`: call `changed` when there may be some."""

    def __init__(self, replica: Replica, emit: Emit) -> None:
        self._replica = replica
        self._emit = emit
        self._told: Job | None = None
        self.commands: dict[str, Handler] = {
            "query-block-jobs": self._query_block_jobs,
            "query-jobs": self._query_jobs,
            "block-job-cancel": self._block_job_cancel,
            "job-cancel": self._job_cancel,
        }

    def changed(self) -> None:
        """Tell of a job that has begun, and of one that has ended since."""
        job = self._replica.job
        if job is not None and job.status is JobStatus.RUNNING:
            if job is not self._told:
                self._told = job
                self._status(job.name, "created", "running")
        elif job is not None and job is self._told:
            self._told = None
            self._ended(job)

    def _ended(self, job: Job) -> None:
        if job.status is JobStatus.FAILED:
            failed = schema.BlockJobError(device=job.name, operation=job.failed_to, action="report")
            self._emit("BLOCK_JOB_ERROR", failed)
        self._status(job.name, *_LAST_WORDS[job.status])
        numbers: dict[str, Any] = {
            "type": job.kind,
            "device": job.name,
            "len": job.length,
            "offset": job.offset,
        }
        if job.status is JobStatus.CANCELLED:
            self._emit("BLOCK_JOB_CANCELLED", schema.BlockJobCancelled(**numbers, speed=0))
        else:
            error = UNSET if job.error is None else job.error
            self._emit("BLOCK_JOB_COMPLETED", schema.BlockJobCompleted(**numbers, speed=0, error=error))
        self._status(job.name, "concluded", "null")

    def _status(self, name: str, *status: schema.JobState) -> None:
        for one in status:
            self._emit("JOB_STATUS_CHANGE", schema.JobStatusChange(id=name, status=one))

    def _running(self) -> list[Job]:
        job = self._replica.job
        return [] if job is None or job.status is not JobStatus.RUNNING else [job]

    # --- commands

    async def _query_block_jobs(self, arguments: Nothing, session: Session) -> list[schema.BlockJobInfo]:
        return [
            schema.BlockJobInfo(
                type=job.kind,
                device=job.name,
                len=job.length,
                offset=job.offset,
                busy=True,
                paused=False,
                speed=0,
                io_status="ok",
                ready=False,
                status="running",
                auto_finalize=True,
                auto_dismiss=True,
            )
            for job in self._running()
        ]

    async def _query_jobs(self, arguments: Nothing, session: Session) -> list[schema.JobInfo]:
        return [
            schema.JobInfo(
                id=job.name,
                type=job.kind,
                status="running",
                current_progress=job.offset,
                total_progress=job.length,
            )
            for job in self._running()
        ]

    async def _block_job_cancel(self, arguments: schema.BlockJobCancel, session: Session) -> None:
        if not await self._cancel(arguments.device):
            raise ClassError(NOT_ACTIVE, Kind.NOT_FOUND, f"Block job '{arguments.device}' not found")

    async def _job_cancel(self, arguments: schema.JobId, session: Session) -> None:
        if not await self._cancel(arguments.id):
            raise ClassError("GenericError", Kind.NOT_FOUND, "Job not found")

    async def _cancel(self, name: str) -> bool:
        """End a job; False if there is none of that name."""
        replica = self._replica
        if replica.mode is not Mode.SECONDARY:
            return False
        if name in [job.name for job in self._running()]:
            await replica.cancel_commit()
            return True
        if name == f"backup-{replica.name}" and replica.forwarded is not None:
            await replica.backup_ended(BACKUP_GONE)
            ended: dict[str, Any] = {"type": "backup", "device": name, "len": 0, "offset": 0, "speed": 0}
            self._emit("BLOCK_JOB_CANCELLED", schema.BlockJobCancelled(**ended))
            return True
        return False
