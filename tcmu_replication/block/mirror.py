"""The mirror: every write goes to the local disk and to the replication filter.

It stands where QEMU puts a quorum with threshold 1 and fifo reads, with one
difference that docs/replication.md explains: the local disk counts. Its failure
is the caller's error, whatever the peer answered, unless the resource says
`on-local-error = "detach"`: then the first failure takes the local disk out of
the mirror for good, and the peer serves from there on.

Both disks get overlapping writes in the order in which they were made: the
local disk takes each at once, and the remote node keeps the order, also when it
has to send some of them again. What the local disk refuses at once the peer does
not get, unless it serves alone from then on.

A discard promises no content, and two disks would keep different ones. So here
it is a zero that gives space back, on both; or nothing, on both, where the local
disk cannot give space back and would have to write every byte.

The peer's failures never reach the caller: the filter below swallows and
records them, until `refuse` says that this host must not acknowledge anything
any more. What else goes wrong is counted in `errors`, per child, and
reported through `report`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tcmu_replication.block.buffers import size
from tcmu_replication.block.in_flight import InFlight
from tcmu_replication.block.node import Buffers, Extent, Node
from tcmu_replication.block.pending import Pending, attempt, gather
from tcmu_replication.errors import Error


class Failure(NamedTuple):
    """A child's failed request, as QEMU's QUORUM_REPORT_BAD has it; `final` if it is the caller's error too."""

    child: str
    operation: str
    offset: int
    length: int
    error: Error
    final: bool


