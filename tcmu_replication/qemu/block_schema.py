"""QEMU's commands and events of the block layer that we have, and their documents.

Source: qapi/block-core.json, block-export.json, block.json and sockets.json of
QEMU 7.2. Their older members are written with an underscore, as there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import UNSET, Meta, UnsetType

from tcmu_replication.control.command import OPERATOR, Command, Count, Document, Nothing, table

UInt32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]


# --- nodes


class ImageInfo(Document, frozen=True, kw_only=True):
    """An image; `actual-size` is what it takes of its filesystem, in bytes."""

    filename: str
    format: str
    virtual_size: Count
    actual_size: Count | UnsetType = UNSET
    backing_image: ImageInfo | UnsetType = UNSET


class BlockdevCacheInfo(Document, frozen=True, kw_only=True):
    """The page cache is used and flushes are obeyed: always so."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDeviceInfo(Document, frozen=True, kw_only=True, rename={"node_name": "node-name"}):
    """A node. There are no I/O limits, so those members are 0."""

    node_name: str
    drv: str
    file: str
    ro: bool
    backing_file: str | UnsetType = UNSET
    backing_file_depth: Count
    image: ImageInfo
    cache: BlockdevCacheInfo
    encrypted: bool = False
    detect_zeroes: Literal["off"] = "off"
    write_threshold: Count = 0
    bps: Count = 0
    bps_rd: Count = 0
    bps_wr: Count = 0
    iops: Count = 0
    iops_rd: Count = 0
    iops_wr: Count = 0


class BlockInfo(Document, frozen=True, kw_only=True):
    """A device, and the node that it shows."""

    device: str
    type: Literal["unknown"]
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | UnsetType = UNSET


class Flat(Document, frozen=True, kw_only=True):
    """Arguments of query-named-block-nodes: with `flat` no image says what backs it."""

    flat: bool = False


class BlockdevChange(Document, frozen=True, kw_only=True):
    """Arguments of x-blockdev-change: exactly one of `child`, to remove it, and `node`, to add it."""

    parent: str
    child: str | UnsetType = UNSET
    node: str | UnsetType = UNSET


GRAPH = table(
    Command("query-block", Nothing, list[BlockInfo], OPERATOR, "The LUN and the disk, as devices."),
    Command("query-named-block-nodes", Flat, list[BlockDeviceInfo], OPERATOR, "The chain's nodes."),
    Command(
        "x-blockdev-change", BlockdevChange, None, OPERATOR,
        "Take the replica out of the primary's mirror, or put it there.",
    ),
)  # fmt: skip


# --- exports


class InetSocketAddress(Document, frozen=True, kw_only=True):
    """`port` is a number in a string, `to` the last one that will do; "" as `host` means every address.

    With `numeric` the host is not looked up; `ipv4` and `ipv6` choose between what it has.
    """

    host: str
    port: str
    numeric: bool = False
    to: Annotated[int, Meta(ge=0, le=0xFFFF)] | UnsetType = UNSET
    ipv4: bool | UnsetType = UNSET
    ipv6: bool | UnsetType = UNSET


class UnixSocketAddress(Document, frozen=True, kw_only=True):
    """A socket's path."""

    path: str


class Inet(Document, frozen=True, kw_only=True, tag_field="type", tag="inet"):
    """A TCP address."""

    data: InetSocketAddress


class Unix(Document, frozen=True, kw_only=True, tag_field="type", tag="unix"):
    """A unix socket."""

    data: UnixSocketAddress


class NbdServerStart(Document, frozen=True, kw_only=True):
    """Arguments of nbd-server-start. Over TCP, or with `tls-creds`, the resource file's [tls] applies."""

    addr: Inet | Unix
    tls_creds: str | UnsetType = UNSET
    tls_authz: str | UnsetType = UNSET
    max_connections: UInt32 = 100


class NbdServerAdd(Document, frozen=True, kw_only=True):
    """Arguments of nbd-server-add: `device` is a device or a node; `name` of the export is the same if left out.

    There are no bitmaps, so none is found.
    """

    device: str
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    writable: bool = False
    bitmap: str | UnsetType = UNSET


class NbdServerRemove(Document, frozen=True, kw_only=True):
    """Arguments of nbd-server-remove: `safe` refuses if there are clients, `hard` hangs up on them."""

    name: str
    mode: Literal["safe", "hard"] = "safe"


class BlockExportAdd(Document, frozen=True, kw_only=True):
    """Arguments of block-export-add; `name` is the node's if left out."""

    type: Literal["nbd"]
    id: str
    node_name: str
    name: str | UnsetType = UNSET
    description: str | UnsetType = UNSET
    writable: bool = False


class BlockExportDel(Document, frozen=True, kw_only=True):
    """Arguments of block-export-del; `mode` as in nbd-server-remove."""

    id: str
    mode: Literal["safe", "hard"] = "safe"


class BlockExportInfo(Document, frozen=True, kw_only=True):
    """An export that was added over QMP."""

    id: str
    type: Literal["nbd"]
    node_name: str
    shutting_down: bool


class BlockExportDeleted(Document, frozen=True, kw_only=True):
    """An export is gone, and so are its clients."""

    id: str


EXPORTS = table(
    Command(
        "nbd-server-start", NbdServerStart, None, OPERATOR,
        "Start an NBD server; where a secondary waits for its primary it is that one.",
    ),
    Command("nbd-server-stop", Nothing, None, OPERATOR, "End it, its exports and its connections."),
    Command("nbd-server-add", NbdServerAdd, None, OPERATOR, "Export a device or a node."),
    Command("nbd-server-remove", NbdServerRemove, None, OPERATOR, "End an export."),
    Command("block-export-add", BlockExportAdd, None, OPERATOR, "Export a node."),
    Command("block-export-del", BlockExportDel, None, OPERATOR, "End an export."),
    Command("query-block-exports", Nothing, list[BlockExportInfo], OPERATOR, "What was exported over QMP."),
)  # fmt: skip


# --- the mirror's failures; sectors have 512 bytes


class QuorumReportBad(Document, frozen=True, kw_only=True):
    """A child of the mirror failed; a flush has no sectors."""

    limited_by: ClassVar[str] = "node_name"
    type: Literal["read", "write", "flush"]
    error: str | UnsetType = UNSET
    node_name: str
    sector_num: Count
    sectors_count: Count


class QuorumFailure(Document, frozen=True, kw_only=True):
    """A request to the mirror failed: nobody whose word counts could carry it out."""

    limited_by: ClassVar[str] = "reference"
    reference: str
    sector_num: Count
    sectors_count: Count


COMMANDS = GRAPH | EXPORTS

EVENTS: dict[str, type[Document]] = {
    "BLOCK_EXPORT_DELETED": BlockExportDeleted,
    "QUORUM_REPORT_BAD": QuorumReportBad,
    "QUORUM_FAILURE": QuorumFailure,
}
