"""One QMP connection as the server sees it: negotiation, then the commands of its privilege. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tcmu_replication.control import framing, introspection
from tcmu_replication.control.command import Command, Document, Privilege
from tcmu_replication.control.framing import NO_COMMAND, ClassError, Request
from tcmu_replication.control.monitor import SESSION_COMMANDS
from tcmu_replication.control.protocol import Terms
from tcmu_replication.control.schema import EVENTS
from tcmu_replication.errors import Error, Kind


class Call(NamedTuple):
    """A command to carry out; its outcome goes back through `Session.succeed` or `Session.fail`."""

    command: Command
    arguments: Any
    request: Request


class Session:
    """`privilege` is what this connection may do, `peer` says for the log who it is.

    `commands` is the table, `served` the names that have a handler: the rest
    is not found, and neither is what the privilege does not cover. `events` are
    those that may come. `terms` is what the peer's greeting came to, None before it.
    """

    def __init__(
        self,
        commands: Mapping[str, Command],
        served: Collection[str],
        privilege: Privilege,
        peer: str,
        events: Mapping[str, type[Document]] = EVENTS,
    ) -> None:
        self.privilege = privilege
        self.peer = peer
        self.negotiated = False
        self.oob = False
        self.terms: Terms | None = None
        self._events = events
        self._commands = SESSION_COMMANDS | {
            name: row
            for name, row in commands.items()
            if name in served and (privilege is Privilege.OPERATOR or row.privilege is privilege)
        }

    def receive(self, data: bytes) -> Call | bytes:
        """What a message asks for: a call, or the reply to send in its turn.

        Raises BAD_REQUEST if it is no JSON object: the connection ends.
        """
        message = framing.decode(data)
        try:
            request = framing.parse_request(message, self.oob)
        except Error as error:
            has_id = "id" in message
            return framing.failure(error, Request("", {}, message.get("id"), has_id))
        try:
            return self._dispatch(request)
        except Error as error:
            return framing.failure(error, request)

    def succeed(self, call: Call, result: Any) -> bytes:
        """The reply with a result. Raises msgspec.ValidationError if it is not what the table says."""
        return framing.success(call.command.encode(result), call.request)

    def fail(self, call: Call, error: Error) -> bytes:
        """The reply with a handler's error."""
        return framing.failure(error, call.request)

    def _dispatch(self, request: Request) -> Call | bytes:
        """As QEMU's qmp_dispatch, in its order."""
        if not self.negotiated and request.command != "qmp_capabilities":
            raise _not_found("Expecting capabilities negotiation with 'qmp_capabilities'")
        command = self._commands.get(request.command)
        if command is None:
            raise _not_found(f"The command {request.command} has not been found")
        if request.oob and not command.oob:
            raise Error(Kind.UNSUPPORTED, f"The command {request.command} does not support OOB")
        if self.negotiated and command.name == "qmp_capabilities":
            raise _not_found("Capabilities negotiation is already complete, command ignored")
        arguments = command.decode(request.arguments)
        if command.name not in SESSION_COMMANDS:
            return Call(command, arguments, request)
        return framing.success(self._answer(command.name, arguments), request)

    def _answer(self, name: str, arguments: Any) -> Any:
        """The result of a command about the connection itself."""
        match name:
            case "query-commands":
                return [{"name": name} for name in sorted(self._commands)]
            case "query-qmp-schema":
                return introspection.schema(self._commands.values(), self._events)
            case "query-version":
                return framing.version()
            case _:
                self.negotiated = True
                self.oob = "oob" in arguments.enable
                return {}


def _not_found(text: str) -> Error:
    return ClassError(NO_COMMAND, Kind.UNSUPPORTED, text)
