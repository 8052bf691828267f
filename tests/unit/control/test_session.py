"""Negotiation, dispatch and privilege, line by line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tcmu_replication.control.command import Privilege
from tcmu_replication.control.monitor import SESSION_COMMANDS, Shutdown
from tcmu_replication.control.schema import Start
from tcmu_replication.control.session import Call, Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.tables import COMMANDS

NEGOTIATE = {"execute": "qmp_capabilities"}


def make(privilege: Privilege = Privilege.OPERATOR, *, negotiated: bool = True) -> Session:
    session = Session(COMMANDS, COMMANDS, privilege, "test")
    if negotiated:
        reply(session, NEGOTIATE)
    return session


def reply(session: Session, message: Any) -> dict[str, Any]:
    """What the session answers at once."""
    answer = session.receive(json.dumps(message).encode())
    assert isinstance(answer, bytes)
    return json.loads(answer)


def test_nothing_before_negotiation() -> None:
    session = make(negotiated=False)
    answer = reply(session, {"execute": "query-status", "id": 1})
    assert answer["error"]["class"] == "CommandNotFound"
    assert answer["error"]["desc"].startswith("Expecting capabilities negotiation")
    assert answer["id"] == 1
    assert reply(session, NEGOTIATE) == {"return": {}}
    assert isinstance(session.receive(b'{"execute":"query-status"}'), Call)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"enable": ["x"]}, "Parameter 'null' does not accept value 'x'"),
        ({"enable": [1]}, "Invalid parameter type for 'enable[0]', expected: string"),
        ({"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
        ({"x": []}, "Parameter 'x' is unexpected"),
    ],
)
def test_capability_that_is_not_offered(arguments: dict[str, Any], text: str) -> None:
    session = make(negotiated=False)
    error = reply(session, NEGOTIATE | {"arguments": arguments})["error"]
    assert (error["class"], error["desc"]) == ("GenericError", text)
    assert not session.negotiated


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"exec-oob": "stop-replication"}, "The command stop-replication does not support OOB"),
        ({"exec-oob": "cont"}, "The command cont has not been found"),
        ({"exec-oob": "qmp_capabilities"}, "The command qmp_capabilities does not support OOB"),
        ({"exec-oob": "stop", "execute": "stop"}, "QMP input member 'execute' clashes with 'exec-oob'"),
        ({"exec-oob": 1}, "QMP input member 'exec-oob' must be a string"),
    ],
)
def test_out_of_band_where_it_is_not_sensible(message: dict[str, Any], text: str) -> None:
    session = make(negotiated=False)
    reply(session, NEGOTIATE | {"arguments": {"enable": ["oob"]}})
    assert reply(session, message)["error"]["desc"] == text


def test_out_of_band_needs_its_capability() -> None:
    error = reply(make(), {"exec-oob": "query-status"})["error"]
    assert error["desc"] == "QMP input member 'exec-oob' is unexpected"
    session = make(negotiated=False)
    reply(session, NEGOTIATE | {"arguments": {"enable": ["oob"]}})
    call = session.receive(b'{"exec-oob":"query-status","id":1}')
    assert isinstance(call, Call)
    assert call.request.oob


def test_negotiation_with_an_empty_list_as_libraries_send_it() -> None:
    assert reply(make(negotiated=False), NEGOTIATE | {"arguments": {"enable": []}}) == {"return": {}}


def test_second_negotiation_is_refused() -> None:
    assert reply(make(), NEGOTIATE)["error"]["class"] == "CommandNotFound"


def test_unknown_command() -> None:
    error = reply(make(), {"execute": "cont"})["error"]
    assert (error["class"], error["desc"]) == ("CommandNotFound", "The command cont has not been found")


def test_command_without_a_handler_is_unknown() -> None:
    session = Session(COMMANDS, {"start"}, Privilege.OPERATOR, "test")
    reply(session, NEGOTIATE)
    assert reply(session, {"execute": "stop-replication"})["error"]["class"] == "CommandNotFound"
    assert isinstance(session.receive(b'{"execute":"start"}'), Call)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_peer_gets_peer_commands_only(name: str) -> None:
    row = COMMANDS[name]
    arguments = {
        "peer-greet": {"lowest": 2, "highest": 2, "version": "0.1.0"},
        "peer-hello": {"resource": "disk0", "protocol": 1},
        "peer-prepare": {"epoch": 1},
        "peer-checkpoint": {"epoch": 1, "name": "a", "settled": 0},
        "peer-digests": {"offset": 0, "length": 4096, "piece": 4096},
        "peer-resync": {"generation": "a", "name": "b"},
        "peer-resynced": {"generation": "a"},
    }
    line = json.dumps({"execute": name, "arguments": arguments.get(name, {})}).encode()
    answer = make(Privilege.PEER).receive(line)
    if row.privilege is Privilege.PEER:
        assert isinstance(answer, Call)
    else:
        assert isinstance(answer, bytes)
        assert json.loads(answer)["error"]["class"] == "CommandNotFound"


def test_call_carries_the_checked_arguments() -> None:
    call = make().receive(b'{"execute":"start","arguments":{"assume-clean":true},"id":"a"}')
    assert isinstance(call, Call)
    assert call.arguments == Start(assume_clean=True)
    assert json.loads(make().succeed(call, None)) == {"return": {}, "id": "a"}
    failed = json.loads(make().fail(call, Error(Kind.INVALID_STATE, "Block replication is running or done")))
    assert failed["error"]["data"] == {"kind": "invalid-state"}
    assert failed["error"]["class"] == "GenericError"


def test_invalid_arguments_are_answered_and_the_session_goes_on() -> None:
    session = make()
    answer = reply(session, {"execute": "failover", "arguments": {"to": "x"}})
    assert answer["error"]["data"]["kind"] == "bad-request"
    assert isinstance(session.receive(b'{"execute":"stop-replication"}'), Call)


def test_schema_lists_the_events_that_may_come() -> None:
    session = Session({}, (), Privilege.OPERATOR, "test", {"SHUTDOWN": Shutdown})
    reply(session, {"execute": "qmp_capabilities"})
    rows = reply(session, {"execute": "query-qmp-schema"})["return"]
    assert [row["name"] for row in rows if row["meta-type"] == "event"] == ["SHUTDOWN"]


def test_query_commands_lists_what_can_be_called() -> None:
    names = {row["name"] for row in reply(make(Privilege.PEER), {"execute": "query-commands"})["return"]}
    peers = {name for name, row in COMMANDS.items() if row.privilege is Privilege.PEER}
    assert names == {*SESSION_COMMANDS, *peers}
    assert "peer-hello" in names
    assert "start" not in names


@pytest.mark.parametrize("message", [b"garbage", b"[]", b"{]", b'{"a":"\xff"}'])
def test_message_that_ends_the_session(message: bytes) -> None:
    with pytest.raises(Error):
        make().receive(message)


def test_version_and_schema_are_answered_at_once() -> None:
    session = make()
    assert reply(session, {"execute": "query-version"})["return"]["package"].startswith("tcmu-replication ")
    rows = reply(session, {"execute": "query-qmp-schema"})["return"]
    assert {"query-qmp-schema", "start", "REPLICATION_STAGE"} <= {row["name"] for row in rows}
