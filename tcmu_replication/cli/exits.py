"""Exit statuses: what a script can decide on."""

from __future__ import annotations

from tcmu_replication.errors import Kind

FAILED, WRONG, STATE, ABSENT, DENIED, PEER, LATE, UNPROTECTED, RESYNCING, OUTDATED = range(1, 11)

MEANINGS: dict[int, str] = {
    0: "done; of status and errors: every resource that was asked for is protected",
    FAILED: "it was tried and failed (I/O error, no space, ...); of errors: one is recorded",
    WRONG: "wrong usage, or wrong configuration",
    STATE: "not possible in this state, or in use",
    ABSENT: "no such resource, or nobody serves it (down)",
    DENIED: "not permitted (not root), or read-only",
    PEER: "the peer is lost, or broke the protocol",
    LATE: "no answer in time",
    UNPROTECTED: "status and errors: there was an answer, but writes are not on both hosts",
    RESYNCING: "status: the same, and it ends by itself: disks are compared, or made equal",
    OUTDATED: "status: the disk of this host is old",
}

STATUS_OF_LEVEL: dict[str, int] = {"protected": 0, "resyncing": RESYNCING, "outdated": OUTDATED}
"""Of the levels of a verdict; all others are UNPROTECTED."""
WORST_FIRST = (OUTDATED, UNPROTECTED, RESYNCING, 0)

STATUS_OF_KIND: dict[Kind, int] = {
    Kind.IO: FAILED,
    Kind.NO_SPACE: FAILED,
    Kind.OUT_OF_RANGE: WRONG,
    Kind.UNALIGNED: WRONG,
    Kind.UNSUPPORTED: WRONG,
    Kind.INVALID_STATE: STATE,
    Kind.BAD_REQUEST: WRONG,
    Kind.BAD_CONFIG: WRONG,
    Kind.NOT_FOUND: ABSENT,
    Kind.READ_ONLY: DENIED,
    Kind.MISCOMPARE: FAILED,
    Kind.CONFLICT: STATE,
    Kind.PERMISSION: DENIED,
    Kind.PEER_LOST: PEER,
    Kind.PEER_LIED: PEER,
    Kind.TIMED_OUT: LATE,
    Kind.CANCELLED: FAILED,
    Kind.NOT_READY: STATE,
    Kind.BECOMING_READY: STATE,
}


def table() -> str:
    """The statuses as lines for --help."""
    return "\n".join(f"  {status}  {meaning}" for status, meaning in MEANINGS.items())
