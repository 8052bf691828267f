"""Prints the reference part of docs/qmp.md from the tables.

    python -m tcmu_replication.qemu.reference docs/qmp.md

replaces what follows the marker in that file.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from tcmu_replication.control import introspection
from tcmu_replication.control.command import Command, Document, Privilege
from tcmu_replication.control.monitor import SESSION_COMMANDS
from tcmu_replication.control.schema import MANAGER_COMMANDS
from tcmu_replication.qemu.tables import COMMANDS, EVENTS

MARKER = "<!-- printed by: python -m tcmu_replication.qemu.reference docs/qmp.md -->\n"


def updated(text: str) -> str:
    """The file's text with the reference as it should be. The marker must be in it."""
    head, marker, _ = text.partition(MARKER)
    assert marker, f"the file has no line {MARKER!r}"
    return head + marker + reference()


def reference() -> str:
    """Commands, events and documents, as Markdown."""
    commands = sorted((SESSION_COMMANDS | COMMANDS | MANAGER_COMMANDS).values(), key=lambda row: row.name)
    types = {row["name"]: row for row in introspection.schema(commands, EVENTS)}
    lines = ["", "## Commands", "", "| command | arguments | result | |", "|---|---|---|---|"]
    lines += [_command(command, types) for command in commands]
    lines += ["", "## Events", "", "| event | data | |", "|---|---|---|"]
    for name in sorted(EVENTS):
        lines.append(f"| {name} | {_members(types[EVENTS[name].__name__], types)} | {_doc(EVENTS[name])} |")
    lines += ["", "## Documents", "", "| document | members | |", "|---|---|---|"]
    said = {row["name"]: row for row in introspection.schema(commands, {})}  # without what only events carry
    for document in sorted(_documents(Document), key=lambda document: document.__name__):
        row = said.get(document.__name__)
        if row is not None and row["members"]:
            lines.append(f"| {document.__name__} | {_members(row, types)} | {_doc(document)} |")
    return "\n".join(lines) + "\n"


def _command(command: Command, types: dict[str, Any]) -> str:
    row = types[command.name]
    result = "" if row["ret-type"] == "Nothing" else _type(row["ret-type"], types)
    notes = command.doc
    if command.oob:
        notes += " May be given out of band."
    if command.privilege is Privilege.PEER and command.name not in SESSION_COMMANDS:
        notes += " The peer's."
    if command.name in MANAGER_COMMANDS:
        notes += " The manager's."
    taken = types[row["arg-type"]]
    arguments = _type(row["arg-type"], types) if "variants" in taken else _members(taken, types)
    return f"| {command.name} | {arguments} | {result} | {notes} |"


def _members(row: dict[str, Any], types: dict[str, Any]) -> str:
    """The members of an object: `name`: type, with a question mark where one may be left out."""
    return ", ".join(
        f"`{member['name']}`{'?' if 'default' in member else ''}: {_type(member['type'], types)}"
        for member in row["members"]
    )


def _type(name: str, types: dict[str, Any]) -> str:
    row = types[name]
    match row["meta-type"]:
        case "array":
            return f"[{_type(row['element-type'], types)}]"
        case "enum":
            return " or ".join(row["values"])
        case "alternate":
            return " or ".join(_type(member["type"], types) for member in row["members"])
        case "object" if "variants" in row:
            cases = [f"{v['case']} {{{_members(types[v['type']], types)}}}" for v in row["variants"]]
            return f"{{`{row['tag']}`: {' or '.join(cases)}}}"
        case _:
            return name.replace("|{}", " or {}")


def _documents(base: type[Document]) -> set[type[Document]]:
    """All kinds of documents."""
    found = set(base.__subclasses__())
    return found.union(*(_documents(document) for document in found))


def _doc(document: type[Document]) -> str:
    return " ".join((inspect.getdoc(document) or "").split())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text()))
