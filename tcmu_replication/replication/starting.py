"""What a primary looks at before it begins to forward."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tcmu_replication.block.pending import settle
from tcmu_replication.block.remote import Remote
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.peer_state import News, PeerState
from tcmu_replication.replication.record import Record
from tcmu_replication.replication.stages import Stage
from tcmu_replication.units import BLOCK, MiB

if TYPE_CHECKING:
    from tcmu_replication.replication.replica import Replica

PROBES = 64
"""Blocks that start compares at once, beside the first and the last mebibyte: disks that were never made equal show."""


def refuse_assumption(record: Record) -> None:
    """Raise `Error(MISCOMPARE)` if something here knows better than whoever vouches for equal disks."""
    manifest = record.manifest
    known = []
    if manifest.written_alone:
        known.append("the LUN was written while nothing was replicated")
    if manifest.error or record.error:
        known.append(f"the record has an error ({manifest.error or record.error})")
    if manifest.outdated_at:
        known.append(f"the secondary misses writes since {manifest.outdated_at}")
    if manifest.superseded_at or manifest.detached_at or manifest.disk_error:
        known.append("this host's disk is older than the secondary's")
    if known:
        raise Error(
            Kind.MISCOMPARE,
            f"the disks of {record.name} are not known to be equal: {'; '.join(known)}. Start without "
            "--assume-clean, which compares them",
        )


async def hello(replica: Replica) -> PeerState:
    """The secondary's state, checked for what a start needs. Raises `Error`."""
    state = await replica.sender.peer.hello(News(), settled=True)
    replica.heard.note()
    if state.stage is not Stage.RUNNING:
        raise Error(
            Kind.INVALID_STATE,
            f"the secondary of {replica.name} is in stage {state.stage.value}; start it first "
            f"(tcmu-replication start {replica.name}, on the secondary)",
        )
    if state.length != replica.disk.length:
        raise Error(
            Kind.BAD_CONFIG,
            f"the secondary's disk has {state.length} bytes, this one {replica.disk.length}; they must be equal",
        )
    if state.error is not None:
        raise Error(Kind.INVALID_STATE, f"the secondary of {replica.name} has an error: {state.error}")
    return state


async def probe(replica: Replica, remote: Remote) -> None:
    """Compare parts of both disks. Raises `Error(MISCOMPARE)` at the first difference."""
    length = replica.disk.length
    ends = [(0, min(MiB, length)), (max(0, length - MiB), min(MiB, length))]
    blocks = [random.randrange(max(1, length // BLOCK)) * BLOCK for _ in range(PROBES)]
    for offset, size in [*ends, *((o, min(BLOCK, length - o)) for o in blocks)]:
        theirs = memoryview(bytearray(size))
        pending = remote.read(offset, [theirs])
        remote.unplug()
        await settle(pending)
        if replica.disk.fetch(offset, size) != theirs:
            raise Error(
                Kind.MISCOMPARE,
                f"the disks of {replica.name} differ. If this host's data is the one that counts, and what only the "
                "secondary has may be lost: start with --sync-from and the name of this host, which makes the "
                "secondary equal while the LUN is used",
                offset=offset,
                length=size,
            )
