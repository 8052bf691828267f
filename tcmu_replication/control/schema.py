"""What can be said over a control socket: the tables of commands and events, and the documents they carry.

Members travel in kebab-case, as in QEMU's schema ("in-flight"). Sizes, offsets
and lengths are bytes, times are ISO 8601 in UTC. A worker implements COMMANDS,
the worker of a LUN that is no resource DEVICE_COMMANDS, the manager
MANAGER_COMMANDS.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

from tcmu_replication.errors import Error, Kind

PROTOCOL = 1
"""What the two ends of a pair say to each other; raised when the meaning of a peer command changes."""

Count = Annotated[int, Meta(ge=0)]
Device = Annotated[str, Meta(pattern=r"^uio[0-9]{1,6}\Z", description="a UIO device, as in uio3")]
Text = Annotated[str, Meta(max_length=256)]
StageName = Literal["none", "running", "failover", "failover-failed", "done"]


class Privilege(enum.Enum):
    """Who may give a command: root on this host, or also the configured peer over TCP."""

    OPERATOR = "operator"
    PEER = "peer"


class Document(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """Base of everything that travels: immutable, known members only."""


class Nothing(Document, frozen=True, kw_only=True):
    """No arguments."""


class Start(Document, frozen=True, kw_only=True):
    """Arguments of start. `assume_clean`: the operator asserts that both disks hold the same data."""

    assume_clean: bool = False


class Failover(Document, frozen=True, kw_only=True):
    """Arguments of failover. Without `to` the resource file's `failover` says."""

    to: Literal["latest", "checkpoint"] | None = None


class SetReplication(Document, frozen=True, kw_only=True):
    """Arguments of xen-set-replication. `failover` is for `enable` = false only; `primary` for true only."""

    enable: bool
    primary: bool
    failover: bool | None = None


class DeviceArguments(Document, frozen=True, kw_only=True):
    """Arguments of attach-device and detach-device."""

    device: Device


class PeerHello(Document, frozen=True, kw_only=True):
    """Arguments of peer-hello: the primary introduces itself; without `generation` a new pair begins."""

    resource: Text
    protocol: Count
    generation: Text | None = None


class PeerState(Document, frozen=True, kw_only=True):
    """Result of peer-hello and peer-checkpoint: what the secondary has, and its recorded error."""

    stage: StageName
    epoch: Count
    generation: str
    length: Count
    error: str | None = None


class PeerEpoch(Document, frozen=True, kw_only=True):
    """Arguments of peer-prepare and peer-checkpoint: the epoch that is about to end."""

    epoch: Count


class Checkpoint(Document, frozen=True, kw_only=True):
    """A checkpoint that was made: the epoch that it began, when, and how long writes were held (ms)."""

    epoch: Count
    at: str
    pause_ms: float


class FailoverStarted(Document, frozen=True, kw_only=True):
    """Result of failover: the LUN is writable; with `to` = checkpoint a commit job may run behind."""

    to: Literal["latest", "checkpoint"]
    stage: StageName


class Outcome(Document, frozen=True, kw_only=True):
    """Result of start and stop: the stage now; `ignored` if QEMU's rules ignore the command there."""

    ignored: bool = False
    stage: StageName


class ErrorStatus(Document, frozen=True, kw_only=True):
    """Result of query-errors, as QEMU's ReplicationStatus: whether an error is recorded, and which."""

    error: bool
    desc: str | None = None


class Link(Document, frozen=True, kw_only=True):
    """The link to the peer; `since` is when it came into this state, `reason` why if it is not connected."""

    state: Literal["none", "listening", "connecting", "connected", "waiting", "lost"] = "none"
    peer: str = ""
    in_flight: Count = 0
    in_flight_bytes: Count = 0
    since: str | None = None
    reason: str | None = None


class Overlays(Document, frozen=True, kw_only=True):
    """What the secondary's overlays hold in this epoch."""

    active_bytes: Count = 0
    hidden_bytes: Count = 0


class Job(Document, frozen=True, kw_only=True):
    """A background job, as QEMU's BlockJobInfo: `offset` of `length` is done; `speed` is bytes per second."""

    id: str
    type: str
    offset: Count
    length: Count
    speed: Count = 0
    status: str
    error: str | None = None


class Frontend(Document, frozen=True, kw_only=True):
    """A way to the LUN: `device` is uioN or where NBD listens."""

    type: Literal["tcmu", "nbd"]
    device: str
    in_flight: Count = 0
    commands: Count = 0
    errors: Count = 0


