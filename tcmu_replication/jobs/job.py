"""A job: long work in the background, with progress, a result and a reason."""

from __future__ import annotations

import enum
import time
from typing import Literal


class JobStatus(enum.Enum):
    """Where a job is, in QEMU's words (qapi/job.json, JobStatus)."""

    RUNNING = "running"
    CONCLUDED = "concluded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """Progress of one job. `length` is the work known so far and `offset` the part done, in bytes.

    `failed_to` says of a job that failed what it could not do.
    """

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.status = JobStatus.RUNNING
        self.error: str | None = None
        self.failed_to: Literal["read", "write"] = "write"
        self.length = 0
        self.offset = 0
        self._began = time.monotonic()
        self._ended: float | None = None

    @property
    def speed(self) -> float:
        """Bytes per second since the beginning."""
        spent = (self._ended or time.monotonic()) - self._began
        return self.offset / spent if spent > 0 else 0.0

    def end(self, status: JobStatus, error: str | None = None) -> None:
        """The job is over. `error` says why if it did not succeed."""
        self.status = status
        self.error = error
        self._ended = time.monotonic()
