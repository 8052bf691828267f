"""Puts a replica together from what a primary, or a secondary, is made with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from tcmu_replication.block.node import Node
from tcmu_replication.block.remote import Remote
from tcmu_replication.replication import roles
from tcmu_replication.replication.epochs import Epochs
from tcmu_replication.replication.peer_state import Peer
from tcmu_replication.replication.pulse import Heard
from tcmu_replication.replication.receiver import Publish, Receiver, Withdraw
from tcmu_replication.replication.record import Record
from tcmu_replication.replication.replica import Replica
from tcmu_replication.replication.sender import Sender
from tcmu_replication.replication.stages import Mode


def primary(
    name: str,
    disk: Node,
    connect: Callable[[Callable[[], Awaitable[None]]], Remote],
    peer: Peer,
    directory: Path,
    *,
    heard: Heard | None = None,
    stage_changed: Callable[[], None] = lambda: None,
    disk_name: str = "",
    peer_name: str = "the secondary",
    **options: Any,
) -> Replica:
    """A replica whose first role is a primary's. See `Replica` and, for `options`, `Sender`."""
    return Replica(
        name,
        disk,
        Record(name, Mode.PRIMARY, disk.length, directory, disk_name),
        roles,
        sender=Sender(disk, directory, connect, peer, **options),
        heard=heard,
        stage_changed=stage_changed,
        peer_name=peer_name,
    )


def secondary(
    name: str,
    disk: Node,
    epochs: Epochs,
    *,
    top_id: str,
    durable: bool,
    publish: Publish,
    withdraw: Withdraw,
    roots: Mapping[str, Node] | None = None,
    in_use: Callable[[], str | None] = lambda: None,
    heard: Heard | None = None,
    stage_changed: Callable[[], None] = lambda: None,
    disk_name: str = "",
    peer_name: str = "the primary",
) -> Replica:
    """A replica whose first role is a secondary's. See `Replica` and `Receiver`."""
    record = Record(name, Mode.SECONDARY, disk.length, epochs.directory, disk_name)
    receiver = Receiver(
        disk,
        epochs,
        record,
        top_id=top_id,
        durable=durable,
        publish=publish,
        withdraw=withdraw,
        roots=roots,
        in_use=in_use,
    )
    return Replica(
        name,
        disk,
        record,
        roles,
        receiver=receiver,
        heard=heard,
        stage_changed=stage_changed,
        peer_name=peer_name,
    )
