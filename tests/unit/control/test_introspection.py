"""The schema that clients are told, against the tables it comes from."""

from __future__ import annotations

from typing import Any

import pytest

from tcmu_replication.control import introspection
from tcmu_replication.control.monitor import SESSION_COMMANDS
from tcmu_replication.control.schema import DEVICE_COMMANDS, MANAGER_COMMANDS
from tcmu_replication.qemu.tables import COMMANDS, EVENTS

TABLES = {"worker": COMMANDS, "device": DEVICE_COMMANDS, "manager": MANAGER_COMMANDS}


def schema(table: str = "worker") -> dict[str, dict[str, Any]]:
    rows = introspection.schema((SESSION_COMMANDS | TABLES[table]).values(), EVENTS)
    found = {row["name"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_type_that_is_named_is_described(table: str) -> None:
    found = schema(table)
    for row in found.values():
        named = [row.get(key) for key in ("arg-type", "ret-type", "element-type")]
        named += [member["type"] for member in row.get("members", []) if "type" in member]
        named += [variant["type"] for variant in row.get("variants", [])]
        assert {name for name in named if name} <= set(found), row


def test_every_command_and_event_is_there() -> None:
    found = schema()
    assert {name for name, row in found.items() if row["meta-type"] == "command"} == {
        *SESSION_COMMANDS,
        *COMMANDS,
    }
    assert {name for name, row in found.items() if row["meta-type"] == "event"} == set(EVENTS)
    assert {name for name, row in found.items() if row.get("allow-oob")} == {
        name for name, row in COMMANDS.items() if row.oob
    }


def test_members_have_types_and_say_whether_they_are_optional() -> None:
    found = schema()
    assert found[found["xen-set-replication"]["arg-type"]]["members"] == [
        {"name": "enable", "type": "bool"},
        {"name": "primary", "type": "bool"},
        {"name": "failover", "type": "bool", "default": None},
    ]
    assert found["query-commands"]["ret-type"] == "[CommandInfo]"
    to = found[found["failover"]["arg-type"]]["members"][0]
    assert found[to["type"]]["meta-type"] == "alternate"
    kinds = [found[member["type"]] for member in found[to["type"]]["members"]]
    assert [kind["meta-type"] for kind in kinds] == ["enum", "builtin"]
    assert set(kinds[0]["values"]) == {"latest", "checkpoint"}


def test_result_that_may_be_missing_has_no_member_that_must_be_there() -> None:
    found = schema()
    members = found[found["checkpoint"]["ret-type"]]["members"]
    assert members
    assert all("default" in member for member in members)
