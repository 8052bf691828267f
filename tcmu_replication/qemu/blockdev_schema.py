"""QEMU's commands that make, end and cut off a primary's replica, and their documents.

Source: qapi/block-core.json, sockets.json, yank.json and misc.json of QEMU 7.2.
Of blockdev-add's drivers there are the two that a replica is made of.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

from tcmu_replication.control.command import OPERATOR, Command, Document, Nothing, table
from tcmu_replication.qemu.block_schema import UInt32

DetectZeroes = Literal["off", "on", "unmap"]


class InetServer(Document, frozen=True, kw_only=True, tag_field="type", tag="inet"):
    """A server's TCP address; `port` is a number in a string."""

    host: str
    port: str


class UnixServer(Document, frozen=True, kw_only=True, tag_field="type", tag="unix"):
    """A server's unix socket."""

    path: str


class BlockdevNbd(Document, frozen=True, kw_only=True, tag_field="driver", tag="nbd"):
    """The connection to the secondary's export, as the resource file has it. Zeroes travel as they are written."""

    node_name: str | UnsetType = UNSET
    detect_zeroes: DetectZeroes | UnsetType = UNSET
    server: InetServer | UnixServer
    export: str | UnsetType = UNSET
    tls_creds: str | UnsetType = UNSET
    reconnect_delay: UInt32 | UnsetType = UNSET


class BlockdevReplication(Document, frozen=True, kw_only=True, tag_field="driver", tag="replication"):
    """The replication filter; `file` is its connection, or the name of one that was added before."""

    node_name: str | UnsetType = UNSET
    detect_zeroes: DetectZeroes | UnsetType = UNSET
    file: str | BlockdevNbd
    mode: Literal["primary", "secondary"]
    top_id: str | UnsetType = UNSET


class BlockdevDel(Document, frozen=True, kw_only=True):
    """Arguments of blockdev-del."""

    node_name: str


class YankBlockNode(Document, frozen=True, kw_only=True, tag_field="type", tag="block-node"):
    """A node that is a connection."""

    node_name: str


class YankChardev(Document, frozen=True, kw_only=True, tag_field="type", tag="chardev"):
    """There is none here."""

    id: str


class YankMigration(Document, frozen=True, kw_only=True, tag_field="type", tag="migration"):
    """There is none here."""


YankInstance = YankBlockNode | YankChardev | YankMigration


class Yank(Document, frozen=True, kw_only=True):
    """Arguments of yank: what is cut off, all or nothing."""

    instances: list[YankInstance]


class HumanMonitorCommand(Document, frozen=True, kw_only=True):
    """Arguments of human-monitor-command: a line of QEMU's other monitor, here drive_add or drive_del."""

    command_line: str


COMMANDS = table(
    Command(
        "blockdev-add", BlockdevNbd | BlockdevReplication, None, OPERATOR,
        "Give the primary's replica, which the resource file describes, its node-names.",
    ),
    Command("blockdev-del", BlockdevDel, None, OPERATOR, "Forget a node-name that blockdev-add gave."),
    Command("yank", Yank, None, OPERATOR, "Cut the link to the secondary at once, for good.", oob=True),
    Command(
        "query-yank", Nothing, list[YankInstance], OPERATOR, "What yank could cut.", oob=True,
    ),
    Command(
        "human-monitor-command", HumanMonitorCommand, str, OPERATOR,
        "drive_add and drive_del, the older blockdev-add and -del. An error is the result's text.",
    ),
)  # fmt: skip
