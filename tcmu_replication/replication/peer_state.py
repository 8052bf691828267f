"""What the two ends tell each other over the control channel, and what each asks of the other."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NamedTuple, Protocol

from tcmu_replication.replication.stages import Stage


class PeerState(NamedTuple):
    """What the secondary says of itself.

    `checkpoint_id` names the last checkpoint that it was asked for, `paired` says that a
    primary has been connected in this generation, `promoted_at` when it was promoted,
    `settled` how many hellos with `settled` it has answered.
    """

    stage: Stage
    epoch: int
    generation: str
    length: int
    error: str | None
    checkpoint_id: str = ""
    paired: bool = False
    promoted_at: str = ""
    settled: int = 0


class News(NamedTuple):
    """What the primary tells with its hello.

    `verified`: both disks are known to be equal. `outdated_at`: since when the
    secondary misses writes, "" if it misses none; `reason` says why, and
    `missed_bytes` how much is known to differ. `disk_error`: why the primary's own disk may lack
    what was acknowledged, "" if it does not.
    """

    verified: bool = False
    outdated_at: str = ""
    reason: str = ""
    missed_bytes: int = 0
    disk_error: str = ""


class Peer(Protocol):
    """The control channel to the secondary. Each call raises `Error` (PEER_LOST, TIMED_OUT, or the peer's)."""

    def hello(self, news: News, *, settled: bool = False) -> Awaitable[PeerState]:
        """Tell it `news`; its state, with `settled` when no command of it is under way."""

    def prepare(self, epoch: int) -> Awaitable[None]:
        """Do what can be done of the checkpoint after `epoch` while writes go on."""

    def checkpoint(self, epoch: int, name: str) -> Awaitable[PeerState]:
        """End `epoch` with the checkpoint `name`, once; the state after it."""

    def resync(self, name: str) -> Awaitable[bool]:
        """What it misses will be sent; its state before becomes the checkpoint `name`. Whether all must be compared."""

    def resynced(self) -> Awaitable[None]:
        """All of it was sent, and nothing is under way: it is in sync."""

    def digests(self, offset: int, length: int, piece: int) -> Awaitable[list[str]]:
        """A digest (see `jobs.compare`) of each piece of the range of its disk."""
