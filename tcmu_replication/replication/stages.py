"""The semantics of replication: (mode, stage, operation) to (action, next stage, error).

This is QEMU's block/replication.c as data. Nothing in it does anything: an
action is a name that `primary` and `secondary` carry out, and only `Machine`
writes the stage. Where a row differs from QEMU the difference is one that
docs/replication.md lists, and the row says "ours".

An operation that QEMU ignores after a failover (it answers success and does
nothing) has the action IGNORE, and so has everything that QEMU lets pass.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from tcmu_replication.errors import Error, Kind


class Mode(enum.Enum):
    """Which end of the pair this host is; QEMU's `ReplicationMode`, with its numbers in `number`."""

    PRIMARY = "primary"
    SECONDARY = "secondary"

    @property
    def number(self) -> int:
        """The value that QEMU's error texts print."""
        return 0 if self is Mode.PRIMARY else 1


class Stage(enum.Enum):
    """QEMU's `ReplicationState` stages."""

    NONE = "none"
    RUNNING = "running"
    FAILOVER = "failover"
    FAILOVER_FAILED = "failover-failed"
    DONE = "done"


class Operation(enum.Enum):
    """What can happen: an operator's or controller's command, the end of a job, or a request."""

    OPEN = "open"
    START = "start"
    START_AGAIN = "start-again"
    CHECKPOINT = "checkpoint"
    GET_ERROR = "get-error"
    STOP = "stop"
    FAILOVER = "failover"
    FAILOVER_TO_LATEST = "failover-to-latest"
    BACKUP_ENDED = "backup-ended"
    COMMIT_DONE = "commit-done"
    COMMIT_FAILED = "commit-failed"
    SUPERSEDED = "superseded"
    READ = "read"
    WRITE = "write"
    CLOSE = "close"


class Action(enum.Enum):
    """What the engine has to do. Routes of reads and writes are actions too."""

    IGNORE = "nothing, successfully"
    REFUSE = "fail with the row's error"
    RESUME = "go on from what was kept at the last close, or found after a death"
    ATTACH = "connect to the secondary and begin to forward"
    WATCH = "make overlays, begin to save pre-images, make the first checkpoint"
    MOVE_EPOCH = "make the present the new baseline"
    ANSWER_ERROR = "answer the recorded error, if any"
    DETACH = "stop forwarding, forget the recorded error"
    LAST_CHECKPOINT = "drop both overlays, serve the disk"
    COMMIT = "stop saving pre-images, copy active and hidden to the disk"
    DROP_OVERLAYS = "stop saving pre-images, drop both overlays, serve the disk"
    FINISH = "drop the empty overlays, serve the disk, forget the recorded error"
    RECORD_ERROR = "record an I/O error"
    STEP_DOWN = "stop serving: the peer was promoted"
    SUSPEND = "keep everything as it is for the next open"
    EIO = "I/O error"
    CHAIN = "read active over hidden over disk"
    TO_PEER = "forward; record a failure and answer success"
    TO_ACTIVE = "write to active"
    SPLIT = "write to active where active or hidden has the block, else to the disk"
    DISK = "read and write the disk"


class Row(NamedTuple):
    """One cell: what to do, where it leads (None: the stage stays), and what to say if refused."""

    action: Action
    next: Stage | None = None
    error: str = ""


NOT_RUNNING = "Block replication is not running"
RUNNING_OR_DONE = "Block replication is running or done"
BACKUP_GONE = "Backup job was cancelled unexpectedly"
IO_ERROR = "I/O error occurred"
WRONG_MODE = "The parameter mode's value is invalid, needs {needs}, but got {got}"
NO_ACTIVE_BACKING = "Active disk doesn't have backing file"
NO_HIDDEN_BACKING = "Hidden disk doesn't have backing file"
NO_DISK_BACKEND = "The secondary disk doesn't have block backend"
LENGTHS_DIFFER = "Active disk, hidden disk, secondary disk's length are not the same"
NO_MAKE_EMPTY = "Active disk or hidden disk doesn't support make_empty"
BAD_TOP = "No top_bs or it is invalid"
ACTIVE_EJECTED = "Active disk {name} is ejected"
HIDDEN_EJECTED = "Hidden disk {name} is ejected"
SERVES_ALREADY = (
    "this host is the primary and serves already; fail over on the secondary, or stop replication here"
)
CANNOT_EMPTY = "Failed to empty {name}: {reason}"
NO_MODE = "Missing the option mode"
NO_TOP_ID = "Missing the option top-id"
TOP_ID_ON_PRIMARY = "The primary side does not support option top-id"
BAD_MODE = "The option mode's value should be primary or secondary"

IGNORED = Row(Action.IGNORE)
_IO = Row(Action.EIO)
_BUSY = Row(Action.REFUSE, error=RUNNING_OR_DONE)
_IDLE = Row(Action.REFUSE, error=NOT_RUNNING)
_NO_BACKUP = Row(Action.REFUSE, error=BACKUP_GONE)
_ANSWER = Row(Action.ANSWER_ERROR)
_SERVES = Row(Action.REFUSE, error=SERVES_ALREADY)

