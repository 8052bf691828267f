"""Whether a write is safe on both hosts: the verdict of `status`, in words, and what to do.

`Facts` is what one host knows of one resource, `TABLE` the rows in the order in
which they count: the first that applies gives the verdict. The last rows are the
good ones, so a pair is protected only if nothing before them applies. Nothing
here asks or does anything.

The advice must be safe when it is followed to the letter by somebody tired, with
an initiator that goes on writing. docs/status.md shows every row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import format_size

Role = Literal["primary", "secondary"]
Level = Literal["protected", "resyncing", "unprotected", "outdated", "not-ready", "failed"]
"""`resyncing`: not protected, and that ends by itself. `outdated`: this host's disk is old. `not-ready`: the LUN
answers NOT READY. `failed`: a disk has failed, and one host alone has the data."""


class Facts(NamedTuple):
    """What `host` knows of the resource `name`. Times are ISO 8601 in UTC; None, or "", is never or not known.

    `error` is the recorded one. `outdated_since`: the secondary misses what was written
    since then. `detached_since`: this primary's disk failed, the peer alone serves since
    then. `disk_error`: why this primary's disk may lack what was acknowledged, `peer_disk_error` the
    same of the peer's. `not_ready`: why the LUN answers NOT READY. `superseded_at` and `promoted_at`:
    when the peer, and when this host, was promoted. `suspect`: why the checkpoint may
    be damaged. `comparing`: bytes done and in all of the comparison that a start
    begins. `resending_bytes`: what goes to the peer again after a crash.
    `peer_is_qemu`: it cannot be told of a resync. `verified`: both disks were equal once in
    this pairing. `resync`: of a primary how far one is that is
    under way, of a secondary since when. `out_of_sync_bytes`: what the peer is known to miss, and
    `map_complete` that no more is missed. `removed`: the replica was taken out of the mirror. `job`: the commit in
    words. `hangs`: the call of a disk that has not returned, and for how long.
    `link_state` is that of `schema.Link`. `checkpoint_under_way_since` is
    shown and changes no verdict.
    """

    name: str
    host: str
    role: Role
    peer: str
    stage: Stage = Stage.NONE
    stage_since: str | None = None
    link_state: str = "none"
    link_since: str | None = None
    link_reason: str | None = None
    peer_heard_at: str | None = None
    last_forwarded_at: str | None = None
    out_of_sync_bytes: int = 0
    map_complete: bool = True
    error: str | None = None
    error_since: str | None = None
    outdated_since: str | None = None
    outdated_reason: str | None = None
    comparing: tuple[int, int] | None = None
    verified: bool = True
    peer_is_qemu: bool = False
    resync: str | None = None
    resending_bytes: int = 0
    detached_since: str | None = None
    not_ready: str | None = None
    not_ready_since: str | None = None
    superseded_at: str | None = None
    promoted_at: str | None = None
    suspect: str | None = None
    checkpoint_under_way_since: str | None = None
    removed: bool = False
    disk_error: str | None = None
    peer_disk_error: str | None = None
    job: str | None = None
    hangs: str | None = None


class Verdict(NamedTuple):
    """`protected`: every write is on both hosts before it is acknowledged. `advice`: what to do, if anything."""

    protected: bool
    level: Level
    words: str
    since: str | None
    advice: str | None


class Row(NamedTuple):
    """One verdict. `since` names the facts that say since when; the first that is known counts.

    `words` and `advice` are templates; see `_values` for what stands in them.
    """

    name: str
    applies: Callable[[Facts], bool]
    level: Level
    words: str
    since: tuple[str, ...] = ()
    advice: str | None = None


def _primary(facts: Facts) -> bool:
    return facts.role == "primary"


def _secondary(facts: Facts) -> bool:
    return facts.role == "secondary"


AGAIN = (
    "`tcmu-replication stop {name}` on {primary} and on {secondary}, then `tcmu-replication start {name}` on "
    "{secondary}, then on {primary}, which compares both disks. If they differ: `tcmu-replication resync {name}` on "
    "{primary} makes {secondary} equal to it. The LUN of {primary} is used meanwhile. Each step is in docs/status.md"
)
"""The way back where a resync does not begin by itself."""
RESYNC = (
    "bring back {secondary}, its worker and the link: it is then sent what it misses, while the LUN of {primary} is "
    "used. "
    'Where the resource file says `resync = "manual"`, or a controller has started replication: '
    "`tcmu-replication resync {name}` on {primary}"
)
START = (
    "`tcmu-replication start {name}` on {secondary}, then on {primary}. It compares both disks; if they differ it says "
    "so, and copies neither over the other"
)
SEE_TO_THE_LINK = (
    "see whether {peer} is on, whether its worker runs (`tcmu-replication status {name}`, there), and whether the "
    "network carries the link. If it comes back in time nothing is missed; else status says what to do then"
)
WAIT = "wait: it ends by itself, and the LUN can be used meanwhile"

TABLE: tuple[Row, ...] = (
    Row(
        "superseded",
        lambda f: bool(f.superseded_at),
        "not-ready",
        "{peer} was promoted: the disk of this host is old since then, and its LUN is not served",
        ("superseded_at",),
        "use {peer}, and leave this host as it is. The way back to a pair is in docs/status.md",
    ),
    Row(
        "not-ready",
        lambda f: bool(f.not_ready),
        "not-ready",
        "the LUN answers NOT READY: {not_ready}",
        ("not_ready_since",),
        "see to {peer} first. If it was promoted (its status says so), use it and leave this host as it is. If not, "
        "bring back its worker and the link: this host then goes on by itself",
    ),
    Row(
        "detached",
        lambda f: bool(f.detached_since),
        "failed",
        "the disk of {host} has failed; {peer} alone has all that is written",
        ("detached_since",),
        "stop the initiators of {name} and log them out, then fail over on {peer} (`tcmu-replication failover {name} "
        "--to latest`, there) and let them use {peer}. The disk of {host} is old: let nobody use it",
    ),
    Row(
        "disk-error-alone",
        lambda f: _primary(f) and bool(f.disk_error) and bool(f.outdated_since),
        "failed",
        "{disk_error}; and {peer} misses what was written since then: neither disk has everything",
        ("outdated_since",),
        "stop the initiators of {name} and log them out. Let neither disk go over the other: save what the LUN of "
        "{host} shows on a third disk, check it there, and decide then. Do not end the worker before that",
    ),
    Row(
        "disk-error",
        lambda f: _primary(f) and f.stage is Stage.RUNNING and bool(f.disk_error) and f.comparing is None,
        "failed",
        "{disk_error}. {peer} has all that was acknowledged",
        ("error_since",),
        "stop the initiators of {name} and log them out, then fail over on {peer} (`tcmu-replication failover {name} "
        "--to latest`, there) and let them use {peer}. The disk of {host} must not go over that of {peer}",
    ),
    Row(
        "commit-failed",
        lambda f: f.stage is Stage.FAILOVER_FAILED,
        "failed",
        "{host} was promoted, and its commit has failed: {error}. The LUN shows the right data, which is in the disk "
        "and in the overlays together",
        ("error_since", "promoted_at", "stage_since"),
        "keep the overlay directory. Mend what the error names (a disk, or space), then end the worker, whose process "
        "`tcmu-replication status {name}` names, with kill -KILL: the daemon starts it again, and it commits again. "
        "The initiators see a delay",
    ),
    Row(
        "commit",
        lambda f: f.stage is Stage.FAILOVER,
        "unprotected",
        "{host} was promoted and serves alone; the commit behind it is under way ({job})",
        ("promoted_at", "stage_since"),
        WAIT,
    ),
    Row(
        "promoted",
        lambda f: f.stage is Stage.DONE and bool(f.promoted_at),
        "unprotected",
        "{host} was promoted and serves alone: what is written since then is on this host only",
        ("promoted_at",),
        "let nobody use the LUN of {peer}, its data is old. The way back to a pair is in docs/status.md",
    ),
    Row(
        "secondary-stopped-old",
        lambda f: _secondary(f) and f.stage is Stage.DONE and bool(f.outdated_since or f.error),
        "outdated",
        "replication is not running, and the disk of this host is old or damaged: {outdated}",
        ("outdated_since", "error_since"),
        "let no initiator use the LUN of this host, and keep {peer} serving. To make this host good again: "
        + AGAIN,
    ),
    Row(
        "stopped",
        lambda f: f.stage is Stage.DONE,
        "unprotected",
        "replication is not running; what is written here is on this host only",
        ("stage_since",),
        "if {peer} was promoted (its status says so), use {peer} and leave this host as it is. Else " + START,
    ),
    Row(
        "primary-none",
        lambda f: _primary(f) and f.stage is Stage.NONE,
        "unprotected",
        "replication has not begun; what is written here is on this host only",
        ("stage_since",),
        START,
    ),
    Row(
        "secondary-none",
        lambda f: f.stage is Stage.NONE,
        "unprotected",
        "replication has not begun: what {peer} writes is not here, and the LUN of this host answers I/O errors",
        ("stage_since",),
        START,
    ),
    Row(
        "primary-resyncing",
        lambda f: _primary(f) and bool(f.resync),
        "resyncing",
        "{peer} is sent what it misses ({resync}); until that has ended this host alone has everything",
        ("outdated_since",),
        WAIT,
    ),
    Row(
        "secondary-resyncing",
        lambda f: _secondary(f) and bool(f.resync),
        "resyncing",
        "{peer} sends what is missing here; until that has ended the disk of this host is a mix, and only its "
        "checkpoint is of one time",
        ("resync",),
        "wait; if {peer} is not connected, bring it back, and it goes on. If {peer} is gone for good: "
        "`tcmu-replication failover {name} --to checkpoint` lets this host serve the state from before",
    ),
    Row(
        "primary-unlike",
        lambda f: _primary(f) and bool(f.outdated_since) and not f.verified,
        "unprotected",
        "nothing is forwarded: {outdated}",
        ("outdated_since",),
        "if the data of {host} is the one that counts: `tcmu-replication resync {name}` here makes {peer} equal to it, "
        "while the LUN is used; what only {peer} has is lost. If the data of {peer} counts: "
        "`tcmu-replication stop {name}` on both, and see docs/status.md",
    ),
    Row(
        "primary-outdated-qemu",
        lambda f: _primary(f) and bool(f.outdated_since) and f.peer_is_qemu,
        "unprotected",
        "what is written since then is on this host only: {outdated}. {peer} is QEMU's, and is not sent it",
        ("outdated_since",),
        "see docs/status.md, After a gap: what has to be done with a QEMU",
    ),
    Row(
        "primary-outdated",
        lambda f: _primary(f) and bool(f.outdated_since),
        "unprotected",
        "what is written since then is on this host only: {outdated}",
        ("outdated_since",),
        RESYNC,
    ),
    Row(
        "secondary-outdated",
        lambda f: bool(f.outdated_since),
        "outdated",
        "this host is outdated: {outdated}",
        ("outdated_since",),
        "keep {peer} serving: a failover here would lose what it has written since then. To make this host good "
        "again: " + RESYNC,
    ),
    Row(
        "primary-error",
        lambda f: _primary(f) and bool(f.error),
        "unprotected",
        "{peer} may miss what is written here: {error}",
        ("error_since",),
        AGAIN,
    ),
    Row(
        "secondary-error",
        lambda f: bool(f.error),
        "unprotected",
        "what {peer} has written may be missing here: {error}",
        ("error_since",),
        "keep {peer} serving: a failover here may lose what it has written. To make this host good again: "
        + RESYNC,
    ),
    Row(
        "peer-disk-error",
        lambda f: f.stage is Stage.RUNNING and bool(f.peer_disk_error),
        "failed",
        "the disk of {peer} may lack what was acknowledged ({peer_disk_error}); this host has all of it",
        advice="stop the initiators of {name} and log them out, then fail over here (`tcmu-replication failover {name} "
        "--to latest`) and let them use {host}. The disk of {peer} must not go over that of {host}",
    ),
    Row(
        "suspect",
        lambda f: bool(f.suspect),
        "unprotected",
        "the checkpoint may be damaged: {suspect}",
        advice="do not fail over to the checkpoint. To make the pair good again: " + RESYNC,
    ),
    Row(
        "removed",
        lambda f: f.removed,
        "unprotected",
        "the replica was taken out of the mirror: nothing is forwarded",
        advice="put it back as it was taken out (x-blockdev-change over QMP). If that is refused, something was "
        "written since: " + AGAIN,
    ),
    Row(
        "map-incomplete",
        lambda f: not f.map_complete,
        "unprotected",
        "the disks differ, and it is not known where",
        advice=AGAIN,
    ),
    Row(
        "out-of-sync",
        lambda f: f.out_of_sync_bytes > 0,
        "unprotected",
        "the disks differ in {missed}",
        advice=AGAIN,
    ),
    Row(
        "primary-waiting",
        lambda f: _primary(f) and f.link_state in ("waiting", "connecting"),
        "unprotected",
        "the link to {peer} is down ({link}). Writes wait for it, and go on without {peer} if it stays away",
        ("link_since",),
        SEE_TO_THE_LINK,
    ),
    Row(
        "primary-lost",
        lambda f: _primary(f) and f.link_state != "connected",
        "unprotected",
        "the link to {peer} is down ({link}). What is written from now on is on this host only",
        ("link_since",),
        SEE_TO_THE_LINK,
    ),
    Row(
        "secondary-unverified",
        lambda f: f.link_state != "connected" and f.comparing is not None,
        "unprotected",
        "{peer} is not connected, and whether the disks are equal is not known: this one may have old data anywhere",
        ("peer_heard_at", "link_since"),
        "bring back {peer}, its worker and the link: the comparison of the disks then begins anew. Let nobody use the "
        "disk or the LUN of this host before that has ended",
    ),
    Row(
        "secondary-alone",
        lambda f: f.link_state != "connected" and bool(f.peer_heard_at),
        "unprotected",
        "{peer} is not heard since then. This host has everything up to then, as far as it knows",
        ("peer_heard_at",),
        "see to {peer}. Only if it is off and will stay off: `tcmu-replication failover {name} --to latest` lets this "
        "host serve what it has. While {peer} may still serve, both would take writes, and those of one would be lost",
    ),
    Row(
        "secondary-unconnected",
        lambda f: f.link_state != "connected",
        "unprotected",
        "{peer} is not connected, and nothing is known of what it has written since",
        ("link_since",),
        "see to {peer}: is it on, does its worker run (`tcmu-replication status {name}`, there), does the network "
        "carry the link? If replication was never started there: `tcmu-replication start {name}`, there",
    ),
    Row(
        "hangs",
        lambda f: bool(f.hangs),
        "failed",
        "a disk of {host} does not answer ({hangs}); what waits for it is not acknowledged",
        advice="see to that disk (dmesg): this host goes on by itself when it answers. Nothing that was acknowledged "
        "is missing on {peer} or here by this alone",
    ),
    Row(
        "comparing",
        lambda f: f.comparing is not None,
        "resyncing",
        "both disks are being compared ({compared}); until that has ended nobody knows whether they are equal",
        advice=WAIT,
    ),
    Row(
        "resending",
        lambda f: f.resending_bytes > 0,
        "resyncing",
        "what the peer may have missed is being sent again, {resending} are left",
        advice=WAIT,
    ),
    Row(
        "primary-protected",
        _primary,
        "protected",
        "every write is on both hosts before it is acknowledged",
        ("link_since",),
    ),
    Row(
        "secondary-protected",
        _secondary,
        "protected",
        "this host has every write that {peer} has acknowledged",
        ("link_since",),
    ),
)


def row_of(facts: Facts) -> Row:
    """The first row that applies."""
    return next(row for row in TABLE if row.applies(facts))


def judge(facts: Facts) -> Verdict:
    """Protected or not, in words, since when, and what to do."""
    row = row_of(facts)
    values = _values(facts)
    since = next((at for at in (getattr(facts, name) for name in row.since) if at), None)
    return Verdict(
        row.level == "protected",
        row.level,
        _unless_known(row.words, since).format_map(values),
        since,
        None if row.advice is None else row.advice.format_map(values),
    )


def _unless_known(words: str, since: str | None) -> str:
    """Without a time to refer to, "since then" says nothing."""
    return words if since else words.replace(" since then", "")


def _values(facts: Facts) -> dict[str, str]:
    """What stands in the templates."""
    primary = facts.role == "primary"
    unknown = "the reason is not known"
    return {
        "name": facts.name,
        "host": facts.host,
        "peer": facts.peer,
        "primary": facts.host if primary else facts.peer,
        "secondary": facts.peer if primary else facts.host,
        "error": facts.error or unknown,
        "outdated": facts.outdated_reason or facts.error or unknown,
        "link": facts.link_reason or facts.link_state,
        "not_ready": facts.not_ready or "",
        "suspect": facts.suspect or "",
        "disk_error": facts.disk_error or "",
        "peer_disk_error": facts.peer_disk_error or "",
        "job": facts.job or "see its job",
        "hangs": facts.hangs or "",
        "missed": format_size(facts.out_of_sync_bytes),
        "resending": format_size(facts.resending_bytes),
        "resync": facts.resync or "",
        "compared": _part(facts.comparing),
    }


def _part(progress: tuple[int, int] | None) -> str:
    if progress is None or not progress[1]:
        return "under way"
    done, total = progress
    return f"{format_size(done)} of {format_size(total)}"


VALUES = tuple(_values(Facts("", "", "primary", "")))
"""The names that stand in braces in the templates."""
