"""A primary's control channel to a secondary of any version, or of none, over a real connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tcmu_replication.control import framing
from tcmu_replication.control.protocol import Range
from tcmu_replication.control.schema import PeerHello, PeerSoftware, PeerState
from tcmu_replication.control.server import Server
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.replication.counterpart import Counterpart
from tcmu_replication.replication.peer import ControlPeer
from tcmu_replication.replication.peer_state import News
from tests.support.tools import PATIENCE_S

STATE = {"stage": "running", "epoch": 7, "generation": "g", "length": 4096}


class Secondary:
    """Answers one command after the other with `answers`, whatever it is asked; `asked` is what it was."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answers = list(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(framing.greeting())
        objects = framing.Objects()
        while data := await reader.read(1 << 16):
            for message in objects.feed(data):
                asked = json.loads(message)
                answer: dict[str, Any] = {"return": {}}
                if asked["execute"] != "qmp_capabilities":
                    self.asked.append(asked)
                    answer = self._answers.pop(0)
                writer.write(framing.encode(answer | {"id": asked["id"]}))
                if "hang-up" in answer:
                    writer.close()
                    return
        writer.close()


def told(lowest: int, highest: int, version: str = "9.0.0") -> dict[str, Any]:
    return {"return": {"lowest": lowest, "highest": highest, "version": version}}


UNKNOWN = {
    "error": {
        "class": "CommandNotFound",
        "desc": "The command peer-greet has not been found",
        "data": {"kind": "unsupported"},
    }
}
STATE_TOLD = {"return": STATE}


