"""What a host follows with: the overlays over its disk, the export for its primary, and the LUN's filter.

            the LUN                          forwarded writes
               |                                    |
          gate (top)                           gate (export)
               |                                    |
        replication filter                  copy-before-write
               |                               |         |
            active -> hidden -> disk <---------+      hidden

Each epoch has overlays of its own; a checkpoint makes the next pair, and
saving the record is the moment at which it happens. A process that dies
anywhere finds at its next open the old epoch or the new one, whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from tcmu_replication.background import background
from tcmu_replication.block.copy_before_write import CopyBeforeWrite
from tcmu_replication.block.gate import Gate
from tcmu_replication.block.node import Node
from tcmu_replication.block.offload import BACKGROUND, Offload
from tcmu_replication.block.overlay import Overlay
from tcmu_replication.block.pending import settle
from tcmu_replication.block.replication import Closed, Filter, Split
from tcmu_replication.errors import Error, Kind
from tcmu_replication.jobs.commit import Commit
from tcmu_replication.replication import stages
from tcmu_replication.replication.clock import now
from tcmu_replication.replication.epochs import Epochs, Pair
from tcmu_replication.replication.record import Record
from tcmu_replication.replication.stages import Action, Operation

log = logging.getLogger(__name__)

Publish = Callable[[Node], Awaitable[None]]
"""Offer the node to the primary (an NBD export by the resource's name)."""

Withdraw = Callable[[], Awaitable[None]]
"""End the export and its connections; when it returns no forwarded write comes any more."""


class Receiver:
    """Over `disk`, with the overlays of `epochs`; `record` says which of them count.

    `durable`: a checkpoint is there after a loss of power. `roots` are the nodes that a LUN can
    serve, by name: where `top_id` is looked up. `in_use` says who uses the LUN, or None. `settled`
    counts the calls of `Replica.settle`.
    """

    def __init__(
        self,
        disk: Node,
        epochs: Epochs,
        record: Record,
        *,
        top_id: str,
        durable: bool,
        publish: Publish,
        withdraw: Withdraw,
        roots: Mapping[str, Node] | None = None,
        in_use: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.durable = durable
        self.in_use = in_use
        self.settled = 0
        self.pair: Pair | None = None
        self.next: Pair | None = None
        self.backup: CopyBeforeWrite | None = None
        self.export: Gate | None = None
        self.commit: Commit | None = None
        reason = f"replication of {record.name} is not started, its secondary has no data to show"
        self._closed = Closed(disk.length, reason)
        self.filter = Filter("replication", disk.length, self._closed)
        self._disk = disk
        self._epochs = epochs
        self._record = record
        self._top_id = top_id
        self._roots = roots
        self._publish = publish
        self._withdraw = withdraw
        self._forwarded_writes = 0
        self._sweeper: asyncio.Task[None] | None = None
        self._cutting: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def overlay_bytes(self) -> tuple[int, int]:
        """What active and hidden hold, in bytes of whole blocks."""
        if self.pair is None:
            return 0, 0
        return self.pair.active.allocated_bytes, self.pair.hidden.allocated_bytes

    def shown_by(self, top: Node) -> None:
        """`top` is the LUN."""
        if self._roots is None:
            self._roots = {self._top_id: top}

    def look_for_writes(self) -> None:
        """Note the time if forwarded writes came since the last look."""
        if self.export is not None and self.export.writes != self._forwarded_writes:
            self._forwarded_writes = self.export.writes
            self._record.learn(last_forwarded=now())

    def route(self) -> None:
        """Point the LUN's filter where the table of stages says that reads and writes go now."""
        machine = self._record.machine
        self.filter.alone = None
        self.filter.reads = self._target(machine.ask(Operation.READ))
        self.filter.writes = self._target(machine.ask(Operation.WRITE))

    def _target(self, action: Action) -> Node:
        if action is Action.EIO:
            return self._closed
        if action is Action.DISK:
            return self._disk
        assert self.pair is not None
        if action is Action.SPLIT:
            assert self.commit is not None
            return Split(self.pair.active, self.pair.hidden, self._disk, self.commit.redo)
        assert action in (Action.CHAIN, Action.TO_ACTIVE), action
        return self.pair.active

    # --- overlays

    def create_pair(self, epoch: int) -> Pair:
        """Overlays for `epoch`, with nothing in them. Raises `Error`."""
        return self._epochs.create(epoch)

    def open_pair(self, epoch: int) -> Pair:
        """The overlays of `epoch`, as the record says. Raises `Error`."""
        return self._epochs.open(epoch)

    async def make_durable(self, pair: Pair) -> None:
        """A pair that the record is going to rely on, and the disk as it is now. Raises `Error`."""
        await settle(pair.hidden.flush())
        await settle(pair.active.flush())
        await settle(self._disk.flush())

    def check_chain(self, active: Node, hidden: Node) -> None:
        """What replication_start checks on a secondary, in its order and with its texts. Raises `Error`."""
        if not active.children:
            raise Error(Kind.BAD_CONFIG, stages.NO_ACTIVE_BACKING)
        if not hidden.children:
            raise Error(Kind.BAD_CONFIG, stages.NO_HIDDEN_BACKING)
        if hidden.children[0] is not self._disk:
            raise Error(Kind.BAD_CONFIG, stages.NO_DISK_BACKEND)
        if not active.length == hidden.length == self._disk.length:
            raise Error(Kind.BAD_CONFIG, stages.LENGTHS_DIFFER)
        if not (isinstance(active, Overlay) and isinstance(hidden, Overlay)):
            raise Error(Kind.UNSUPPORTED, stages.NO_MAKE_EMPTY)
        top = (self._roots or {}).get(self._top_id)
        if top is None or self.filter not in _walk(top):
            raise Error(Kind.BAD_CONFIG, stages.BAD_TOP)

    def check_ejected(self) -> None:
        """An overlay whose files were taken away cannot be emptied. Raises `Error`."""
        if self.pair is None:
            return
        if self.pair.active.ejected:
            raise Error(Kind.INVALID_STATE, stages.ACTIVE_EJECTED.format(name=self.pair.active.name))
        if self.pair.hidden.ejected:
            raise Error(Kind.INVALID_STATE, stages.HIDDEN_EJECTED.format(name=self.pair.hidden.name))

    async def prepare(self) -> None:
        """The next epoch's pair, and most of what the disk has to make durable. Raises `Error`."""
        if self.next is None:
            try:
                self.next = self.create_pair(self._record.manifest.epoch + 1)
            except Error as error:
                text = stages.CANNOT_EMPTY.format(name="active or hidden", reason=error)
                raise Error(error.kind, text) from error
        if self.durable:
            await self.make_durable(self.next)

    def retire(self, pair: Pair) -> None:
        """Its epoch is over."""
        self._tidy_up(self._epochs.retire(pair))

    def drop_pair(self) -> None:
        """The LUN is the disk from now on: neither overlay is needed any more."""
        old, self.pair = self.pair, None
        if old is not None:
            self._tidy_up(self._epochs.remove(old))

    def sweep(self) -> None:
        """Remove the overlays that the record does not name. Raises `Error`."""
        self._epochs.sweep(None if self.pair is None else self._record.manifest.epoch)

    async def swept(self) -> None:
        """Wait for the end of what is being put away."""
        if self._sweeper is not None:
            await self._sweeper

    def _tidy_up(self, work: Callable[[], None]) -> None:
        """Put an old pair away in a thread: it may take a processor for as long as there was data, not us."""
        previous = self._sweeper

        async def sweep() -> None:
            if previous is not None:
                await previous
            thread = Offload(threads=1, niceness=BACKGROUND)
            try:
                await thread(work, "put old overlays away").wait()
            except Error as error:
                log.warning("%s: old overlays stay until the next start: %s", self._record.name, error)
            finally:
                thread.close()

        self._sweeper = background(sweep())

    # --- forwarded writes

    async def let_in(self, failed: Callable[[Error], None]) -> None:
        """Save pre-images into the pair, and let the primary in. `failed`: a forwarded write was answered with that."""
        assert self.pair is not None
        self.backup = CopyBeforeWrite(self._disk, self.pair.hidden, durable=self.durable, failed=failed)
        self.export = Gate(self.backup)
        self._forwarded_writes = 0
        await self._publish(self.export)

    def cut(self) -> None:
        """Hang up on the primary; it may come back, and hears what is wrong."""
        if self.export is not None and (self._cutting is None or self._cutting.done()):
            self._cutting = background(self._cut(self.export))

    async def _cut(self, export: Gate) -> None:
        await self._withdraw()
        if self.export is export and not self._ended:
            await self._publish(export)

    async def shut_out(self) -> None:
        """No forwarded write after this; those under way are left to themselves."""
        self._ended = True
        if self._cutting is not None:
            await asyncio.gather(self._cutting, return_exceptions=True)
        if self.export is not None:
            await self._withdraw()
            self.export = None

    async def end_backup(self) -> None:
        """No forwarded write after this, and none is under way; the next epoch's pair goes too."""
        if self.export is not None:
            await self._withdraw()
            self.export.unplug()
            await settle(self.export.drained())
        self.export = None
        self.backup = None
        if self.next is not None:
            self._tidy_up(self._epochs.remove(self.next))
            self.next = None

    async def close(self) -> None:
        """The process ends."""
        await self.shut_out()
        await self.swept()
        if self.next is not None:
            self.next.destroy()
            self.next = None
        if self.pair is not None:
            self.pair.close()
            self.pair = None


def _walk(node: Node) -> list[Node]:
    """The node and all below it."""
    found = [node]
    for child in node.children:
        found += _walk(child)
    return found
