"""QEMU's commands and events that we have, and the documents that they carry.

Source: qapi/migration.json, job.json and block-core.json of QEMU 7.2; the block
layer's are in `block_schema`, the monitor's own in `control.monitor`. A member
that QEMU has and we do not is one that would do nothing here; one that QEMU
leaves out when it has no value is UNSET, never null.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from tcmu_replication.control.command import OPERATOR, Command, Count, Document, Nothing, table
from tcmu_replication.control.schema import ErrorStatus

# --- replication (migration.json)


class SetReplication(Document, frozen=True, kw_only=True):
    """Arguments of xen-set-replication. `failover` is for `enable` = false only; `primary` for true only."""

    enable: bool
    primary: bool
    failover: bool | UnsetType = UNSET


class ColoStatus(Document, frozen=True, kw_only=True):
    """Result of query-colo-status: this end's mode while it replicates, and why it does not any more."""

    mode: Literal["none", "primary", "secondary"]
    last_mode: Literal["none", "primary", "secondary"]
    reason: Literal["none", "request", "error", "processing"]


class ColoExit(Document, frozen=True, kw_only=True):
    """x-colo-lost-heartbeat has ended replication; `mode` is what this end was."""

    mode: Literal["primary", "secondary"]
    reason: Literal["request"]


REPLICATION = table(
    Command("xen-set-replication", SetReplication, None, OPERATOR, "QEMU's start, stop and failover."),
    Command("query-xen-replication-status", Nothing, ErrorStatus, OPERATOR, "QEMU's query-errors."),
    Command("xen-colo-do-checkpoint", Nothing, None, OPERATOR, "QEMU's checkpoint."),
    Command("query-colo-status", Nothing, ColoStatus, OPERATOR, "Whether this end replicates, and as what."),
    Command(
        "x-colo-lost-heartbeat", Nothing, None, OPERATOR,
        "The peer is gone: a secondary fails over to the checkpoint, a primary goes on alone.",
    ),
)  # fmt: skip


# --- jobs (job.json, block-core.json)

JobState = Literal[
    "undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending", "aborting",
    "concluded", "null",
]  # fmt: skip


class BlockJobInfo(Document, frozen=True, kw_only=True):
    """A job that is under way: `offset` of `len` bytes are done. `speed` is its limit: there is none."""

    type: str
    device: str
    len: Count
    offset: Count
    busy: bool
    paused: bool
    speed: Count
    io_status: Literal["ok", "failed", "nospace"]
    ready: bool
    status: JobState
    auto_finalize: bool
    auto_dismiss: bool
    error: str | UnsetType = UNSET


class JobInfo(Document, frozen=True, kw_only=True):
    """The same, as query-jobs has it."""

    id: str
    type: str
    status: JobState
    current_progress: Count
    total_progress: Count
    error: str | UnsetType = UNSET


class BlockJobCancel(Document, frozen=True, kw_only=True):
    """Arguments of block-job-cancel. Here a job always ends at once, as with QEMU's `force`."""

    device: str
    force: bool = False


class JobId(Document, frozen=True, kw_only=True):
    """Arguments of job-cancel."""

    id: str


class JobStatusChange(Document, frozen=True, kw_only=True):
    """A job has another status."""

    id: str
    status: JobState


class BlockJobCancelled(Document, frozen=True, kw_only=True):
    """A job was ended before its time."""

    type: str
    device: str
    len: Count
    offset: Count
    speed: Count


class BlockJobCompleted(BlockJobCancelled, frozen=True, kw_only=True):
    """A job is over; `error` if it failed."""

    error: str | UnsetType = UNSET


class BlockJobError(Document, frozen=True, kw_only=True):
    """A job could not read or write; it ends (`report`)."""

    device: str
    operation: Literal["read", "write"]
    action: Literal["report"]


JOBS = table(
    Command("query-block-jobs", Nothing, list[BlockJobInfo], OPERATOR, "The jobs that are under way."),
    Command("query-jobs", Nothing, list[JobInfo], OPERATOR, "The same in fewer words."),
    Command("block-job-cancel", BlockJobCancel, None, OPERATOR, "End a job before its time."),
    Command("job-cancel", JobId, None, OPERATOR, "As block-job-cancel."),
)


COMMANDS = REPLICATION | JOBS

EVENTS: dict[str, type[Document]] = {
    "BLOCK_JOB_COMPLETED": BlockJobCompleted,
    "BLOCK_JOB_CANCELLED": BlockJobCancelled,
    "BLOCK_JOB_ERROR": BlockJobError,
    "JOB_STATUS_CHANGE": JobStatusChange,
    "COLO_EXIT": ColoExit,
}
