"""The tables of commands and events."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest

from tcmu_replication.control import schema
from tcmu_replication.control.command import Privilege
from tcmu_replication.control.schema import DEVICE_COMMANDS, MANAGER_COMMANDS
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu.tables import COMMANDS
from tcmu_replication.replication.stages import Stage
from tests.unit.control.documents import status

TABLES = {"worker": COMMANDS, "device": DEVICE_COMMANDS, "manager": MANAGER_COMMANDS}


def test_rows_are_found_by_their_names() -> None:
    for table in TABLES.values():
        assert all(name == row.name and row.doc.endswith(".") for name, row in table.items())


def test_a_peer_may_only_what_a_peer_needs() -> None:
    allowed = {name for name, row in COMMANDS.items() if row.privilege is Privilege.PEER}
    assert allowed == {
        "peer-greet",
        "peer-hello",
        "peer-prepare",
        "peer-checkpoint",
        "peer-digests",
        "peer-resync",
        "peer-resynced",
    }


def test_stages_are_those_of_the_replication_table() -> None:
    assert set(get_args(schema.StageName)) == {stage.value for stage in Stage}


@pytest.mark.parametrize(
    ("command", "arguments", "text"),
    [
        ("start", {"assume-clean": 1}, "Invalid parameter type for 'assume-clean', expected: boolean"),
        ("start", {"assume_clean": True}, "Parameter 'assume_clean' is unexpected"),
        ("failover", {"to": "best"}, "Parameter 'to' does not accept value 'best'"),
        ("checkpoint", {"x": 1}, "Parameter 'x' is unexpected"),
        ("attach-device", {}, "Parameter 'device' is missing"),
        ("attach-device", {"device": "../etc"}, "Invalid arguments of 'attach-device'"),
        ("attach-device", {"device": "uio1\n"}, "Invalid arguments of 'attach-device'"),
        ("peer-hello", {"resource": "disk0"}, "Parameter 'protocol' is missing"),
        ("peer-hello", {"resource": "x" * 257, "protocol": 1}, "Invalid arguments of 'peer-hello'"),
        ("peer-hello", {"resource": "a\nb", "protocol": 1}, "Invalid arguments of 'peer-hello'"),
        ("peer-checkpoint", {"epoch": -1}, "Parameter 'epoch' expects uint64_t"),
        ("peer-checkpoint", {"epoch": 1 << 63}, "Parameter 'epoch' expects uint64_t"),
        ("peer-checkpoint", {"epoch": "1"}, "Invalid parameter type for 'epoch', expected: integer"),
    ],
)
def test_wrong_arguments_are_refused(command: str, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(Error) as caught:
        COMMANDS[command].decode(arguments)
    assert caught.value.kind is Kind.BAD_REQUEST
    assert text in str(caught.value)


def test_arguments_left_out_have_their_defaults() -> None:
    assert COMMANDS["start"].decode({}) == schema.Start(assume_clean=False)
    assert COMMANDS["failover"].decode({}) == schema.Failover(to=None)


def test_status_travels_in_kebab_case_and_comes_back_the_same() -> None:
    sent = COMMANDS["query-status"].encode(status())
    assert sent["link"]["in-flight-bytes"] == 8192
    assert msgspec.convert(sent, schema.Status) == status()


@pytest.mark.parametrize(
    ("command", "result"),
    [("query-status", None), ("start", None), ("checkpoint", None), ("failover", None)],
)
def test_no_result_is_an_empty_object(command: str, result: None) -> None:
    assert COMMANDS[command].encode(result) == {}


def test_result_that_is_not_what_the_table_says_is_caught() -> None:
    with pytest.raises(msgspec.ValidationError):
        COMMANDS["query-errors"].encode({"error": "yes"})
    with pytest.raises(msgspec.ValidationError):
        COMMANDS["query-status"].encode(status(epoch=-1))
    with pytest.raises(msgspec.ValidationError):
        COMMANDS["start"].encode({"unexpected": 1})
