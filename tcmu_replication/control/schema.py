"""What can be said over a control socket: the tables of commands and events, and the documents they carry.

Members travel in kebab-case, as in QEMU's schema ("in-flight"). Sizes, offsets
and lengths are bytes, times are ISO 8601 in UTC. A resource's worker implements COMMANDS (a
handler may add rows of its own), the worker of any other LUN DEVICE_COMMANDS, the manager
MANAGER_COMMANDS.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from tcmu_replication.control import monitor
from tcmu_replication.control.command import (
    OPERATOR,
    PEER,
    Command,
    Count,
    Document,
    Nothing,
    table,
)
from tcmu_replication.control.command import (
    Privilege as Privilege,
)
from tcmu_replication.control.protocol import Greeting

Device = Annotated[str, Meta(pattern=r"^uio[0-9]{1,6}\Z")]
"""A UIO device, as in uio3."""
Text = Annotated[str, Meta(max_length=256, pattern=r"^[ -~]*\Z")]
TEXT = 1000
"""Characters of a longer text."""
LongText = Annotated[str, Meta(max_length=TEXT)]
Time = Annotated[str, Meta(max_length=40, pattern=r"^[0-9T:.+Z-]*\Z")]
"""ISO 8601 in UTC, or empty for never."""
Digest = Annotated[str, Meta(max_length=64, pattern=r"^[0-9a-f]*\Z")]
MAX_DIGESTS_LENGTH = 4 << 20
"""Bytes of which digests may be asked for at once."""
MIN_PIECE = 4096
StageName = Literal["none", "running", "failover", "failover-failed", "done"]


class Start(Document, frozen=True, kw_only=True):
    """Arguments of start.

    `assume_clean`: the operator asserts that both disks hold the same data. `force`:
    on a primary that is not ready, this host's disk is the one that counts.
    `discard_my_data`: on a secondary, what was written to its LUN may be lost. `sync_from`: on the
    primary, its own name: whatever the secondary has, it is made equal to this host.
    """

    assume_clean: bool = False
    sync_from: Annotated[str, Meta(max_length=64)] | None = None
    force: bool = False
    discard_my_data: bool = False


class Failover(Document, frozen=True, kw_only=True):
    """Arguments of failover. Without `to` the resource file's `failover` says.

    `fenced`: whoever asks has made sure that the primary is off. `force`: whatever is given up by it.
    """

    to: Literal["latest", "checkpoint"] | None = None
    fenced: bool = False
    force: bool = False


class Stop(Document, frozen=True, kw_only=True):
    """Arguments of stop-replication. `force`: although something here says that it is not safe."""

    force: bool = False


class ErrorStatus(Document, frozen=True, kw_only=True):
    """Whether a replication error is recorded, and which (QEMU's ReplicationStatus)."""

    error: bool
    desc: str | UnsetType = UNSET


class DeviceArguments(Document, frozen=True, kw_only=True):
    """Arguments of attach-device and detach-device."""

    device: Device


CheckpointName = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[ -~]*\Z")]


class PeerHello(Document, frozen=True, kw_only=True):
    """Arguments of peer-hello: the primary introduces itself; without `generation` a new pair begins.

    It is given every second too. `protocol` is the one that the greeting has agreed on, 2 without
    one. With `settled` it is answered when no other command is under way. `verified`: both disks
    are known to be equal. `outdated_since`: since then the secondary misses writes, `reason` says
    why, and `missed_bytes` how much is known. `disk_error`: why the primary's own disk may lack
    what was acknowledged.
    """

    resource: Text
    protocol: Count
    generation: Text | None = None
    settled: bool = False
    verified: bool = False
    outdated_since: Time = ""
    reason: LongText = ""
    missed_bytes: Count = 0
    disk_error: LongText = ""


class PeerState(Document, frozen=True, kw_only=True):
    """Result of peer-hello and peer-checkpoint: what the secondary has, and its recorded error.

    `checkpoint_name` is that of its last checkpoint, `paired` says that a primary has been
    connected in this generation, and `promoted_at` when this host was promoted. `settled`
    counts the hellos with `settled` that this process has answered.
    """

    stage: StageName
    epoch: Count
    generation: Text
    length: Count
    error: str | None = None
    checkpoint_name: Text = ""
    paired: bool = False
    promoted_at: Time = ""
    settled: Count = 0


class Resync(Document, frozen=True, kw_only=True):
    """Arguments of resync. Without any: begin one.

    `paused`: whether this and later ones send nothing. `limit`: bytes per second at most, 0: as the
    latency of the LUN's own writes allows. Both are true until the worker ends.
    """

    paused: bool | None = None
    limit: Count | None = None


class PeerResync(Document, frozen=True, kw_only=True):
    """Arguments of peer-resync: the pairing, and the name of the checkpoint that the state before becomes."""

    generation: Text
    name: CheckpointName


class PeerResyncBegun(Document, frozen=True, kw_only=True):
    """Result of peer-resync. `compare`: the secondary does not know itself where its disk may differ."""

    compare: bool


class PeerResynced(Document, frozen=True, kw_only=True):
    """Arguments of peer-resynced: the pairing."""

    generation: Text


class PeerEpoch(Document, frozen=True, kw_only=True):
    """Arguments of peer-prepare: the epoch that is about to end."""

    epoch: Count


class PeerCheckpoint(Document, frozen=True, kw_only=True):
    """Arguments of peer-checkpoint: the epoch that ends, and a name for this checkpoint that no other has.

    `settled` is what the caller's last answer to a hello had: one that was asked for before
    a later hello was given up, however late the network brings it.
    """

    epoch: Count
    settled: Count
    name: CheckpointName


class PeerRange(Document, frozen=True, kw_only=True):
    """Arguments of peer-digests: a range of the disk, in pieces; the last may be shorter."""

    offset: Count
    length: Annotated[int, Meta(ge=1, le=MAX_DIGESTS_LENGTH)]
    piece: Annotated[int, Meta(ge=MIN_PIECE, le=MAX_DIGESTS_LENGTH)]


class PeerDigests(Document, frozen=True, kw_only=True):
    """Result of peer-digests: the BLAKE2b of each piece in hexadecimal, empty if it is all zero."""

    digests: Annotated[list[Digest], Meta(max_length=MAX_DIGESTS_LENGTH // MIN_PIECE)]


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
    """Result of start and stop-replication: the stage now; `ignored` if QEMU's rules ignore the command there."""

    ignored: bool = False
    stage: StageName


class Link(Document, frozen=True, kw_only=True):
    """The link to the peer; `since` is when it was connected, or ceased to be, `reason` why if it is not.

    `heard` is when the peer was last heard, as far as that is noted.
    """

    state: Literal["none", "listening", "connecting", "connected", "waiting", "lost"] = "none"
    peer: str = ""
    in_flight: Count = 0
    in_flight_bytes: Count = 0
    since: str | None = None
    reason: str | None = None
    heard: str | None = None


class Protection(Document, frozen=True, kw_only=True):
    """Whether every write is on both hosts before it is acknowledged, in words, since when, and what to do.

    `level` is finer: resyncing if it is not protected and that ends by itself, outdated if this host's disk is old,
    not-ready if the LUN answers NOT READY, failed if a disk has failed.
    """

    protected: bool
    level: Literal["protected", "resyncing", "unprotected", "outdated", "not-ready", "failed"]
    words: str
    since: str | None = None
    advice: str | None = None


class Progress(Document, frozen=True, kw_only=True):
    """Bytes `done` of `total`."""

    done: Count
    total: Count


class PeerSoftware(Document, frozen=True, kw_only=True):
    """The peer's software, as it has said at its last connection: its `version`, null before there were greetings.

    `protocol` is the one that both hosts speak; without it they have none in common, and `refusal` says more.
    """

    protocol: Count | None
    version: str | None
    refusal: str | None = None


class Overlays(Document, frozen=True, kw_only=True):
    """What the secondary's overlays hold in this epoch."""

    active_bytes: Count = 0
    hidden_bytes: Count = 0


class Job(Document, frozen=True, kw_only=True):
    """A background job, as QEMU's BlockJobInfo: `offset` of `length` is done; `speed` is bytes per second.

    `seconds_left` is of a resync, at its rate of late; null while nothing moves.
    """

    id: str
    type: str
    offset: Count
    length: Count
    speed: Count = 0
    status: str
    error: str | None = None
    seconds_left: float | None = None


class Frontend(Document, frozen=True, kw_only=True):
    """A way to the LUN: `device` is uioN or where NBD listens."""

    type: Literal["tcmu", "nbd"]
    device: str
    in_flight: Count = 0
    commands: Count = 0
    errors: Count = 0


class Status(Document, frozen=True, kw_only=True):
    """Everything about one resource on one host: what `status --json` prints.

    `running` and `status` are QEMU's members of the same name: whether the LUN serves.
    `hangs` says which call of a disk has not returned, and for how long.
    `last_forwarded` is about when the last forwarded write came; the secondary misses
    what was written since `outdated_since`; `error_since` is when `error` was recorded;
    `not_ready` is why the LUN answers NOT READY; `peer_software` is null before the peer was met, and if it is QEMU;
    `comparing` is how far the comparison
    of both disks is that a start begins.
    """

    resource: str
    protection: Protection
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
    error_since: str | None = None
    last_forwarded: str | None = None
    outdated_since: str | None = None
    not_ready: str | None = None
    comparing: Progress | None = None
    hangs: str | None = None
    last_checkpoint: Checkpoint | None = None
    checkpoint_under_way_since: str | None = None
    frontends: list[Frontend] = []
    running: bool = True
    status: Literal["running", "prelaunch"] = "running"
    pid: Count
    version: str
    peer_software: PeerSoftware | None = None


class DeviceStatus(Document, frozen=True, kw_only=True):
    """What `query-status` answers for a LUN that is not a resource (`serve --device`)."""

    device: str
    subtype: str
    config: str
    size: Count
    frontends: list[Frontend] = []
    hangs: str | None = None
    running: bool = True
    status: Literal["running"] = "running"
    pid: Count
    version: str


class WorkerInfo(Document, frozen=True, kw_only=True):
    """A worker as the manager sees it; `error` is its last words if it ended, or why it was not started.

    "hung" says nothing any more, and SIGKILL does not end it. `down_since` is when it first ended, or was
    killed, since it last served.
    """

    name: str
    state: Literal["starting", "running", "hung", "waiting", "stopping", "stopped", "failed"]
    pid: Count | None = None
    restarts: Count = 0
    error: str | None = None
    down_since: str | None = None


class DeviceInfo(Document, frozen=True, kw_only=True):
    """A LUN that the kernel has for a handler in user space, as the manager sees it.

    `config` is its backstore's SUBTYPE/CONFIG. It is `served` by `worker`, in process `pid`, or not,
    since `since`: then `reason` says what was found and expected, and `advice` what to do. `starting`:
    it is being taken up; `foreign`: no handler of this host serves it, another program may.
    """

    device: str
    backstore: str
    config: str
    state: Literal["served", "starting", "unserved", "foreign"]
    since: str
    worker: str | None = None
    pid: Count | None = None
    reason: str | None = None
    advice: str | None = None


COMMANDS = table(
    Command("query-status", Nothing, Status, OPERATOR, "Everything about the resource.", oob=True),
    Command("init", Nothing, None, OPERATOR, "Make the overlay directory this resource's."),
    Command("start", Start, Outcome, OPERATOR, "Begin to replicate."),
    Command("checkpoint", Nothing, Checkpoint | None, OPERATOR, "Make the present the new baseline."),
    Command("failover", Failover, FailoverStarted | None, OPERATOR, "Make this host the one that counts."),
    Command(
        "stop-replication", Stop, Outcome, OPERATOR,
        "Stop replicating; a secondary makes a last checkpoint.",
    ),
    Command("resync", Resync, None, OPERATOR, "Send the secondary what it misses; or how fast that is done."),
    Command("query-errors", Nothing, ErrorStatus, OPERATOR, "The recorded error, and its reason.", oob=True),
    Command("attach-device", DeviceArguments, None, OPERATOR, "Serve the LUN on a UIO device too."),
    Command("detach-device", DeviceArguments, None, OPERATOR, "The UIO device is going or gone."),
    Command("quit", Nothing, None, OPERATOR, "End the worker in order."),
    Command("peer-greet", Greeting, Greeting, PEER, "Which protocols the primary speaks; first of all."),
    Command("peer-hello", PeerHello, PeerState, PEER, "The primary introduces itself."),
    Command("peer-prepare", PeerEpoch, None, PEER, "Get ready for the checkpoint that ends the epoch."),
    Command("peer-checkpoint", PeerCheckpoint, PeerState, PEER, "End the epoch; the secondary begins the next."),
    Command("peer-digests", PeerRange, PeerDigests, PEER, "Hashes of the secondary's disk, to compare."),
    Command("peer-resync", PeerResync, PeerResyncBegun, PEER, "What the secondary misses will be sent."),
    Command("peer-resynced", PeerResynced, PeerState, PEER, "All of it was sent: the pair is in sync."),
)  # fmt: skip

DEVICE_COMMANDS = table(
    Command("query-status", Nothing, DeviceStatus, OPERATOR, "Everything about the LUN.", oob=True),
    COMMANDS["quit"],
)

MANAGER_COMMANDS = table(
    Command("query-workers", Nothing, list[WorkerInfo], OPERATOR, "The workers and what became of them."),
    Command(
        "query-devices",
        Nothing,
        list[DeviceInfo],
        OPERATOR,
        "The kernel's LUNs, who serves them, or why nobody.",
    ),
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
    **monitor.EVENTS,
}