P, S = Mode.PRIMARY, Mode.SECONDARY
N, R, F, X, D = Stage.NONE, Stage.RUNNING, Stage.FAILOVER, Stage.FAILOVER_FAILED, Stage.DONE
O = Operation  # noqa: E741 - the table reads better

TABLE: dict[tuple[Mode, Stage, Operation], Row] = {
    # replication_open; ours: what was running goes on, and a commit that failed is tried again
    (P, N, O.OPEN): IGNORED,
    (P, R, O.OPEN): Row(Action.RESUME),
    (P, D, O.OPEN): IGNORED,
    (S, N, O.OPEN): IGNORED,
    (S, R, O.OPEN): Row(Action.RESUME),
    (S, F, O.OPEN): Row(Action.RESUME),
    (S, X, O.OPEN): Row(Action.RESUME, F),
    (S, D, O.OPEN): IGNORED,
    # block/replication.c: replication_start
    (P, N, O.START): Row(Action.ATTACH, R),
    (P, R, O.START): _BUSY,
    (P, D, O.START): IGNORED,
    (S, N, O.START): Row(Action.WATCH, R),
    (S, R, O.START): _BUSY,
    (S, F, O.START): IGNORED,
    (S, X, O.START): _BUSY,
    (S, D, O.START): IGNORED,
    # ours: an operator's start, which begins a new pairing where an earlier one is done
    (P, N, O.START_AGAIN): Row(Action.ATTACH, R),
    (P, R, O.START_AGAIN): _BUSY,
    (P, D, O.START_AGAIN): Row(Action.ATTACH, R),
    (S, N, O.START_AGAIN): Row(Action.WATCH, R),
    (S, R, O.START_AGAIN): _BUSY,
    (S, F, O.START_AGAIN): IGNORED,
    (S, X, O.START_AGAIN): _BUSY,
    (S, D, O.START_AGAIN): Row(Action.WATCH, R),
    # replication_do_checkpoint; on a primary QEMU's is empty, ours moves the secondary's epoch
    (P, N, O.CHECKPOINT): IGNORED,
    (P, R, O.CHECKPOINT): Row(Action.MOVE_EPOCH),
    (P, D, O.CHECKPOINT): IGNORED,
    (S, N, O.CHECKPOINT): _NO_BACKUP,
    (S, R, O.CHECKPOINT): Row(Action.MOVE_EPOCH),
    (S, F, O.CHECKPOINT): IGNORED,
    (S, X, O.CHECKPOINT): _NO_BACKUP,
    (S, D, O.CHECKPOINT): IGNORED,
    # replication_get_error
    (P, N, O.GET_ERROR): _IDLE,
    (P, R, O.GET_ERROR): _ANSWER,
    (P, D, O.GET_ERROR): _ANSWER,
    (S, N, O.GET_ERROR): _IDLE,
    (S, R, O.GET_ERROR): _ANSWER,
    (S, F, O.GET_ERROR): _ANSWER,
    (S, X, O.GET_ERROR): _ANSWER,
    (S, D, O.GET_ERROR): _ANSWER,
    # replication_stop(failover=false); ours on a running secondary: QEMU's always fails there
    (P, N, O.STOP): _IDLE,
    (P, R, O.STOP): Row(Action.DETACH, D),
    (P, D, O.STOP): IGNORED,
    (S, N, O.STOP): _IDLE,
    (S, R, O.STOP): Row(Action.LAST_CHECKPOINT, D),
    (S, F, O.STOP): IGNORED,
    (S, X, O.STOP): _IDLE,
    (S, D, O.STOP): IGNORED,
    # replication_stop(failover=true); ours on a primary: QEMU's is a stop, which its controller gives by that name
    (P, N, O.FAILOVER): _SERVES,
    (P, R, O.FAILOVER): _SERVES,
    (P, D, O.FAILOVER): _SERVES,
    (S, N, O.FAILOVER): _IDLE,
    (S, R, O.FAILOVER): Row(Action.COMMIT, F),
    (S, F, O.FAILOVER): IGNORED,
    (S, X, O.FAILOVER): _IDLE,
    (S, D, O.FAILOVER): IGNORED,
    # ours: failover to what the primary had acknowledged
    (P, N, O.FAILOVER_TO_LATEST): _SERVES,
    (P, R, O.FAILOVER_TO_LATEST): _SERVES,
    (P, D, O.FAILOVER_TO_LATEST): _SERVES,
    (S, N, O.FAILOVER_TO_LATEST): _IDLE,
    (S, R, O.FAILOVER_TO_LATEST): Row(Action.DROP_OVERLAYS, D),
    (S, F, O.FAILOVER_TO_LATEST): IGNORED,
    (S, X, O.FAILOVER_TO_LATEST): _IDLE,
    (S, D, O.FAILOVER_TO_LATEST): IGNORED,
    # backup_job_completed
    (S, N, O.BACKUP_ENDED): Row(Action.RECORD_ERROR),
    (S, R, O.BACKUP_ENDED): Row(Action.RECORD_ERROR),
    (S, F, O.BACKUP_ENDED): IGNORED,
    (S, X, O.BACKUP_ENDED): Row(Action.RECORD_ERROR),
    (S, D, O.BACKUP_ENDED): Row(Action.RECORD_ERROR),
    # replication_done
    (S, F, O.COMMIT_DONE): Row(Action.FINISH, D),
    (S, F, O.COMMIT_FAILED): Row(Action.RECORD_ERROR, X),
    # ours: a primary hears that its peer was promoted
    (P, R, O.SUPERSEDED): Row(Action.STEP_DOWN, D),
    # replication_get_io_status, for reads
    (P, N, O.READ): _IO,
    (P, R, O.READ): _IO,
    (P, D, O.READ): _IO,
    (S, N, O.READ): _IO,
    (S, R, O.READ): Row(Action.CHAIN),
    (S, F, O.READ): Row(Action.CHAIN),
    (S, X, O.READ): Row(Action.CHAIN),
    (S, D, O.READ): Row(Action.DISK),
    # replication_get_io_status, for writes; in FAILOVER QEMU writes to active, we split (a commit that ends)
    (P, N, O.WRITE): _IO,
    (P, R, O.WRITE): Row(Action.TO_PEER),
    (P, D, O.WRITE): _IO,
    (S, N, O.WRITE): _IO,
    (S, R, O.WRITE): Row(Action.TO_ACTIVE),
    (S, F, O.WRITE): Row(Action.SPLIT),
    (S, X, O.WRITE): Row(Action.SPLIT),
    (S, D, O.WRITE): Row(Action.DISK),
    # replication_close; ours: what was running is taken up again at the next open
    (P, N, O.CLOSE): IGNORED,
    (P, R, O.CLOSE): Row(Action.SUSPEND),
    (P, D, O.CLOSE): IGNORED,
    (S, N, O.CLOSE): IGNORED,
    (S, R, O.CLOSE): Row(Action.SUSPEND),
    (S, F, O.CLOSE): Row(Action.SUSPEND),
    (S, X, O.CLOSE): Row(Action.SUSPEND),
    (S, D, O.CLOSE): IGNORED,
}
"""A primary has no FAILOVER or FAILOVER_FAILED stage, no backup and no commit; every other cell is here."""