class Mirror(Node):
    """Writes to `disk` and, while it is attached, to `replica`; reads from `disk`.

    `report` is called with each child's failure. `may_detach` is asked when the
    local disk fails: is it the policy to go on with the peer, and has the peer
    all that was written?
    """

    def __init__(
        self,
        name: str,
        disk: Node,
        *,
        report: Callable[[Failure], None],
        may_detach: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(name, disk.length)
        self._local = disk
        self.disk: Node | None = disk
        self.replica: Node | None = None
        self.errors: dict[str, int] = {}
        self._first: Node = disk
        self._report_to = report
        self._may_detach = may_detach
        self._peer: Node | None = None
        self._in_flight: InFlight | None = None
        self._refusal: Error | None = None
        self.alone: Callable[[], None] | None = None
        """Called before a write to the local disk without a replica, for as long as it is set."""

    @property
    def children(self) -> tuple[Node, ...]:
        return tuple(child for child in (self.disk, self.replica) if child is not None)

    def attach(
        self, replica: Node, peer: Node, in_flight: InFlight | None = None, *, detached: bool = False
    ) -> None:
        """Begin to write to `replica` too; `peer` reads the secondary's disk, should this one fail.

        What is under way is noted in `in_flight`. With `detached` the local disk has failed
        earlier already; without, it counts, whatever was before. Nothing may be in flight.
        """
        assert replica.length == self.length, "the engine compared the lengths"
        self.replica = replica
        self._peer = peer
        self._in_flight = in_flight
        self.disk = None if detached else self._local
        self._first = peer if detached else self._local

    def remove(self) -> None:
        """Stop writing to the replica. Nothing may be in flight."""
        self.replica = self._peer = self._in_flight = None

    def refuse(self, error: Error | None) -> None:
        """From now on what the peer does not take is the caller's error, `error`; also what is under way.

        For a host that must not go on alone: its peer was promoted, or what differs cannot be written down.
        """
        self._refusal = error

    @property
    def detached(self) -> bool:
        """True when the local disk has failed and the peer serves."""
        return self.disk is None

    def read(self, offset: int, buffers: Buffers) -> Pending | None:
        error, pending = attempt(self._first.read, offset, buffers)
        if error is None and pending is None:
            return None
        if self.disk is None:
            if error is not None:
                raise error
            return pending
        return self._after_read(offset, buffers, error, pending)

    def _after_read(
        self, offset: int, buffers: Buffers, error: Error | None, pending: Pending | None
    ) -> Pending | None:
        """Report a local read error, and let the peer answer if it may."""
        if pending is not None:
            whole = Pending()

            def ended(local: Pending) -> None:
                if local.error is None:
                    whole.complete()
                    return
                late, again = attempt(self._after_read, offset, buffers, local.error, None)
                if again is None:
                    whole.complete(late)
                else:
                    again.then(lambda p: whole.complete(p.error))
                    self.unplug()

            pending.then(ended)
            return whole
        assert error is not None
        child = self.disk
        goes_on = self._drop_disk()
        self._failed(child, "read", offset, size(buffers), error, not goes_on)
        if not goes_on:
            raise error
        return self._first.read(offset, buffers)

    def write(self, offset: int, buffers: Buffers, fua: bool = False) -> Pending | None:
        if self.replica is None:
            return self._write_disk("write", offset, size(buffers), (buffers, fua))
        return self._write_both("write", offset, size(buffers), (buffers, fua))

    def zero(self, offset: int, length: int, fua: bool = False, unmap: bool = True) -> Pending | None:
        if self.replica is None:
            return self._write_disk("zero", offset, length, (length, fua, unmap))
        return self._write_both("zero", offset, length, (length, fua, unmap))

    def discard(self, offset: int, length: int) -> Pending | None:
        if self.replica is None:
            return self._write_disk("discard", offset, length, (length,))
        if self.disk is not None and not self.disk.unmaps:
            return None
        return self._write_both("zero", offset, length, (length, False, True))

    def flush(self) -> Pending | None:
        pendings = []
        for child in self.children:
            error, pending = attempt(child.flush)
            pendings.append(self._watched(child, "flush", 0, 0, error, pending))
        return gather(pendings)

    def extents(self, offset: int, length: int) -> list[Extent]:
        return self._first.extents(offset, length)

    def fetch(self, offset: int, length: int) -> memoryview:
        return self._first.fetch(offset, length)

    def unplug(self) -> None:
        if self.replica is not None:
            self.replica.unplug()
        elif self.disk is None:
            self._first.unplug()

    # --- writes

    def _write_disk(self, operation: str, offset: int, length: int, args: tuple) -> Pending | None:
        """Without a replica: the disk alone, its failures reported."""
        if self.alone is not None:
            self.alone()
        error, pending = attempt(getattr(self._first, operation), offset, *args)
        if error is None and pending is None:
            return None
        return self._watched(self._first, operation, offset, length, error, pending)

    def _write_both(self, operation: str, offset: int, length: int, args: tuple) -> Pending | None:
        """Both writes at once; ends when both have ended, with the local disk's error."""
        log, disk, replica = self._in_flight, self.disk, self.replica
        place = -1 if log is None else log.begin(offset, length)
        failure: Error | None = None
        local = remote = None
        if disk is not None:
            try:
                local = getattr(disk, operation)(offset, *args)
            except Error as error:
                failure = self._judge(disk, operation, offset, length, error)
                if failure is not None:
                    replica = None  # the peer shall not have what this disk has not
        if replica is not None:
            try:
                remote = getattr(replica, operation)(offset, *args)
            except Error as error:
                failure = failure or self._judge(replica, operation, offset, length, error)
        if replica is None or remote is None or local is not None:
            return self._both(operation, offset, length, local, remote, failure, place)
        # As nearly always: the local disk has answered, the peer has not. (One closure: every write pays for this.)
        peer, whole = replica, Pending()

        def ended(p: Pending) -> None:
            late = failure
            if p.error is not None:
                late = late or self._judge(peer, operation, offset, length, p.error)
            if log is not None:
                log.end(place)
            whole.complete(late)

        remote.then(ended)
        return whole

    def _both(
        self,
        operation: str,
        offset: int,
        length: int,
        local: Pending | None,
        remote: Pending | None,
        failure: Error | None,
        place: int,
    ) -> Pending | None:
        """What `_write_both` returns where anything may be under way, or nothing."""
        log = self._in_flight
        parts = []
        if local is not None and self.disk is not None:
            parts.append(self._watched(self.disk, operation, offset, length, None, local))
        if remote is not None and self.replica is not None:
            parts.append(self._watched(self.replica, operation, offset, length, None, remote))
        error, whole = attempt(gather, parts, failure)
        if log is not None:
            if whole is None:
                log.end(place)
            else:
                whole.then(lambda _: log.end(place))
        if error is not None:
            raise error
        return whole

    # --- failures

    def _watched(
        self,
        child: Node,
        operation: str,
        offset: int,
        length: int,
        error: Error | None,
        pending: Pending | None,
    ) -> Pending | None:
        """A child's outcome with its failure counted, and forgiven where that is the policy; else it is raised."""
        if pending is not None:
            whole = Pending()

            def ended(p: Pending) -> None:
                late = None if p.error is None else self._judge(child, operation, offset, length, p.error)
                whole.complete(late)

            pending.then(ended)
            return whole
        if error is None:
            return None
        verdict = self._judge(child, operation, offset, length, error)
        if verdict is not None:
            raise verdict
        return None

    def _judge(self, child: Node, operation: str, offset: int, length: int, error: Error) -> Error | None:
        """Report a child's failure; returns it if it is the caller's too."""
        if child is self.replica:
            # The filter swallows what it forwards; the local disk alone decides, as long as there is one.
            final = self.disk is None
            if self._refusal is not None:
                return self._refusal
        elif child is self._peer:
            final = True
        else:
            final = not self._drop_disk()
        self._failed(child, operation, offset, length, error, final)
        return error if final else None

    def _failed(
        self, child: Node | None, operation: str, offset: int, length: int, error: Error, final: bool
    ) -> None:
        name = "?" if child is None else child.name
        self.errors[name] = self.errors.get(name, 0) + 1
        self._report_to(Failure(name, operation, offset, length, error, final))

    def _drop_disk(self) -> bool:
        """Go on without the local disk, if that is the policy and the peer can serve."""
        if self.disk is None:
            return True
        if self.replica is None or self._peer is None or not self._may_detach():
            return False
        self.disk = None
        self._first = self._peer
        return True
