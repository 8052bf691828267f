"""QEMU's commands and events that we have, and the documents that they carry.

Source: qapi/control.json, introspect.json, migration.json, block-core.json,
block-export.json, block.json, job.json and sockets.json of QEMU 7.2. A member
that QEMU has and we do not is one that would do nothing here; one that QEMU
leaves out when it has no value is UNSET, never null.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from tcmu_replication.control.command import OPERATOR, PEER, Command, Document, Nothing, table

UInt32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


# --- the monitor itself (control.json, introspect.json)


class Capabilities(Document, frozen=True, kw_only=True):
    """Arguments of qmp_capabilities: what of the greeting's `capabilities` is wanted."""

    enable: list[Literal["oob"]] = []


class CommandInfo(Document, frozen=True, kw_only=True):
    """A command that this connection may give."""

    name: str


class VersionTriple(Document, frozen=True, kw_only=True):
    """Our version, where QEMU has its own: clients look there."""

    major: int
    minor: int
    micro: int


class Version(Document, frozen=True, kw_only=True):
    """Result of query-version; `package` says that this is not QEMU."""

    qemu: VersionTriple
    package: str


SESSION_COMMANDS = table(
    Command("qmp_capabilities", Capabilities, None, PEER, "Negotiate; the first command of a connection."),
    Command("query-commands", Nothing, list[CommandInfo], PEER, "The commands of this connection."),
    Command(
        "query-qmp-schema", Nothing, list[dict[str, Any]], PEER, "The schema of all commands and events."
    ),
    Command("query-version", Nothing, Version, PEER, "Who serves here."),
)
"""What every connection has."""


# --- the mirror's failures (block-core.json); sectors have 512 bytes


class QuorumReportBad(Document, frozen=True, kw_only=True):
    """A child of the mirror failed; a flush has no sectors."""

    type: Literal["read", "write", "flush"]
    error: str | UnsetType = UNSET
    node_name: str
    sector_num: int
    sectors_count: int


class QuorumFailure(Document, frozen=True, kw_only=True):
    """A request to the mirror failed: nobody whose word counts could carry it out."""

    reference: str
    sector_num: int
    sectors_count: int


# --- replication (migration.json)


class SetReplication(Document, frozen=True, kw_only=True):
    """Arguments of xen-set-replication. `failover` is for `enable` = false only; `primary` for true only."""

    enable: bool
    primary: bool
    failover: bool | UnsetType = UNSET


class ErrorStatus(Document, frozen=True, kw_only=True):
    """Whether a replication error is recorded, and which (QEMU's ReplicationStatus)."""

    error: bool
    desc: str | UnsetType = UNSET


REPLICATION = table(
    Command("xen-set-replication", SetReplication, None, OPERATOR, "QEMU's start, stop and failover."),
    Command("query-xen-replication-status", Nothing, ErrorStatus, OPERATOR, "QEMU's query-errors."),
    Command("xen-colo-do-checkpoint", Nothing, None, OPERATOR, "QEMU's checkpoint."),
)

EVENTS: dict[str, type[Document]] = {
    "QUORUM_REPORT_BAD": QuorumReportBad,
    "QUORUM_FAILURE": QuorumFailure,
}
