"""The monitor itself: the commands that every connection has, and the event that it ends.

Source: qapi/control.json, introspect.json and run-state.json of QEMU 7.2, whose protocol the control socket speaks.
"""

from __future__ import annotations

from typing import Any, Literal

from tcmu_replication.control.command import PEER, Command, Document, Nothing, table


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


class Shutdown(Document, frozen=True, kw_only=True):
    """The worker ends."""

    guest: bool
    reason: Literal["host-qmp-quit"]


EVENTS: dict[str, type[Document]] = {"SHUTDOWN": Shutdown}
