"""Two lines of QEMU's human monitor: drive_add and drive_del, as QEMU's documents of COLO use them.

    drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host=...,node-name=replication0
    drive_del replication0

An error is the text that comes back, as in QEMU; nothing else of that monitor is there.
"""

from __future__ import annotations

import re
from typing import Any

from tcmu_replication.control.server import Handler
from tcmu_replication.control.session import Session
from tcmu_replication.errors import Error, Kind
from tcmu_replication.qemu import blockdev_schema as schema
from tcmu_replication.qemu.blockdev import Blockdev

_OPTION = re.compile(r"((?:[^,]|,,)*)(?:,|\Z)")
_SECONDS = re.compile("[0-9]{1,10}")
_MAX_DEPTH = 8
"""Names within names: `file.server.host` has three. What is deeper is one name, which nothing has."""
_SERVER = {"host": "inet", "port": "inet", "path": "unix"}
"""Options of an NBD connection that came before `server`, and the type of address that they belong to."""


class Human:
    """The command, in terms of `blockdev`'s."""

    def __init__(self, blockdev: Blockdev) -> None:
        self._blockdev = blockdev
        self.commands: dict[str, Handler] = {"human-monitor-command": self._run}

    async def _run(self, arguments: schema.HumanMonitorCommand, session: Session) -> str:
        try:
            match arguments.command_line.split():
                case ["drive_add", "-n", _, options]:
                    await self._add(options, session)
                case ["drive_del", name]:
                    self._delete(name)
                case [command, *_] if command not in ("drive_add", "drive_del"):
                    raise Error(Kind.NOT_FOUND, f"unknown command: '{command}'")
                case _:
                    raise Error(Kind.BAD_REQUEST, "say: drive_add -n buddy OPTIONS, or drive_del NODE")
        except Error as error:
            return f"{error}\r\n"
        return ""

    async def _add(self, text: str, session: Session) -> None:
        options = _options(text)
        if "node-name" not in options:
            raise Error(Kind.BAD_REQUEST, "'node-name' needs to be specified")
        given = schema.COMMANDS["blockdev-add"].decode(_modern(options))
        await self._blockdev.commands["blockdev-add"](given, session)

    def _delete(self, name: str) -> None:
        try:
            self._blockdev.delete(name)
        except Error as error:
            if error.kind is Kind.NOT_FOUND:
                raise Error(Kind.NOT_FOUND, f"Device '{name}' not found") from error
            raise


def _options(text: str) -> dict[str, Any]:
    """`a=1,b.c=2` as {"a": "1", "b": {"c": "2"}}; two commas are one in a value. Raises BAD_REQUEST."""
    found: dict[str, Any] = {}
    for option in filter(None, _OPTION.findall(text)):
        path, equals, value = option.partition("=")
        *outer, last = path.split(".", maxsplit=_MAX_DEPTH)
        into = found
        for step in outer:
            into = into.setdefault(step, {})
            if not isinstance(into, dict):
                break
        if not equals or not isinstance(into, dict) or last in into:
            raise Error(Kind.BAD_REQUEST, f"Invalid parameter '{path}'")
        into[last] = value.replace(",,", ",")
    return found


def _modern(options: dict[str, Any]) -> dict[str, Any]:
    """The same as blockdev-add has it: numbers as such, and the server's address in one member. Raises BAD_REQUEST."""
    plain = {name: _modern(value) if isinstance(value, dict) else value for name, value in options.items()}
    driver = plain.get("driver")
    if driver not in (None, "nbd", "replication"):
        raise Error(Kind.BAD_REQUEST, f"Unknown driver '{driver}'")
    if driver == "nbd":
        for name, kind in _SERVER.items():
            if name in plain and isinstance(server := plain.setdefault("server", {"type": kind}), dict):
                server[name] = plain.pop(name)
    delay = plain.get("reconnect-delay")
    if isinstance(delay, str) and _SECONDS.fullmatch(delay):
        plain["reconnect-delay"] = int(delay)
    return plain