class Machine:
    """The stage and the sticky error of one end. Only this class writes them."""

    def __init__(self, mode: Mode, stage: Stage = Stage.NONE, error: str | None = None) -> None:
        self.mode = mode
        self.stage = stage
        self.error = error

    def row(self, operation: Operation) -> Row:
        """The table's cell for `operation` now.

        Raises `Error(INVALID_STATE)` for a cell that the table does not have.
        """
        row = TABLE.get((self.mode, self.stage, operation))
        if row is None:
            raise Error(
                Kind.INVALID_STATE,
                f"{operation.value} cannot happen to a {self.mode.value} in {self.stage.value}",
            )
        return row

    def ask(self, operation: Operation) -> Action:
        """The action for `operation`, without moving: the engine carries it out and then calls `move`.

        Raises the row's error, `Error(INVALID_STATE)` with QEMU's text, if the operation is refused.
        """
        row = self.row(operation)
        if row.action is Action.REFUSE:
            raise Error(Kind.INVALID_STATE, row.error)
        return row.action

    def move(self, operation: Operation) -> None:
        """The action of `operation` was carried out: go to the stage that the table names."""
        row = self.row(operation)
        if row.next is not None:
            self.stage = row.next

    def check_mode(self, mode: Mode) -> None:
        """QEMU's comparison of start's mode with the option; raises `Error(BAD_REQUEST)`."""
        if mode is not self.mode:
            text = WRONG_MODE.format(needs=self.mode.number, got=mode.number)
            raise Error(Kind.BAD_REQUEST, text)

    def get_error(self) -> None:
        """QEMU's get_error: raises "not running" or "I/O error occurred"; returns if all is well."""
        self.ask(Operation.GET_ERROR)
        if self.error is not None:
            raise Error(Kind.IO, IO_ERROR)

    def record(self, reason: str) -> None:
        """Make the error sticky; the first reason is kept, since the rest follows from it."""
        if self.error is None:
            self.error = reason

    def forget_error(self) -> None:
        """Forget the sticky error, as QEMU does at start, at a primary's stop and when a commit is done."""
        self.error = None


class Options(NamedTuple):
    """The two options of QEMU's replication driver."""

    mode: Mode
    top_id: str | None


def parse_options(options: dict[str, str]) -> Options:
    """Check `mode` and `top-id` as replication_open does, in its order. Raises `Error(BAD_CONFIG)`."""
    mode, top_id = options.get("mode"), options.get("top-id")
    if mode is None:
        raise Error(Kind.BAD_CONFIG, NO_MODE)
    if mode == Mode.PRIMARY.value:
        if top_id is not None:
            raise Error(Kind.BAD_CONFIG, TOP_ID_ON_PRIMARY)
        return Options(Mode.PRIMARY, None)
    if mode == Mode.SECONDARY.value:
        if top_id is None:
            raise Error(Kind.BAD_CONFIG, NO_TOP_ID)
        return Options(Mode.SECONDARY, top_id)
    raise Error(Kind.BAD_CONFIG, BAD_MODE)
