"""The primary's control channel to the secondary: the `Peer` of `replication.peer_state`, over QMP and TCP.

One connection, made when it is first needed and again when it was lost. A call
that fails because an old connection had died unnoticed is tried once more on a
new one; every peer command may be given twice. Each connection begins with the
greeting (`control.protocol`).
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tcmu_replication.control import schema
from tcmu_replication.control.connection import Connection
from tcmu_replication.control.protocol import Greeting
from tcmu_replication.errors import Error, Kind, one_line
from tcmu_replication.replication.counterpart import Counterpart
from tcmu_replication.replication.peer_state import News, PeerState
from tcmu_replication.replication.stages import Stage
from tcmu_replication.secret import Secret

Arguments = Callable[[int], Mapping[str, Any]]
"""A command's arguments in the protocol that is spoken on the connection that it goes over."""


class ControlPeer:
    """The secondary of resource `name` at `address`:`port`, called from our address `local`.

    `timeout` bounds each call, in seconds. `generation` gives the pairing that we
    believe in, or "" before there is one. `counterpart` is who is met there. With `tls` the
    connection is inside of it, with `secret` both ends prove that they know it.
    """

    def __init__(
        self,
        name: str,
        address: str,
        port: int,
        *,
        local: str,
        timeout: float,
        generation: Callable[[], str],
        counterpart: Counterpart,
        tls: ssl.SSLContext | None = None,
        secret: Secret | None = None,
    ) -> None:
        self._name = name
        self._address = address
        self._port = port
        self._local = local
        self._timeout = timeout
        self._generation = generation
        self._counterpart = counterpart
        self._tls = tls
        self._secret = secret
        self._connection: Connection | None = None
        self._protocol = 0
        self._connecting = asyncio.Lock()
        self._settled = 0

    async def hello(self, news: News, *, settled: bool = False) -> PeerState:
        """Introduce ourselves and tell the news; returns the secondary's state. Raises `Error`."""
        arguments: dict[str, Any] = {
            "resource": self._name,
            "settled": settled,
            "verified": news.verified,
        }
        if generation := self._generation():
            arguments["generation"] = generation
        if news.outdated_at:
            arguments |= {
                "outdated-since": news.outdated_at,
                "reason": one_line(news.reason, schema.TEXT),
                "missed-bytes": news.missed_bytes,
            }
        if news.disk_error:
            arguments["disk-error"] = one_line(news.disk_error, schema.TEXT)
        state = state_of(await self._call("peer-hello", lambda protocol: arguments | {"protocol": protocol}))
        if settled:
            self._settled = state.settled
        return state

    async def prepare(self, epoch: int) -> None:
        """Let the secondary get ready for the checkpoint that ends `epoch`. Raises `Error`."""
        await self._call("peer-prepare", lambda protocol: {"epoch": epoch})

    async def checkpoint(self, epoch: int, name: str) -> PeerState:
        """End `epoch` with the checkpoint `name`; returns the state after it. Raises `Error`."""
        arguments = {"epoch": epoch, "name": name, "settled": self._settled}
        return state_of(await self._call("peer-checkpoint", lambda protocol: arguments))

    async def resync(self, name: str) -> bool:
        """What the secondary misses will be sent; whether all must be compared first. Raises `Error`."""
        answer = await self._call(
            "peer-resync", self._since(3, {"generation": self._generation(), "name": name})
        )
        try:
            return msgspec.convert(answer, schema.PeerResyncBegun).compare
        except msgspec.ValidationError as error:
            raise Error(
                Kind.PEER_LIED, f"the secondary's answer is not how a resync begins: {one_line(str(error))}"
            ) from error

    async def resynced(self) -> None:
        """All of it was sent, and nothing is under way. Raises `Error`."""
        state_of(await self._call("peer-resynced", self._since(3, {"generation": self._generation()})))

    def _since(self, lowest: int, arguments: dict[str, Any]) -> Arguments:
        """The arguments of a command that is there from protocol `lowest` on."""

        def checked(protocol: int) -> dict[str, Any]:
            if protocol < lowest:
                raise Error(
                    Kind.UNSUPPORTED,
                    f"the secondary speaks protocol {protocol}, and a resync needs {lowest}: upgrade tcmu-replication "
                    "there",
                )
            return arguments

        return checked

    async def digests(self, offset: int, length: int, piece: int) -> list[str]:
        """The digest of each piece of the range of its disk. Raises `Error`."""
        arguments = {"offset": offset, "length": length, "piece": piece}
        answer = await self._call("peer-digests", lambda protocol: arguments)
        try:
            return list(msgspec.convert(answer, schema.PeerDigests).digests)
        except msgspec.ValidationError as error:
            raise Error(
                Kind.PEER_LIED, f"the secondary's answer is no digests: {one_line(str(error))}"
            ) from error

    def close(self) -> None:
        """End the connection. Twice is fine."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _call(self, command: str, arguments: Arguments) -> Any:
        fresh = self._connection is None or self._connection.lost.done()
        connection = await self._connect()
        try:
            return await connection.execute(command, arguments(self._protocol), timeout=self._timeout)
        except Error as error:
            if error.kind is Kind.TIMED_OUT:
                self.close()
            if fresh or error.kind is not Kind.PEER_LOST:
                raise
        connection = await self._connect()
        return await connection.execute(command, arguments(self._protocol), timeout=self._timeout)

    async def _connect(self) -> Connection:
        async with self._connecting:
            if self._connection is None or self._connection.lost.done():
                connection = await Connection.tcp(
                    self._address,
                    self._port,
                    local=self._local,
                    timeout=self._timeout,
                    tls=self._tls,
                    secret=self._secret,
                )
                try:
                    self._protocol = await self._greet(connection)
                except BaseException:
                    connection.close()
                    raise
                self._connection = connection
            return self._connection

    async def _greet(self, connection: Connection) -> int:
        """The protocol that both ends speak. Raises `Error`, UNSUPPORTED if there is none."""
        mine = msgspec.to_builtins(self._counterpart.greeting)
        try:
            answer = await connection.execute("peer-greet", mine, timeout=self._timeout)
        except Error as error:
            if error.kind is not Kind.UNSUPPORTED:
                raise
            return self._counterpart.meet(None).require()
        return self._counterpart.meet(greeting_of(answer)).require()


def greeting_of(answer: Any) -> Greeting:
    """The secondary's greeting, of an answer that came over the network. Raises `Error(PEER_LIED)` if it is none."""
    try:
        return msgspec.convert(answer, Greeting)
    except msgspec.ValidationError as error:
        what = one_line(str(error))
        raise Error(Kind.PEER_LIED, f"the secondary's answer is no greeting: {what}") from error


def state_of(answer: Any) -> PeerState:
    """The secondary's state, of an answer that came over the network. Raises `Error(PEER_LIED)` if it is none."""
    try:
        state = msgspec.convert(answer, schema.PeerState)
    except msgspec.ValidationError as error:
        what = one_line(str(error))
        raise Error(Kind.PEER_LIED, f"the secondary's answer is not its state: {what}") from error
    said = None if state.error is None else one_line(state.error)
    return PeerState(
        Stage(state.stage),
        state.epoch,
        state.generation,
        state.length,
        said,
        state.checkpoint_name,
        state.paired,
        state.promoted_at,
        state.settled,
    )
