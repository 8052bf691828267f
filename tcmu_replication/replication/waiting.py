"""A primary that cannot know that its data is the pair's last word: the LUN is there and not ready.

After the host went down, until the peer has said that it was not promoted meanwhile; without
a record, if the peer knows this resource as a pair.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tcmu_replication.block.replication import NotReady
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.peer_state import News, PeerState
from tcmu_replication.replication.primary import PrimaryRole
from tcmu_replication.replication.role import StartOptions
from tcmu_replication.replication.stages import Operation, Stage

if TYPE_CHECKING:
    from tcmu_replication.replication.replica import Replica

log = logging.getLogger(__name__)


class Waiting(PrimaryRole):
    """The base: asks the peer every second, and decides by what it says."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica)
        self._node = NotReady(replica.sender.mirror, self.why(), waits=True)
        self._decided = False

    @property
    def node(self) -> NotReady:
        """Not ready."""
        return self._node

    def why(self) -> str:
        """What is waited for, and what to do if that does not come."""
        raise NotImplementedError

    async def decide(self, state: PeerState) -> bool:
        """By the peer's word; whether that changed anything."""
        raise NotImplementedError

    async def enter(self) -> None:
        """See `Role.enter`."""
        log.warning("%s: not ready: %s", self.name, self._node.reason)
        if self.replica.sender.pulse is not None:
            self.replica.sender.pulse.start(self._ask)

    async def leave(self) -> None:
        """See `Role.leave`."""
        if self.replica.sender.pulse is not None:
            await self.replica.sender.pulse.stop()

    async def _ask(self) -> None:
        state = await self.replica.sender.beats.hello(self.news())
        self.replica.heard.note()
        if self.replica.role is self and not self._decided:
            async with self.replica.between_commands():
                if self.replica.role is self and not self._decided and await self.decide(state):
                    self.replica.stage_changed()

    async def refuse(self, reason: str, *, waits: bool) -> bool:
        """Not ready still, and since the peer has spoken for another reason. Whether that is new."""
        if self._node.reason == reason:
            return False
        log.error("%s: not ready: %s", self.name, reason)
        self._node = NotReady(self.replica.sender.mirror, reason, waits=waits)
        self._decided = not waits
        await self.replica.install(self._node)
        return True

    async def move_epoch(self, name: str) -> float:
        """Refused until this host is ready."""
        raise Error(Kind.INVALID_STATE, str(self._node.not_ready))

    async def detach(self, force: bool) -> None:
        """Refused until this host is ready."""
        raise Error(Kind.INVALID_STATE, str(self._node.not_ready))


class AfterCrash(Waiting):
    """This host was down while it was a running primary."""

    def why(self) -> str:
        """See `Waiting.why`."""
        return (
            f"this host was down; {self.replica.peer_name} is asked whether it was promoted meanwhile. If it cannot "
            f"answer and was surely not promoted: tcmu-replication start {self.name} --force"
        )

    async def resume(self) -> None:
        """Not yet."""

    async def decide(self, state: PeerState) -> bool:
        """See `Waiting.decide`."""
        if self.is_promoted(state):
            self.supersede(state)
        elif not state.generation:
            return await self.refuse(
                f"this host was down, and {self.replica.peer_name} knows nothing of this pair: the file system of its "
                "overlays may not be mounted. Mount it and restart the worker there. Only if that is lost for good "
                f"and {self.replica.peer_name} was surely not promoted: tcmu-replication start {self.name} --force",
                waits=True,
            )
        else:
            await self._take_up()
        return True

    async def _take_up(self) -> None:
        """It is still ours: go on as the running primary."""
        await self.leave()
        role = self.replica.role_of(Stage.RUNNING)
        await role.resume()
        await self.replica.become(role)
        log.warning("%s: ready: this host goes on as the primary", self.name)

    async def start(self, operation: Operation, options: StartOptions) -> bool:
        """See `Role.start`: by force only, and then what was running goes on."""
        if not options.force:
            raise Error(Kind.INVALID_STATE, str(self._node.not_ready))
        await self._take_up()
        return True


class WithoutRecord(Waiting):
    """Nothing here says that there is a pair; the peer may know better."""

    def why(self) -> str:
        """See `Waiting.why`."""
        return (
            f"{self.record.directory} has no manifest of {self.name}; {self.replica.peer_name} is asked whether it "
            f"knows of a pair. If {self.name} is new: tcmu-replication init {self.name}"
        )

    async def decide(self, state: PeerState) -> bool:
        """See `Waiting.decide`."""
        if not (state.paired or state.promoted_at):
            await self.replica.become(self.replica.role_of(Stage.NONE))
            log.info("%s: ready: %s knows of no pair", self.name, self.replica.peer_name)
            return True
        await self.leave()
        return await self.refuse(
            f"{self.record.directory} has no manifest, but {self.replica.peer_name} knows {self.name} as a pair: its "
            "file system may not be mounted. Mount it and restart the worker. Only if it is lost for good, and this "
            f"host's disk has the pair's last data: tcmu-replication start {self.name} --force",
            waits=False,
        )

    async def init(self) -> None:
        """See `Role.init`."""
        if self._decided:
            raise Error(Kind.INVALID_STATE, str(self._node.not_ready))
        await super().init()
        alone = self.replica.role_of(Stage.NONE)
        alone.take()
        await self.replica.become(alone)

    async def start(self, operation: Operation, options: StartOptions) -> bool:
        """See `Role.start`."""
        if not options.force:
            await self.decide(await self.replica.sender.peer.hello(News()))
        if not options.force and self.replica.role is self:
            raise Error(Kind.INVALID_STATE, str(self._node.not_ready))
        return await super().start(operation, options)