def with_peer(
    secondary: Secondary,
    body: Callable[[ControlPeer, Counterpart], Awaitable[None]],
    spoken: Range | None = None,
) -> None:
    async def main() -> None:
        server = await asyncio.start_server(secondary.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        counterpart = Counterpart("disk0", "alpha", "beta", *(() if spoken is None else (spoken,)))
        peer = ControlPeer(
            "disk0",
            "127.0.0.1",
            port,
            local="127.0.0.1",
            timeout=PATIENCE_S,
            generation=lambda: "g",
            counterpart=counterpart,
        )
        async with server:
            try:
                await body(peer, counterpart)
            finally:
                peer.close()

    asyncio.run(main())


def test_greeting_is_the_first_command_and_the_hello_says_what_came_of_it() -> None:
    async def body(peer: ControlPeer, counterpart: Counterpart) -> None:
        assert counterpart.software is None
        await peer.hello(News())
        assert counterpart.software == PeerSoftware(protocol=4, version="9.0.0")
        await peer.hello(News())

    secondary = Secondary(told(3, 9), STATE_TOLD, STATE_TOLD)
    with_peer(secondary, body, Range(2, 4))
    assert [asked["execute"] for asked in secondary.asked] == ["peer-greet", "peer-hello", "peer-hello"]
    assert secondary.asked[0]["arguments"] | {"version": ""} == {"lowest": 2, "highest": 4, "version": ""}
    assert [asked["arguments"].get("protocol") for asked in secondary.asked] == [None, 4, 4]


def test_secondary_that_knows_no_greeting_is_spoken_to_in_protocol_2() -> None:
    async def body(peer: ControlPeer, counterpart: Counterpart) -> None:
        assert (await peer.hello(News())).epoch == 7
        assert counterpart.software == PeerSoftware(protocol=2, version=None)

    secondary = Secondary(UNKNOWN, STATE_TOLD)
    with_peer(secondary, body, Range(2, 4))
    assert secondary.asked[1]["arguments"]["protocol"] == 2


@pytest.mark.parametrize(
    ("answer", "spoken", "upgrade"),
    [(told(5, 6), Range(2, 4), "alpha"), (told(1, 1), Range(2, 4), "beta"), (UNKNOWN, Range(3, 4), "beta")],
    ids=["newer", "older", "without a greeting"],
)
def test_secondary_without_a_common_protocol_is_told_nothing_more(
    answer: dict[str, Any], spoken: Range, upgrade: str
) -> None:
    async def body(peer: ControlPeer, counterpart: Counterpart) -> None:
        for _ in range(2):
            with pytest.raises(
                Error, match=f"no protocol in common: .*; upgrade tcmu-replication on {upgrade}$"
            ) as e:
                await peer.hello(News())
            assert e.value.kind is Kind.UNSUPPORTED
        assert counterpart.software is not None
        assert counterpart.software.protocol is None
        assert counterpart.software.refusal == str(e.value)

    secondary = Secondary(answer, answer)
    with_peer(secondary, body, spoken)
    assert [asked["execute"] for asked in secondary.asked] == ["peer-greet"] * 2


LIES = {
    "reversed": (told(6, 1), "no range"),
    "huge": (told(2, 1 << 16), "is no greeting"),
    "beyond any integer": (told(2, 10**400), "is no greeting"),
    "a string": ({"return": {"lowest": "2", "highest": 2, "version": "1"}}, "is no greeting"),
    "incomplete": ({"return": {"lowest": 2, "highest": 2}}, "is no greeting"),
    "too much": ({"return": {"lowest": 2, "highest": 2, "version": "1", "x\n": 1}}, "is no greeting"),
    "an escape": (told(2, 2, "1\x1b[2J"), "is no greeting"),
    "nothing": ({"return": {}}, "is no greeting"),
    "a list": ({"return": [2, 2]}, "is no greeting"),
    "no error": ({"error": 5}, "an error reply that is none"),
    "another error": ({"error": {"class": "GenericError", "desc": "no\x1b"}}, "no?"),
}


@pytest.mark.parametrize("lie", LIES)
def test_secondary_that_lies_in_its_greeting_is_told_nothing_more(lie: str) -> None:
    answer, said = LIES[lie]

    async def body(peer: ControlPeer, counterpart: Counterpart) -> None:
        with pytest.raises(Error) as refused:
            await peer.hello(News())
        assert said in str(refused.value)
        assert str(refused.value).isprintable()
        assert counterpart.software is None or counterpart.software.protocol is None
        assert (await peer.hello(News())).epoch == 7  # the next connection is a new chance

    secondary = Secondary(answer, told(2, 2), STATE_TOLD)
    with_peer(secondary, body)
    assert [asked["execute"] for asked in secondary.asked] == ["peer-greet", "peer-greet", "peer-hello"]


def test_secondary_that_is_another_version_at_the_next_connection_is_met_anew() -> None:
    """A command that is given again, since its connection had died unnoticed, is said in the new protocol."""

    async def body(peer: ControlPeer, counterpart: Counterpart) -> None:
        await peer.hello(News())
        assert counterpart.software == PeerSoftware(protocol=3, version="9.0.0")
        await peer.hello(News())
        assert counterpart.software == PeerSoftware(protocol=2, version=None)
        await peer.hello(News())

    lost = STATE_TOLD | {"hang-up": True}
    secondary = Secondary(told(2, 3), lost, UNKNOWN, STATE_TOLD, STATE_TOLD)
    with_peer(secondary, body, Range(2, 4))
    hellos = [asked["arguments"]["protocol"] for asked in secondary.asked if asked["execute"] == "peer-hello"]
    assert hellos == [3, 2, 2]


# --- the other side: who is called


def with_server(
    spoken: Range, body: Callable[[Callable[..., Any], Counterpart], Awaitable[None]]
) -> list[int]:
    """`body` gets a function that gives a command on a session; the protocols of the hellos that came through."""
    heard: list[int] = []

    async def hello(arguments: PeerHello, session: Session) -> PeerState:
        heard.append(arguments.protocol)
        return PeerState(**STATE)

    async def prepare(arguments: Any, session: Session) -> None:
        heard.append(0)

    async def main() -> None:
        counterpart = Counterpart("disk0", "beta", "alpha", spoken)
        handlers = counterpart.commands({"peer-hello": hello, "peer-prepare": prepare})
        server = Server(handlers)
        await server.listen_tcp("127.0.0.1", 0, "127.0.0.1")
        connections: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

        async def ask(command: str, connection: int = 0, /, **arguments: Any) -> Any:
            if connection not in connections:
                streams = connections[connection] = await asyncio.open_connection(
                    "127.0.0.1", server.tcp_port
                )
                await streams[0].readline()
                streams[1].write(framing.request("qmp_capabilities", {}, 1))
                await streams[0].readline()
            reader, writer = connections[connection]
            writer.write(framing.request(command, arguments, 2))
            answer = json.loads(await reader.readline())
            return answer.get("return", answer.get("error", {}).get("desc"))

        try:
            async with asyncio.timeout(PATIENCE_S):
                await body(ask, counterpart)
        finally:
            for _, writer in connections.values():
                writer.close()
            await server.close()

    asyncio.run(main())
    return heard


def test_primary_with_a_greeting_gets_ours_and_then_must_speak_what_came_of_it() -> None:
    async def body(ask: Callable[..., Any], counterpart: Counterpart) -> None:
        ours = await ask("peer-greet", lowest=2, highest=9, version="9.0.0")
        assert (ours["lowest"], ours["highest"]) == (2, 4)
        assert "3 was not agreed on" in await ask("peer-hello", resource="disk0", protocol=3)
        assert (await ask("peer-hello", resource="disk0", protocol=4))["epoch"] == 7
        assert counterpart.software == PeerSoftware(protocol=4, version="9.0.0")

    assert with_server(Range(2, 4), body) == [4]


def test_primary_without_a_greeting_is_heard_in_protocol_2() -> None:
    """A protocol 2 command may be the first of its connection: it is given again when one was lost."""

    async def body(ask: Callable[..., Any], counterpart: Counterpart) -> None:
        assert (await ask("peer-hello", resource="disk0", protocol=2))["epoch"] == 7
        assert await ask("peer-prepare", 1, epoch=7) == {}
        assert counterpart.software == PeerSoftware(protocol=2, version=None)

    assert with_server(Range(2, 4), body) == [2, 0]


@pytest.mark.parametrize("protocol", [0, 1, 5, 1 << 62])
def test_primary_without_a_greeting_in_another_protocol_is_refused_with_who_is_to_be_upgraded(
    protocol: int,
) -> None:
    async def body(ask: Callable[..., Any], counterpart: Counterpart) -> None:
        upgrade = "alpha" if protocol < 2 else "beta"
        for _ in range(2):
            refused = await ask("peer-hello", resource="disk0", protocol=protocol)
            assert f"speaks protocol {protocol}" in refused
            assert refused.endswith(f"upgrade tcmu-replication on {upgrade}")
        assert await ask("peer-prepare", epoch=7) == refused
        assert counterpart.software is not None
        assert counterpart.software.refusal == refused

    assert with_server(Range(2, 4), body) == []


@pytest.mark.parametrize(("lowest", "highest"), [(5, 9), (0, 1), (4, 2), (65535, 0)])
def test_primary_without_a_common_protocol_sees_our_range_and_gets_nothing_else(
    lowest: int, highest: int
) -> None:
    async def body(ask: Callable[..., Any], counterpart: Counterpart) -> None:
        ours = await ask("peer-greet", lowest=lowest, highest=highest, version="9.0.0")
        assert (ours["lowest"], ours["highest"]) == (2, 4)
        assert counterpart.software is not None
        for command, arguments in {
            "peer-hello": {"resource": "disk0", "protocol": 2},
            "peer-prepare": {"epoch": 7},
        }.items():
            assert await ask(command, **arguments) == counterpart.software.refusal

    assert with_server(Range(2, 4), body) == []


def test_greeting_is_given_once_and_first() -> None:
    async def body(ask: Callable[..., Any], counterpart: Counterpart) -> None:
        await ask("peer-greet", lowest=2, highest=3, version="9.0.0")
        assert "comes first" in await ask("peer-greet", lowest=2, highest=4, version="9.0.0")
        assert (await ask("peer-hello", resource="disk0", protocol=3))["epoch"] == 7
        await ask("peer-prepare", 1, epoch=7)
        assert "comes first" in await ask("peer-greet", 1, lowest=2, highest=4, version="9.0.0")
        await ask(
            "peer-greet", 2, lowest=2, highest=4, version="9.0.1"
        )  # the next connection is another matter
        assert counterpart.software == PeerSoftware(protocol=4, version="9.0.1")

    assert with_server(Range(2, 4), body) == [3, 0]
