"""What a host forwards with: the mirror of its disk and the peer's, and the map of what the peer misses.

    the LUN -> gate (top) -> mirror -+-> disk
                                     +-> replication filter -> remote (NBD) ~~~> the secondary

The filter hangs below the mirror only while replication runs. What could make the disks differ is
noted before it can: in the map, and of writes under way in a log that outlives this process. Both
need no space.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from tcmu_replication.block.in_flight import InFlight
from tcmu_replication.block.mirror import Failure, Mirror
from tcmu_replication.block.node import Node
from tcmu_replication.block.remote import Remote
from tcmu_replication.block.replication import Forward
from tcmu_replication.errors import Error
from tcmu_replication.replication.missed import Missed
from tcmu_replication.replication.peer_state import Peer
from tcmu_replication.replication.pulse import Pulse

MAP = "out-of-sync.map"
"""The map's file in the overlay directory."""


class Sender:
    """The way from `disk` to the peer.

    `connect(verify)` makes the remote node of the peer's export, not yet
    open; it awaits `verify` before a connection counts. `detach` says that the
    peer serves where the disk fails. With a `pulse` the peer is asked and
    told every second, over `beats`, and before this host serves after it went down; without
    one (the peer is QEMU) nobody can be asked. `in_flight` is where writes under way
    are noted: best on a file system in memory, since a store into a page of a disk that
    hangs would stop the whole process. `failed` hears of what failed below the mirror. `heals`:
    a secondary that misses writes is sent them as soon as it is heard again.
    """

    def __init__(
        self,
        disk: Node,
        directory: Path,
        connect: Callable[[Callable[[], Awaitable[None]]], Remote],
        peer: Peer,
        *,
        detach: bool = False,
        failed: Callable[[Failure], None] = lambda failure: None,
        pulse: Pulse | None = None,
        beats: Peer | None = None,
        wait_after_crash: bool = True,
        in_flight: Path | None = None,
        heals: bool = True,
    ) -> None:
        self.heals = heals
        self.connect = connect
        self.peer = peer
        self.beats = beats or peer
        self.detach = detach
        self.failed = failed
        self.pulse = pulse
        self.wait_after_crash = wait_after_crash
        self.missed = Missed(directory / MAP, disk.length)
        self.remote: Remote | None = None
        self.filter: Forward | None = None
        self.mirror = Mirror("mirror", disk, report=self._report, may_detach=self._may_detach)
        self.in_flight: InFlight | None = None
        self._in_flight_path = in_flight or directory / "in-flight"
        self._disk = disk
        self._report_to: Callable[[Failure], None] = failed
        self._ask: Callable[[], bool] = lambda: False

    def told_to(self, report: Callable[[Failure], None], may_detach: Callable[[], bool]) -> None:
        """Who hears of the mirror's failures, and decides whether it goes on without its disk."""
        self._report_to, self._ask = report, may_detach

    def _report(self, failure: Failure) -> None:
        self._report_to(failure)

    def _may_detach(self) -> bool:
        return self._ask()

    def open_log(self) -> InFlight:
        """The log of writes in flight, opened if it is not. Raises `Error`."""
        if self.in_flight is None:
            self.in_flight = InFlight(self._in_flight_path, self._disk.length)
        return self.in_flight

    def attach(self, remote: Remote, forward: Forward, *, detached: bool = False) -> None:
        """Hang the filter below the mirror. `detached`: the disk here has failed, the peer's word is final."""
        self.remote, self.filter = remote, forward
        forward.alone = detached
        self.mirror.attach(forward, remote, self.in_flight, detached=detached)

    def refuse(self, error: Error) -> None:
        """Acknowledge nothing any more that the peer does not take; `error` says why."""
        self.mirror.refuse(error)
        if self.filter is not None:
            self.filter.alone = True

    def cut(self) -> None:
        """Hang up; what is under way fails."""
        if self.remote is not None:
            self.remote.close()

    async def hang_up(self) -> None:
        """Hang up, and wait for the end of it."""
        if self.remote is not None:
            self.remote.close()
            await self.remote.wait_closed()

    async def close(self) -> None:
        """The process ends."""
        await self.hang_up()
        self.missed.close()
        if self.in_flight is not None:
            self.in_flight.close()