class Status(Document, frozen=True, kw_only=True):
    """Everything about one resource on one host: what `status --json` prints."""

    resource: str
    host: str
    mode: Literal["primary", "secondary"]
    stage: StageName
    epoch: Count
    generation: str
    size: Count
    disk: str
    top: str
    link: Link
    overlays: Overlays
    out_of_sync_bytes: Count = 0
    jobs: list[Job] = []
    error: str | None = None
    last_checkpoint: Checkpoint | None = None
    frontends: list[Frontend] = []
    pid: Count
    version: str


class DeviceStatus(Document, frozen=True, kw_only=True):
    """What `query-status` answers for a LUN that is not a resource (`serve --device`)."""

    device: str
    subtype: str
    config: str
    size: Count
    frontends: list[Frontend] = []
    pid: Count
    version: str


class WorkerInfo(Document, frozen=True, kw_only=True):
    """A worker as the manager sees it; `error` is its last words if it ended, or why it was not started."""

    name: str
    state: Literal["starting", "running", "waiting", "stopping", "stopped", "failed"]
    pid: Count | None = None
    restarts: Count = 0
    error: str | None = None


class Command(NamedTuple):
    """A row of the command table. `result` is a type that msgspec converts to, None for no result."""

    name: str
    arguments: type[Document]
    result: Any
    privilege: Privilege
    doc: str

    def decode(self, arguments: dict[str, Any]) -> Any:
        """The arguments as this command's struct. Raises BAD_REQUEST."""
        try:
            return msgspec.convert(arguments, self.arguments)
        except msgspec.ValidationError as error:
            raise Error(Kind.BAD_REQUEST, f"Invalid arguments of '{self.name}': {error}") from error

    def encode(self, result: Any) -> Any:
        """A handler's result as it travels ({} for none). Raises msgspec.ValidationError if it is none."""
        if result is None:
            return {}
        return msgspec.to_builtins(msgspec.convert(msgspec.to_builtins(result), self.result))


def _table(*rows: Command) -> dict[str, Command]:
    return {row.name: row for row in rows}


OPERATOR, PEER = Privilege.OPERATOR, Privilege.PEER

COMMANDS = _table(
    Command("query-status", Nothing, Status, OPERATOR, "Everything about the resource."),
    Command("start", Start, Outcome, OPERATOR, "Begin to replicate."),
    Command("checkpoint", Nothing, Checkpoint | None, OPERATOR, "Make the present the new baseline."),
    Command("failover", Failover, FailoverStarted | None, OPERATOR, "Make this host the one that counts."),
    Command("stop", Nothing, Outcome, OPERATOR, "Stop replicating; a secondary makes a last checkpoint."),
    Command("query-errors", Nothing, ErrorStatus, OPERATOR, "The recorded replication error, if any."),
    Command("xen-set-replication", SetReplication, None, OPERATOR, "QEMU's start, stop and failover."),
    Command("query-xen-replication-status", Nothing, ErrorStatus, OPERATOR, "QEMU's query-errors."),
    Command("xen-colo-do-checkpoint", Nothing, None, OPERATOR, "QEMU's checkpoint."),
    Command("attach-device", DeviceArguments, None, OPERATOR, "Serve the LUN on a UIO device too."),
    Command("detach-device", DeviceArguments, None, OPERATOR, "The UIO device is going or gone."),
    Command("quit", Nothing, None, OPERATOR, "End the worker in order."),
    Command("peer-hello", PeerHello, PeerState, PEER, "The primary introduces itself."),
    Command("peer-prepare", PeerEpoch, None, PEER, "Get ready for the checkpoint that ends the epoch."),
    Command("peer-checkpoint", PeerEpoch, PeerState, PEER, "End the epoch; the secondary begins the next."),
)

DEVICE_COMMANDS = _table(
    Command("query-status", Nothing, DeviceStatus, OPERATOR, "Everything about the LUN."),
    COMMANDS["quit"],
)

MANAGER_COMMANDS = _table(
    Command("query-workers", Nothing, list[WorkerInfo], OPERATOR, "The workers and what became of them."),
)


class StageChanged(Document, frozen=True, kw_only=True):
    """The stage is another one."""

    stage: StageName
    epoch: Count
    error: str | None = None


EVENTS: dict[str, type[Document]] = {
    "REPLICATION_STAGE": StageChanged,
    "REPLICATION_CHECKPOINT": Checkpoint,
    "REPLICATION_LINK": Link,
}
