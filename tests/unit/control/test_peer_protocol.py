"""docs/peer-protocol.md says what the tables say: every command between the hosts, every member, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec import inspect

from tcmu_replication.control import framing, protocol, schema, server
from tcmu_replication.control.arguments import type_of
from tcmu_replication.control.command import PEER, Nothing
from tcmu_replication.replication import pulse
from tests.support import protocol_2

TEXT = (Path(__file__).parents[3] / "docs/peer-protocol.md").read_text()
COMMANDS = {name: row for name, row in schema.COMMANDS.items() if row.privilege is PEER}
SAME_ANSWER = {"peer-checkpoint": "peer-hello", "peer-resynced": "peer-hello"}

WORDS = {
    r"^[ -~]*\Z": "text",
    r"^[!-~]+\Z": "text without blanks",
    r"^[0-9a-f]*\Z": "hexadecimal",
    None: "any text",
}


def section(command: str) -> str:
    found = re.search(rf"^### {command}\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/peer-protocol.md has no section on {command}"
    return found[1]


def table(text: str, head: str) -> dict[str, str]:
    """The rows of the table whose first column is called `head`: the first cell to the second."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {head} |"):
            break
    next(lines, None)
    rows = {}
    for line in lines:
        if not line.startswith("|"):
            break
        name, value, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = value
    return rows


def number(value: int) -> str:
    return "2^63-1" if value == (1 << 63) - 1 else str(value)


def words(type: inspect.Type) -> str:
    """A type and its range, as the page has them."""
    match type:
        case inspect.BoolType():
            return "boolean"
        case inspect.IntType(ge=int(least), le=int(most)):
            return f"integer, {number(least)} to {number(most)}"
        case inspect.StrType(pattern=r"^[0-9T:.+Z-]*\Z", max_length=40):
            return "time"
        case inspect.StrType(max_length=None, pattern=None):
            return "any text"
        case inspect.StrType(max_length=int(most)):
            least = 1 if type.pattern == r"^[!-~]+\Z" else type.min_length or 0
            return f"{WORDS[type.pattern]}, {least} to {most}"
        case inspect.LiteralType():
            stages = ("none", "running", "failover", "failover-failed", "done")
            assert set(type.values) == set(stages)
            return ", ".join(stages)
        case inspect.ListType(max_length=int(most)):
            return f"list of at most {most}: {words(type.item_type)}"
        case inspect.UnionType():
            (some,) = (branch for branch in type.types if not isinstance(branch, inspect.NoneType))
            return f"{words(some)}, or null"
    raise AssertionError(f"the page has no words for {type}")


def members(document: Any) -> dict[str, str]:
    found = type_of(document)
    assert isinstance(found, inspect.StructType)
    return {
        f"`{field.encode_name}`{'' if field.required else ' ?'}": words(field.type) for field in found.fields
    }


def test_every_command_between_hosts_has_a_section_and_nothing_else_has() -> None:
    assert set(re.findall(r"^### (\S+)$", TEXT, re.MULTILINE)) == set(COMMANDS)
    assert set(re.findall(r"peer-[a-z]+", TEXT)) <= {*COMMANDS, "peer-software", "peer-lied"}


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_and_answer_are_those_of_the_schema(name: str) -> None:
    text = section(name)
    assert table(text, "argument") == members(COMMANDS[name].arguments)
    result = COMMANDS[name].result
    if name in SAME_ANSWER:
        assert result is COMMANDS[SAME_ANSWER[name]].result
        assert f"The answer is that of `{SAME_ANSWER[name]}`" in text
    else:
        assert table(text, "answer") == members(result or Nothing)
        assert (result is None) == ("The answer has no members" in text)
    assert "Errors:" in text
    assert "Answer lost:" in text


def test_bounds_are_those_of_the_code() -> None:
    assert [int(value) for value in table(TEXT, "bound").values()] == [
        framing.MAX_LENGTH,
        framing.MAX_DEPTH,
        server.NEGOTIATION_S,
        server.MAX_PEERS,
        server.MAX_QUEUED,
        server.MAX_UNSENT,
        pulse.PERIOD_S,
        protocol.SPOKEN.lowest,
        protocol.SPOKEN.highest,
    ]


def test_errors_that_are_named_exist() -> None:
    errors = re.findall(r"^Errors:(.*?)Answer lost", TEXT, re.MULTILINE | re.DOTALL)
    named = {kind for text in errors for kind in re.findall(r"`([a-z-]+)`", text)} - {"settled"}
    assert named <= set(framing.KIND_OF_NAME)
    assert len(named) > 5


def test_protocol_2_is_frozen() -> None:
    """The version before refuses a member that it does not know: what is new is a command of another protocol."""
    state = json.loads(protocol_2.STATE % (b"none", 0, b"", 0, b"", b"true", 0, 1))["return"]
    answers = {
        "peer-hello": set(state),
        "peer-checkpoint": set(state),
        "peer-digests": {"digests"},
        "peer-prepare": set(),
    }
    for name, taken in protocol_2.TAKES.items():
        row = COMMANDS[name]
        assert set(row.arguments.__struct_encode_fields__) == taken, name
        assert set((row.result or Nothing).__struct_encode_fields__) == answers[name], name
