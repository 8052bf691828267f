"""QEMU's view of the chain: named nodes, devices, and the child of the primary's mirror.

Devices are `NAME`, the LUN, and `NAME-disk`. Nodes have the names that the
drawings of docs/architecture.md give them; gates and what else is no node in
QEMU's graph is left out.

    primary     top (quorum) -+- children.0  disk
                              +- children.1  replication -> remote       (replica.py)
    secondary   replication -> active -> hidden -> disk
                copy-before-write -> disk                  (while forwarded writes are taken)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from msgspec import UNSET, UnsetType

from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.file import File
from tcmu_replication.block.mirror import Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.remote import Remote
from tcmu_replication.block.replication import Filter, Forward
from tcmu_replication.control.command import Nothing
from tcmu_replication.control.server import Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu import block_schema as schema
from tcmu_replication.qemu.replica import NamedReplica
from tcmu_replication.qemu.view import Replica
from tcmu_replication.replication.stages import Mode

WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
"""A name that a controller may give (QEMU's id_wellformed)."""

_DRIVERS: dict[type[Node], tuple[str, str]] = {
    Mirror: ("top", "quorum"),
    Forward: ("replication", "replication"),
    Filter: ("replication", "replication"),
    Remote: ("remote", "nbd"),
    Overlay: ("", "overlay"),
    CopyBeforeWrite: ("copy-before-write", "copy-before-write"),
    File: ("disk", "raw"),
}
"""The node-name ("" for the node's own) and QEMU's driver for what it does."""

_CACHE = schema.BlockdevCacheInfo(writeback=True, direct=False, no_flush=False)


class Graph:
    """The commands of nodes, for one end of a resource."""

    def __init__(self, replica: Replica, disk: File, named: NamedReplica) -> None:
        self.lun = replica.name
        self.disk = f"{replica.name}-disk"
        self._replica = replica
        self._file = disk
        self._named = named
        self.commands: dict[str, Handler] = {
            "query-block": self._query_block,
            "query-named-block-nodes": self._query_nodes,
            "x-blockdev-change": self._change,
        }

    def nodes(self) -> dict[str, Node]:
        """Every node, by its node-name."""
        replica = self._replica
        roots: list[Node] = [replica.top, self._file]
        if replica.mode is Mode.SECONDARY:
            roots += [] if replica.forwarded is None else [replica.forwarded]
        elif (root := self._named.root()) is not None and not self._named.attached:
            roots.append(root)
        return {self.name(node): node for root in roots for node in self._walk(root)}

    def devices(self) -> dict[str, Node]:
        """The node that each device shows."""
        replica = self._replica
        disk: Node = self._file
        if replica.mode is Mode.SECONDARY and replica.forwarded is not None:
            disk = replica.forwarded
        return {name: next(self._walk(root)) for name, root in ((self.lun, replica.top), (self.disk, disk))}

    def find(self, name: str) -> Node:
        """A device's or else a node's. Raises `Error(NOT_FOUND)` in QEMU's words."""
        node = self.devices().get(name) or self.nodes().get(name)
        if node is None:
            raise Error(Kind.NOT_FOUND, f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def name(self, node: Node) -> str:
        """A node's node-name."""
        return self._named.name(node) or _DRIVERS[type(node)][0] or node.name

    def _walk(self, node: Node) -> Iterator[Node]:
        """The node and all below it that QEMU would call nodes, the one that is read from first."""
        if type(node) in _DRIVERS:
            yield node
        for child in self._children(node):
            yield from self._walk(child)

    def _children(self, node: Node) -> tuple[Node, ...]:
        if not isinstance(node, Mirror):
            return node.children
        local = tuple(child for child in node.children if child is not node.replica)
        replica = self._named.root()
        return local if replica is None or not self._named.attached else (*local, replica)

    # --- commands

    async def _query_block(self, arguments: Nothing, session: Session) -> list[schema.BlockInfo]:
        return [
            schema.BlockInfo(
                device=name,
                type="unknown",
                removable=False,
                locked=False,
                inserted=self._info(node, flat=False),
            )
            for name, node in self.devices().items()
        ]

    async def _query_nodes(self, arguments: schema.Flat, session: Session) -> list[schema.BlockDeviceInfo]:
        return [self._info(node, flat=arguments.flat) for node in self.nodes().values()]

    def _info(self, node: Node, *, flat: bool) -> schema.BlockDeviceInfo:
        below = _backing(node)
        return schema.BlockDeviceInfo(
            node_name=self.name(node),
            drv=_DRIVERS[type(node)][1],
            file=_filename(node),
            ro=node.read_only,
            backing_file=UNSET if below is None else _filename(below),
            backing_file_depth=_depth(node),
            image=_image(node, flat=flat),
            cache=_CACHE,
        )

    async def _change(self, arguments: schema.BlockdevChange, session: Session) -> None:
        """QEMU's qmp_x_blockdev_change, its checks in its order."""
        parent = self.find(arguments.parent)
        name = next((name for name, node in self.devices().items() if node is parent), self.name(parent))
        child, new = arguments.child, arguments.node
        if child is UNSET and new is UNSET:
            raise Error(Kind.BAD_REQUEST, "Either child or node must be specified")
        if child is not UNSET and new is not UNSET:
            raise Error(Kind.BAD_REQUEST, "The parameters child and node are in conflict")
        if child is not UNSET:
            await self._remove(parent, name, arguments.parent, child)
        else:
            assert new is not UNSET
            await self._add(parent, name, new)

    async def _remove(self, parent: Node, name: str, asked: str, child: str) -> None:
        if child not in self._child_names(parent):
            raise Error(Kind.NOT_FOUND, f"Node '{asked}' does not have child '{child}'")
        if not isinstance(parent, Mirror) or self._replica.mode is not Mode.PRIMARY:
            raise Error(Kind.UNSUPPORTED, f"The node {name} does not support removing a child")
        if len(self._children(parent)) == 1:
            raise Error(
                Kind.INVALID_STATE, "The number of children cannot be lower than the vote threshold 1"
            )
        if child == "children.0":
            raise Error(
                Kind.UNSUPPORTED,
                f"the local disk of {self.lun} is what counts and cannot be removed; fail over on the secondary",
            )
        await self._named.detach()

    async def _add(self, parent: Node, name: str, new: str) -> None:
        node = self.nodes().get(new)
        if node is None:
            raise Error(Kind.NOT_FOUND, f"Node '{new}' not found")
        if not isinstance(parent, Mirror) or self._replica.mode is not Mode.PRIMARY:
            raise Error(Kind.UNSUPPORTED, f"The node {name} does not support adding a child")
        if node is not self._named.root() or self._named.attached:
            raise Error(Kind.CONFLICT, f"The node {new} already has a parent")
        await self._named.attach()

    def _child_names(self, parent: Node) -> list[str]:
        """QEMU's names of a node's children."""
        if isinstance(parent, Mirror):
            return [f"children.{index}" for index in range(len(self._children(parent)))]
        if isinstance(parent, Overlay):
            return ["file", "backing"]
        return ["file"]


def _backing(node: Node) -> Node | None:
    """What an overlay shows where it holds nothing."""
    return node.children[0] if isinstance(node, Overlay) else None


def _depth(node: Node) -> int:
    """Overlays from here to the disk."""
    if isinstance(node, Mirror) or not node.children:
        return 0
    return isinstance(node, Overlay) + _depth(node.children[0])


def _filename(node: Node) -> str:
    """An image's file; a filter has its child's, as in QEMU."""
    if isinstance(node, File):
        return node.path
    if isinstance(node, Overlay):
        return f"{node.path}.data"
    if isinstance(node, Remote):
        return f"nbd://{node.address}/{node.export}"
    return _filename(node.children[0]) if node.children else ""


def _image(node: Node, *, flat: bool) -> schema.ImageInfo:
    backing = _backing(node)
    return schema.ImageInfo(
        filename=_filename(node),
        format=_DRIVERS[type(node)][1],
        virtual_size=node.length,
        actual_size=_actual_size(node),
        backing_image=UNSET if flat or backing is None else _image(backing, flat=False),
    )


def _actual_size(node: Node) -> int | UnsetType:
    if not isinstance(node, File | Overlay):
        return UNSET
    try:
        return os.stat(_filename(node)).st_blocks * 512
    except OSError:
        return UNSET
